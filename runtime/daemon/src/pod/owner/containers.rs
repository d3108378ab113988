// SPDX-License-Identifier: Apache-2.0
//! What a pod's owner does with containers that are there: start, signal, change, remove.

use std::time::Duration;

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::watch::News;
use bulkhead_host::Guest;

use super::Owner;
use super::logs::LogTask;
use super::node::check_placement;
use super::teardown::killed;
use crate::clock::now;
use crate::logs::LogFile;
use crate::pod::errors::PodError;
use crate::pod::life::record::ContainerRecord;
use crate::pod::life::signal;
use crate::pod::life::spec::Resources;
use crate::pod::life::state::{ContainerEvent, ContainerState, IllegalMove, PodState};
use crate::pod::notices::NoticeKind;
use crate::pod::plan::program;
use crate::pod::registry::not_found;
use crate::store::Kind;

/// How long the news of a failed start may take; they have its exit code.
const START_NEWS: Duration = Duration::from_secs(3);
/// A start that failed for a reason that nobody named.
const START_FAILED_EXIT_CODE: i32 = 128;

impl Owner {
    /// Starts a container. One that cannot run has exited after this, with the code that says why.
    pub(super) async fn start(&mut self, id: &str) -> Result<(), PodError> {
        let record = self.container(id)?;
        let illegal = |event| PodError::State {
            id: id.to_owned(),
            source: IllegalMove {
                subject: "container",
                state: record.state.name(),
                event,
            },
        };
        if record.state != ContainerState::Created {
            return Err(illegal("start"));
        }
        let (id, path) = (record.id.clone(), record.log_path.clone());
        let guest = self.ready_guest("start of a container")?;
        match guest.agent.start(&id).await {
            Ok((pid, user)) => {
                let log = LogTask::start(guest.files.vsock(), id.clone(), path);
                self.logs.insert(id.clone(), log);
                self.is_user(&id, user);
                self.happened(&id, &ContainerEvent::Started { pid, at: now() });
                Ok(())
            }
            Err(source) => {
                // Clients look for a log of whatever was started.
                if let Err(error) = LogFile::new(path).open() {
                    self.complain("make a log", &error);
                }
                let event = self.why_not_started(&id, &source).await;
                self.happened(&id, &event);
                Err(PodError::Agent { id, source })
            }
        }
    }

    async fn why_not_started(&mut self, id: &str, error: &AgentError) -> ContainerEvent {
        let told = match error {
            AgentError::Refused { .. } => self.news_of_failed_start(id).await,
            // Who did not answer has no news either.
            _ => None,
        };
        let (code, message, at) = told.unwrap_or((START_FAILED_EXIT_CODE, String::new(), now()));
        ContainerEvent::StartFailed {
            code,
            message: if message.is_empty() {
                error.to_string()
            } else {
                message
            },
            at,
        }
    }

    /// The exit code of a failed start comes with the news.
    async fn news_of_failed_start(&mut self, id: &str) -> Option<(i32, String, i64)> {
        let deadline = tokio::time::Instant::now() + START_NEWS;
        loop {
            match tokio::time::timeout_at(deadline, self.news.recv())
                .await
                .ok()??
            {
                News::Exited {
                    id: about,
                    code,
                    message,
                    finished_at,
                    ..
                } if about == id => return Some((code, message, finished_at)),
                news => self.take_news(news),
            }
        }
    }

    /// Signals a container; one that does not run is fine.
    pub(super) async fn signal(&mut self, id: &str, signal: i32) -> Result<(), PodError> {
        let running = self.container(id)?.state.is_running();
        let Some(guest) = self.guest.clone().filter(|_| running) else {
            return Ok(());
        };
        let signalled = guest.agent.signal(id, signal).await;
        signalled.map_err(|source| PodError::Agent {
            id: id.to_owned(),
            source,
        })
    }

    /// Kills what is left of a container, and forgets it.
    pub(super) async fn remove(&mut self, id: &str) -> Result<(), PodError> {
        let running = self.container(id)?.state.is_running();
        if let Some(guest) = self.guest.clone() {
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
            self.remove_own_volumes(&guest, self.container(id)?).await;
        }
        self.unshare(id).await;
        self.detach_blocks(id).await;
        self.happened(id, &killed());
        let resources = self.container(id)?.spec.resources.clone();
        self.forget_container(id)?;
        if let Some(guest) = self.guest.clone() {
            self.give_back_hugepages(&guest, id, &resources).await;
        }
        Ok(())
    }

    /// Gives back what a container holds on the host, and forgets it: lease, record, memory.
    pub(super) fn forget_container(&mut self, id: &str) -> Result<(), PodError> {
        let host = &self.shared.host;
        tokio::task::block_in_place(|| {
            host.images.release(id)?;
            host.store.remove(Kind::Container, id)?;
            Ok::<_, PodError>(())
        })?;
        self.logs.remove(id);
        if self.containers.remove(id).is_some() {
            self.place();
            self.publish();
            self.notify(NoticeKind::Deleted, id);
        }
        Ok(())
    }

    /// Changes limits, in the guest and in the record.
    pub(super) async fn update(&mut self, id: &str, change: &Resources) -> Result<(), PodError> {
        check_placement(change)?;
        let mut record = self.container(id)?.clone();
        record.spec.resources.update(change);
        let limits = program::resources(&record.spec.resources)?;
        let score = (change.oom_score_adj != 0).then(|| program::oom_score_adj(change));
        let guest = self.guest.clone().filter(|_| !record.state.is_exited());
        let guest = guest.ok_or_else(|| PodError::State {
            id: id.to_owned(),
            source: IllegalMove {
                subject: "container",
                state: record.state.name(),
                event: "an update",
            },
        })?;
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
        self.store(Kind::Container, id, &record)?;
        self.containers.insert(id.to_owned(), record);
        self.place();
        self.publish();
        Ok(())
    }

    pub(super) fn container(&self, id: &str) -> Result<&ContainerRecord, PodError> {
        self.containers
            .get(id)
            .ok_or_else(|| not_found("container", id))
    }

    /// The guest, if the pod is one that can run something.
    pub(super) fn ready_guest(&self, event: &'static str) -> Result<Guest, PodError> {
        match (&self.pod.state, &self.guest) {
            (PodState::Ready, Some(guest)) => Ok(guest.clone()),
            (state, _) => Err(PodError::State {
                id: self.pod.id.clone(),
                source: IllegalMove {
                    subject: "pod",
                    state: state.name(),
                    event,
                },
            }),
        }
    }
}
