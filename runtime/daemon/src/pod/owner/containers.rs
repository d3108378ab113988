// SPDX-License-Identifier: Apache-2.0
//! What a pod's owner does with existing containers: start, signal, update, remove.

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::agent::{AgentError, Started};
use bulkhead_guest::exit::Exit;

use super::Owner;
use super::logs::LogTask;
use super::node::check_placement;
use crate::clock::now;
use crate::pod::errors::PodError;
use crate::pod::life::signal;
use crate::pod::life::spec::Resources;
use crate::pod::life::state::{ContainerEvent, ContainerState};
use crate::pod::plan::program;

impl Owner {
    /// Starts a container. If it cannot be started, it is recorded as exited, with a message that says why.
    pub(super) async fn start(&mut self, id: &str) -> Result<(), PodError> {
        let record = self.ledger.container(id)?;
        if record.state != ContainerState::Created {
            return Err(PodError::container_is(record, "start"));
        }
        let (id, path) = (record.id.clone(), record.log_path.clone());
        let created_at = record.created_at;
        let guest = self.ledger.ready_guest("start of a container")?;
        let (exit, error) = match guest.agent.start(&id, now).await {
            Ok(Started::Running {
                pid,
                started_at,
                user,
            }) => {
                let log = self.log_file(path);
                let log = LogTask::start(&guest, id.clone(), log);
                self.logs.insert(id.clone(), log);
                // The guest's clock may be behind the host's: nothing may start before it was created.
                let at = started_at.max(created_at);
                let event = ContainerEvent::Started { pid, at };
                self.ledger.happened(&id, &event, user);
                return Ok(());
            }
            Ok(Started::Failed(exit)) => {
                let message = exit.message.clone();
                let id = id.clone();
                (Some(exit), PodError::NotStarted { id, message })
            }
            Err(source) => {
                let exit = exit_without_answer(&source);
                let id = id.clone();
                (exit, PodError::Agent { id, source })
            }
        };
        // Clients look for the log file of every container that they have started, also if it failed.
        if let Err(error) = self.log_file(path).open() {
            self.ledger.complain("make a log", &error);
        }
        if let Some(exit) = exit {
            let event = ContainerEvent::Ended(exit);
            self.ledger.happened(&id, &event, None);
        }
        Err(error)
    }

    /// Sends a container its stop signal. Only the first stop sends it: a program may take the second one for an order
    /// to end at once. If the guest did not take it, the next stop sends it.
    pub(super) async fn signal_stop(&mut self, id: &str) -> Result<(), PodError> {
        if self.signalled.contains(id) {
            return Ok(());
        }
        let stop_signal = self.ledger.container(id)?.stop_signal;
        self.signal(id, stop_signal).await?;
        self.signalled.insert(id.to_owned());
        Ok(())
    }

    /// Sends a signal to a container. A container that does not run is no error.
    pub(super) async fn signal(&mut self, id: &str, signal: i32) -> Result<(), PodError> {
        let running = self.ledger.container(id)?.state.is_running();
        let Some(guest) = self.ledger.guest().cloned().filter(|_| running) else {
            return Ok(());
        };
        let signalled = guest.agent.signal(id, signal).await;
        signalled.map_err(|source| PodError::Agent {
            id: id.to_owned(),
            source,
        })
    }

    /// Removes a container; kills it first if it runs.
    pub(super) async fn remove(&mut self, id: &str) -> Result<(), PodError> {
        let running = self.ledger.container(id)?.state.is_running();
        if let Some(guest) = self.ledger.guest().cloned() {
            let failed = |source| PodError::Agent {
                id: id.to_owned(),
                source,
            };
            if running {
                guest
                    .agent
                    .signal(id, signal::SIGKILL)
                    .await
                    .map_err(failed)?;
            }
            LogTask::rest_of(self.logs.get(id)).await;
            guest.agent.remove(id).await.map_err(failed)?;
            self.remove_own_volumes(&guest, self.ledger.container(id)?)
                .await;
        }
        self.unshare(id).await;
        self.detach_blocks(id).await;
        let killed = ContainerEvent::Ended(Exit::killed(now()));
        self.ledger.happened(id, &killed, None);
        let resources = self.ledger.container(id)?.spec.resources.clone();
        self.forget_container(id)?;
        if let Some(guest) = self.ledger.guest().cloned() {
            self.give_back_hugepages(&guest, id, &resources).await;
        }
        Ok(())
    }

    /// Forgets a container on the host: its image lease, its record and its log task.
    pub(super) fn forget_container(&mut self, id: &str) -> Result<(), PodError> {
        let released = || self.shared.host.images.release(id);
        tokio::task::block_in_place(|| faults::within(Step::ReleaseImage, released))?;
        self.ledger.forget_container(id)?;
        self.logs.remove(id);
        self.signalled.remove(id);
        Ok(())
    }

    /// Changes a container's limits, in the guest and in the record.
    pub(super) async fn update(&mut self, id: &str, change: &Resources) -> Result<(), PodError> {
        check_placement(change)?;
        let mut record = self.ledger.container(id)?.clone();
        record.spec.resources.update(change);
        let limits = program::resources(&record.spec.resources)?;
        let score = (change.oom_score_adj != 0).then(|| program::oom_score_adj(change));
        let guest = self
            .ledger
            .guest()
            .cloned()
            .filter(|_| !record.state.is_exited());
        let guest = guest.ok_or_else(|| PodError::container_is(&record, "an update"))?;
        self.make_room(&guest, id, &record.spec.resources).await?;
        self.reserve_hugepages(&guest, id, &record.spec.resources)
            .await?;
        let updated = guest.agent.update(id, limits, score).await;
        if updated.is_err() {
            self.keep_known_hugepages(&guest).await;
        }
        updated.map_err(|source| PodError::Agent {
            id: id.to_owned(),
            source,
        })?;
        Ok(self.ledger.change_container(record)?)
    }
}

/// The exit of a container for which the start call failed. `None` for FAILED_PRECONDITION: then the guest has the
/// container in another state than the daemon, and its news will report that state. An agent of an earlier version also
/// answers so when it could not execute the program.
fn exit_without_answer(error: &AgentError) -> Option<Exit> {
    let message = error.to_string();
    (!error.is_precondition()).then(|| Exit::not_started(message, now()))
}
