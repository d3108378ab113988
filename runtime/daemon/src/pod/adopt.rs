// SPDX-License-Identifier: Apache-2.0
//! How a daemon takes over the pods of the daemon before it. This happens once, before it serves.
//!
//! Each pod gets an owner, which adopts it ([`super::owner`]). What belongs to no pod is removed: image leases,
//! directories, networks.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use bulkhead_text::chain;

use super::life::record::{ContainerRecord, Held, PodRecord};
use super::{Pods, owner};
use crate::store::{Kind, StoreError};

impl Pods {
    /// Takes over the pods in the store, and removes everything that belongs to none of them.
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
            owner::adopt(Arc::clone(&self.shared), pod, containers).await;
        }
        for orphan in containers.into_values().flat_map(BTreeMap::into_keys) {
            tracing::warn!(
                container = orphan,
                "the record of a container has no pod; removing it"
            );
            self.shared.host.store.remove(Kind::Container, &orphan)?;
        }
        self.sweep_networks().await;
        Ok(())
    }

    /// Loads all records of a kind. A record that cannot be read is logged and stays in the store.
    fn load<T: serde::de::DeserializeOwned>(&self, kind: Kind) -> Result<Vec<T>, StoreError> {
        let rows = self.shared.host.store.load(kind)?;
        let readable = rows.into_iter().filter_map(|row| match row {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::error!("{}", chain(&error));
                None
            }
        });
        Ok(readable.collect())
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

    /// Removes run and state directories that no pod holds.
    fn sweep_directories(&self, pods: &[PodRecord]) {
        let held = pods.iter().flat_map(|pod| &pod.held);
        let known: HashSet<&Path> = held
            .filter_map(|held| match held {
                Held::RunDirectory(path) | Held::StateDirectory(path) => Some(path.as_path()),
                _ => None,
            })
            .collect();
        for parent in [&self.shared.host.run_pods, &self.shared.host.state_pods] {
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

    /// Tears down networks that belong to no pod, and starts garbage collection in the background.
    async fn sweep_networks(&self) {
        let views = self.all();
        let live = views.iter().filter_map(|view| {
            let record = view.pod.network()?;
            Some((view.pod.id.clone(), record.clone()))
        });
        let (ids, records): (HashSet<_>, Vec<_>) = live.unzip();
        let network = &self.shared.host.network;
        network.sweep(&ids).await;
        tokio::spawn(network.garbage_collection(records).await);
    }
}
