// SPDX-License-Identifier: Apache-2.0
//! How a pod releases the resources that it holds on the host.
//!
//! Resources are released from the top of the Held stack. A stop releases all but the directories, a removal also
//! those. To end the VM, the guest is asked to shut down; if it does not, the VMM is asked to stop; if it does not, it
//! is killed.

use std::io;
use std::path::Path;
use std::time::Duration;

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::exit::Exit;
use bulkhead_host::process::{Identity, VmmProcess};
use bulkhead_host::{Guest, control};

use super::logs::LogTask;
use super::{Owner, Then};
use crate::clock::now;
use crate::pod::errors::{BootError, PodError};
use crate::pod::life::record::Held;
use crate::pod::life::signal;
use crate::pod::life::state::{ContainerEvent, PodEvent, PodState};

/// How long the call to shut down may take. A guest that powers off may never answer it.
const SHUTDOWN: Duration = Duration::from_secs(2);
/// The same for a guest that has data to write back to its disks, which takes longer.
const SHUTDOWN_WITH_DISKS: Duration = Duration::from_secs(20);
/// How long a VMM may take to end after the guest's shutdown, and again after its own stop.
const END_STEP: Duration = Duration::from_secs(3);
/// How long a killed process may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

impl Owner {
    /// Ends the VM and releases all but the directories. A stopped pod may be stopped again.
    pub(super) async fn stop_pod(&mut self) -> Result<(), PodError> {
        self.ledger.move_pod(&PodEvent::StopRequested)?;
        if let Some(guest) = self.ledger.guest().cloned() {
            self.kill_containers(&guest).await;
            faults::before(Step::EndGuest)?;
            end_vm(&guest, self.shutdown_limit()).await;
            faults::after(Step::EndGuest)?;
            self.ledger.set_guest(None);
        }
        let ids: Vec<String> = self.ledger.containers().keys().cloned().collect();
        for id in ids {
            let killed = ContainerEvent::Ended(Exit::killed(now()));
            self.ledger.happened(&id, &killed, None);
        }
        self.logs.clear();
        self.mirrors.clear();
        let kept = |held: &Held| matches!(held, Held::RunDirectory(_) | Held::StateDirectory(_));
        self.release_while(|held| !kept(held)).await?;
        if self.ledger.pod().state == PodState::Stopping {
            self.ledger.move_pod(&PodEvent::Stopped)?;
        }
        Ok(())
    }

    /// Removes the pod and everything that it has. After success the owner's task must end. The records come last: what
    /// is removed before them frees the space to write that they are gone.
    pub(super) async fn remove_pod(&mut self) -> Result<(), PodError> {
        self.stop_pod().await?;
        self.release_while(|_| true).await?;
        let ids: Vec<String> = self.ledger.containers().keys().cloned().collect();
        for id in ids {
            self.forget_container(&id)?;
        }
        Ok(self.ledger.forget_pod()?)
    }

    /// Removes a pod that no client knows. If that fails, its name is free all the same, and the owner's task tries
    /// again later.
    pub(super) async fn discard(&mut self, what: &str) -> Then {
        match self.remove_pod().await {
            Ok(()) => Then::End,
            Err(error) => {
                self.ledger.complain(what, &error);
                self.shared.registry.release(self.ledger.pod());
                self.is_discarded = true;
                Then::GoOn
            }
        }
    }

    /// Kills all running containers and waits for the end of their logs.
    async fn kill_containers(&mut self, guest: &Guest) {
        let running = self
            .ledger
            .containers()
            .values()
            .filter(|one| one.state.is_running());
        let ids: Vec<String> = running.map(|one| one.id.clone()).collect();
        for id in &ids {
            if let Err(error) = guest.agent.signal(id, signal::SIGKILL).await {
                // No need to try further: the VM ends anyway.
                return self.ledger.complain("kill a container", &error);
            }
        }
        LogTask::rest_of(self.logs.values()).await;
    }

    /// Releases what belonged to a VM that has ended.
    pub(super) async fn release_vm(&mut self) -> Result<(), BootError> {
        let of_vm = |held: &Held| {
            matches!(
                held,
                Held::FileServer(_) | Held::Vmm(_) | Held::Cgroup(_) | Held::User(_)
            )
        };
        self.release_while(of_vm).await
    }

    /// Releases resources from the top of the Held stack, as long as `wanted` holds for them.
    async fn release_while(&mut self, wanted: impl Fn(&Held) -> bool) -> Result<(), BootError> {
        while let Some(held) = self
            .ledger
            .pod()
            .held
            .last()
            .filter(|held| wanted(held))
            .cloned()
        {
            self.give_back(&held).await?;
            self.ledger.gave_back();
        }
        Ok(())
    }

    async fn give_back(&self, held: &Held) -> Result<(), BootError> {
        match held {
            Held::Vmm(identity) | Held::FileServer(identity) => {
                faults::around(Step::KillProcess, kill(*identity)).await
            }
            Held::Cgroup(path) => {
                let removed = async {
                    let removed = self.shared.host.cgroups.remove(path).await;
                    removed.map_err(|_| BootError::Panicked)
                };
                faults::around(Step::RemoveCgroup, removed).await
            }
            Held::User(user) => {
                self.shared.host.users.give_back(*user);
                Ok(())
            }
            Held::Network(record) => {
                let _lane = self.shared.host.admission.teardown().await;
                Ok(self.shared.host.network.detach(record).await?)
            }
            Held::RunDirectory(path) | Held::StateDirectory(path) => {
                let removed = faults::within(Step::RemoveDirectory, || remove_directory(path));
                removed.map_err(|source| BootError::Directory {
                    path: path.clone(),
                    source,
                })
            }
        }
    }

    /// How long the guest may take to shut down.
    fn shutdown_limit(&self) -> Duration {
        match &self.ledger.pod().disks {
            Some(disks) if !disks.is_empty() => SHUTDOWN_WITH_DISKS,
            _ => SHUTDOWN,
        }
    }
}

/// Ends a VM. Asks the guest, then the VMM; if neither helps, kills the VMM.
async fn end_vm(guest: &Guest, limit: Duration) {
    let process = &guest.process;
    tokio::select! {
        () = process.ended() => return,
        () = guest.agent.shutdown(limit) => {}
    }
    if within(process).await {
        return;
    }
    tracing::info!(
        pid = process.identity().pid,
        "the guest has not shut down; stopping its VMM"
    );
    // An error is ignored: a VMM that does not end is killed below.
    let _ = control::stop(&guest.files.control()).await;
    if !within(process).await {
        process.kill();
    }
}

/// Waits until the process has ended. Returns false if that takes longer than [`END_STEP`].
async fn within(process: &VmmProcess) -> bool {
    tokio::time::timeout(END_STEP, process.ended())
        .await
        .is_ok()
}

/// Kills a VMM or file server if it lives, and waits until it has ended.
pub async fn kill(identity: Identity) -> Result<(), BootError> {
    let Ok(Some(process)) = VmmProcess::adopt(identity) else {
        return Ok(());
    };
    process.kill();
    tokio::time::timeout(KILL_LIMIT, process.ended())
        .await
        .map_err(|_| BootError::Unkillable {
            pid: identity.pid,
            limit: KILL_LIMIT,
        })
}

fn remove_directory(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
