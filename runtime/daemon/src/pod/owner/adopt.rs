// SPDX-License-Identifier: Apache-2.0
//! What happens to a pod that an earlier daemon stored.
//!
//! ```text
//! stored as    its VMM lives                          its VMM is gone
//! Creating     removed: no client knows its id        removed
//! Ready        adopted                                not ready, containers exited 137
//! Stopping     stopped                                stopped
//! NotReady     (it has no VMM)                        kept
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_host::{Files, Guest};
use bulkhead_text::chain;

use super::{Owner, Then};
use crate::pod::errors::PodError;
use crate::pod::host::Shared;
use crate::pod::life::record::{ContainerRecord, PodRecord};
use crate::pod::life::state::PodState;

/// Takes over a pod that an earlier daemon stored.
pub async fn adopt(
    shared: Arc<Shared>,
    pod: PodRecord,
    containers: BTreeMap<String, ContainerRecord>,
) {
    if let Err(error) = shared.registry.reserve(&pod) {
        tracing::error!("{}", chain(&error));
    }
    let state = pod.state.clone();
    let mut owner = Owner::new(shared, pod, containers);
    let done = match state {
        PodState::Creating => match owner.discard("clean up after a boot").await {
            Then::End => return,
            Then::GoOn => Ok(()),
        },
        PodState::Ready => {
            owner.adopt_guest().await;
            Ok(())
        }
        PodState::Stopping => owner.stop_pod().await,
        PodState::NotReady { .. } => owner.release_vm().await.map_err(PodError::from),
    };
    if let Err(error) = done {
        owner
            .ledger
            .complain("clean up after an earlier daemon", &error);
    }
    tokio::spawn(owner.run());
}

impl Owner {
    /// Starts a CNI CHECK of the pod's network in the background.
    fn check_network(&self) {
        let Some(record) = self.ledger.pod().network().cloned() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let _one = shared.host.admission.check().await;
            shared.host.network.check(&record).await;
        });
    }

    /// Adopts the VM of a pod that was ready, or records that the VM has ended.
    async fn adopt_guest(&mut self) {
        let files = self.ledger.pod().run_directory().cloned().map(Files::new);
        let found = match (self.ledger.pod().vmm(), &files) {
            (Some(identity), Some(files)) => {
                self.shared.host.launcher.adopt(files.clone(), identity)
            }
            _ => Ok(None),
        };
        match found {
            Ok(Some(guest)) => {
                tracing::info!(
                    pod = self.ledger.pod().id,
                    pid = guest.process.identity().pid,
                    "adopted"
                );
                self.follow_logs(&guest);
                self.follow_mirrors(&guest);
                self.adopt_file_server(Arc::clone(&guest.process));
                self.check_network();
                thaw(&guest);
                self.serve_guest(guest);
            }
            missing => {
                if let Err(error) = missing {
                    self.ledger.complain("adopt", &error);
                }
                let obituary = files.map(|files| files.obituary());
                let cause = obituary.unwrap_or_else(|| "its VM is gone".to_owned());
                tracing::warn!(
                    pod = self.ledger.pod().id,
                    "lost while no daemon ran: {cause}"
                );
                self.lose(&cause);
                if let Err(error) = self.release_vm().await {
                    self.ledger.complain("release the VM's resources", &error);
                }
            }
        }
    }
}

/// Thaws what the earlier daemon froze, if it died while it saved the pod. Agents of an earlier version refuse the call.
fn thaw(guest: &Guest) {
    let (agent, process) = (guest.agent.clone(), Arc::clone(&guest.process));
    tokio::spawn(async move {
        tokio::select! {
            _ = agent.thaw() => {}
            () = process.ended() => {}
        }
    });
}
