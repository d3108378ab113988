// SPDX-License-Identifier: Apache-2.0
//! How a daemon takes over the pods of the daemon before it. This happens once, before it serves.
//!
//! Each pod gets an owner, which adopts it ([`super::owner`]). What belongs to no pod is removed: VMs and directories
//! ([`super::strays`]), image leases, networks.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use bulkhead_faults::{self as faults, Step};
use bulkhead_text::chain;

use super::life::record::{ContainerRecord, PodRecord};
use super::{Pods, owner};
use crate::store::{Kind, StoreError};

impl Pods {
    /// Takes over the pods in the store, and removes everything that belongs to none of them.
    pub async fn adopt(&self) -> Result<(), StoreError> {
        let (pods, lost_pods) = self.load::<PodRecord>(Kind::Pod)?;
        let mut containers: BTreeMap<String, BTreeMap<String, ContainerRecord>> = BTreeMap::new();
        let (readable, lost_containers) = self.load::<ContainerRecord>(Kind::Container)?;
        for container in readable {
            let of_pod = containers.entry(container.pod_id.clone()).or_default();
            of_pod.insert(container.id.clone(), container);
        }
        faults::before(Step::SweepLeases)?;
        self.sweep_leases(&containers);
        faults::after(Step::SweepLeases)?;
        faults::before(Step::SweepStrays)?;
        self.sweep_strays(&pods).await;
        faults::after(Step::SweepStrays)?;
        // Before a pod of this daemon could take one of them.
        for user in pods.iter().filter_map(PodRecord::user) {
            self.shared.host.users.note(user);
        }
        for pod in pods {
            let containers = containers.remove(&pod.id).unwrap_or_default();
            faults::before(Step::AdoptPod)?;
            owner::adopt(Arc::clone(&self.shared), pod, containers).await;
            faults::after(Step::AdoptPod)?;
        }
        for orphan in containers.into_values().flat_map(BTreeMap::into_keys) {
            tracing::warn!(
                container = orphan,
                "the record of a container has no pod; removing it"
            );
            if let Err(error) = self.shared.host.images.release(&orphan) {
                tracing::warn!("{}", chain(&error));
            }
            self.forget(Kind::Container, &orphan);
        }
        faults::before(Step::SweepNetworks)?;
        self.sweep_networks().await;
        faults::after(Step::SweepNetworks)?;
        // Last, so that a daemon that ends before finds them again.
        for id in lost_pods {
            self.forget(Kind::Pod, &id);
        }
        for id in lost_containers {
            self.forget(Kind::Container, &id);
        }
        Ok(())
    }

    /// Loads all records of a kind, and the ids of those that cannot be read. What these had is removed as if there was no
    /// record: a pod's VM, directories and network, and a container in its guest.
    fn load<T: serde::de::DeserializeOwned>(
        &self,
        kind: Kind,
    ) -> Result<(Vec<T>, Vec<String>), StoreError> {
        let (mut readable, mut lost) = (Vec::new(), Vec::new());
        for (id, row) in self.shared.host.store.load(kind)? {
            match row {
                Ok(record) => readable.push(record),
                Err(error) => {
                    tracing::error!("{}; what it had is removed", chain(&error));
                    lost.push(id);
                }
            }
        }
        Ok((readable, lost))
    }

    /// Removes a record that is of no use. If that fails, the next daemon does it.
    fn forget(&self, kind: Kind, id: &str) {
        if let Err(error) = self.shared.host.store.remove(kind, id) {
            tracing::warn!("{}", chain(&error));
        }
    }

    /// Releases image leases of containers that no longer exist.
    fn sweep_leases(&self, containers: &BTreeMap<String, BTreeMap<String, ContainerRecord>>) {
        let known: HashSet<&String> = containers.values().flat_map(BTreeMap::keys).collect();
        let images = &self.shared.host.images;
        let holders = images.holders();
        for holder in holders.iter().filter(|holder| !known.contains(holder)) {
            if let Err(error) = images.release(holder) {
                tracing::warn!("{}", chain(&error));
            }
        }
    }

    /// Tears down networks that belong to no pod, and starts garbage collection in the background.
    async fn sweep_networks(&self) {
        let views = self.shared.registry.views();
        let live: Vec<_> = views
            .iter()
            .filter_map(|view| view.pod.network().cloned())
            .collect();
        let network = &self.shared.host.network;
        network.sweep(&live).await;
        tokio::spawn(network.garbage_collection(live).await);
    }
}
