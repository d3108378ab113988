// SPDX-License-Identifier: Apache-2.0
//! What a daemon does with the pods of the one before it, once, before it serves.
//!
//! ```text
//! stored as    its VMM lives                          its VMM is gone
//! Creating     removed: nobody has heard of it        removed
//! Ready        adopted                                not ready, containers exited 137
//! Stopping     stopped                                stopped
//! NotReady     (has none)                             kept
//! ```
//! Then what belongs to no pod is removed: directories, networks, leases.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use bulkhead_host::Files;
use bulkhead_text::chain;

use super::owner::Owner;
use super::record::{ContainerRecord, Held, PodRecord};
use super::state::PodState;
use super::{PodError, Pods, Shared};
use crate::clock::now;
use crate::store::{Kind, StoreError};

impl Pods {
    /// Takes over what the store knows, and cleans up what nobody knows.
    pub async fn adopt(&self) -> Result<(), StoreError> {
        let pods: Vec<PodRecord> = self.load(Kind::Pod)?;
        let mut containers: BTreeMap<String, BTreeMap<String, ContainerRecord>> = BTreeMap::new();
        for container in self.load::<ContainerRecord>(Kind::Container)? {
            let of_pod = containers.entry(container.pod_id.clone()).or_default();
            of_pod.insert(container.id.clone(), container);
        }
        self.sweep_leases(&containers);
        self.sweep_directories(&pods);
        for pod in pods {
            let containers = containers.remove(&pod.id).unwrap_or_default();
            self.shared.adopt_pod(pod, containers).await;
        }
        for orphan in containers.into_values().flat_map(BTreeMap::into_keys) {
            tracing::warn!(
                container = orphan,
                "a container without a pod; forgetting it"
            );
            self.host().store.remove(Kind::Container, &orphan)?;
        }
        self.sweep_networks().await;
        Ok(())
    }

    /// Records that cannot be read are left where they are, and said.
    fn load<T: serde::de::DeserializeOwned>(&self, kind: Kind) -> Result<Vec<T>, StoreError> {
        let rows = self.host().store.load(kind)?;
        let readable = rows.into_iter().filter_map(|row| match row {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::error!("{}", chain(&error));
                None
            }
        });
        Ok(readable.collect())
    }

    fn sweep_leases(&self, containers: &BTreeMap<String, BTreeMap<String, ContainerRecord>>) {
        let known: HashSet<&String> = containers.values().flat_map(BTreeMap::keys).collect();
        let images = &self.host().images;
        let holders = match images.holders() {
            Ok(holders) => holders,
            Err(error) => return tracing::error!("list image leases: {}", chain(&error)),
        };
        for holder in holders.iter().filter(|holder| !known.contains(holder)) {
            if let Err(error) = images.release(holder) {
                tracing::warn!("{}", chain(&error));
            }
        }
    }

    fn sweep_directories(&self, pods: &[PodRecord]) {
        let held = pods.iter().flat_map(|pod| &pod.held);
        let known: HashSet<&Path> = held
            .filter_map(|held| match held {
                Held::RunDirectory(path) | Held::StateDirectory(path) => Some(path.as_path()),
                _ => None,
            })
            .collect();
        for parent in [&self.host().run_pods, &self.host().state_pods] {
            let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
            for path in entries.map(|entry| entry.path()) {
                if known.contains(path.as_path()) {
                    continue;
                }
                tracing::warn!("{} belongs to no pod; removing it", path.display());
                if let Err(e) = std::fs::remove_dir_all(&path) {
                    tracing::warn!("remove {}: {e}", path.display());
                }
            }
        }
    }

    async fn sweep_networks(&self) {
        let views = self.all();
        let live = views.iter().filter_map(|view| {
            let record = view.pod.network()?;
            Some((view.pod.id.clone(), record.clone()))
        });
        let (ids, records): (HashSet<_>, Vec<_>) = live.unzip();
        let network = &self.host().network;
        network.sweep(&ids).await;
        tokio::spawn(network.garbage_collection(records).await);
    }
}

impl Shared {
    async fn adopt_pod(
        self: &Arc<Self>,
        pod: PodRecord,
        containers: BTreeMap<String, ContainerRecord>,
    ) {
        if let Err(error) = self.reserve(&pod) {
            tracing::error!("{}", chain(&error));
        }
        let state = pod.state.clone();
        let mut owner = Owner::new(Arc::clone(self), pod, containers);
        let done = match state {
            PodState::Creating => match owner.remove_pod().await {
                Ok(()) => return,
                error => error,
            },
            PodState::Ready => {
                owner.adopt_guest().await;
                Ok(())
            }
            PodState::Stopping => owner.stop_pod().await,
            PodState::NotReady { .. } => owner.release_vm().await.map_err(PodError::from),
        };
        if let Err(error) = done {
            owner.complain("clean up after an earlier daemon", &error);
        }
        tokio::spawn(owner.run());
    }
}

impl Owner {
    /// Asks CNI in the background whether the network is as it was.
    fn check_network(&self) {
        let Some(record) = self.pod.network().cloned() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let _one = shared.host.admission.check().await;
            shared.host.network.check(&record).await;
        });
    }

    /// Finds the VM of a pod that was ready, or takes note of its end.
    async fn adopt_guest(&mut self) {
        let files = self.pod.run_directory().cloned().map(Files::new);
        let found = match (self.pod.vmm(), &files) {
            (Some(identity), Some(files)) => {
                self.shared.host.launcher.adopt(files.clone(), identity)
            }
            _ => Ok(None),
        };
        match found {
            Ok(Some(guest)) => {
                tracing::info!(
                    pod = self.pod.id,
                    pid = guest.process.identity().pid,
                    "adopted"
                );
                self.follow_logs(&guest);
                self.follow_mirrors(&guest);
                self.adopt_file_server(Arc::clone(&guest.process));
                let agent = guest.agent.clone();
                tokio::spawn(async move { agent.set_clock(now()).await });
                self.check_network();
                self.serve_guest(guest);
            }
            missing => {
                if let Err(error) = missing {
                    self.complain("adopt", &error);
                }
                let obituary = files.map(|files| files.obituary());
                let cause = obituary.unwrap_or_else(|| "its VM is gone".to_owned());
                tracing::warn!(pod = self.pod.id, "lost while no daemon ran: {cause}");
                self.lose(&cause);
                if let Err(error) = self.release_vm().await {
                    self.complain("give back what the VM had", &error);
                }
            }
        }
    }
}
