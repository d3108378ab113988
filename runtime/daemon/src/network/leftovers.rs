// SPDX-License-Identifier: Apache-2.0
//! Networks that belong to no pod: what an earlier daemon left, and what a plugin would not take down when a pod
//! could not be made. They are tried again until their plugins agree.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_text::chain;
use serde_json::Value;
use tokio::sync::Notify;

use super::cni::{KnownVersions, Plugins, Selection};
use super::{Network, NetworkError, NetworkRecord};

/// Between two tries.
const PAUSE: Duration = Duration::from_secs(15);
/// How long a daemon's start waits for networks to go; the rest goes on while it serves.
const SWEEP: Duration = Duration::from_secs(10);
/// How long attaching may have to wait for one plugin that collects garbage.
const COLLECT: Duration = Duration::from_secs(10);

/// Networks that wait for another try, by pod id.
#[derive(Debug, Default)]
pub struct Leftovers {
    records: Mutex<HashMap<String, NetworkRecord>>,
    added: Notify,
}

impl Leftovers {
    pub fn add(&self, record: NetworkRecord, why: &NetworkError) {
        tracing::warn!(
            pod = record.pod_id,
            "its network could not be taken down and will be tried again: {}",
            chain(why)
        );
        self.put(record);
    }

    fn put(&self, record: NetworkRecord) {
        self.records().insert(record.pod_id.clone(), record);
        self.added.notify_one();
    }

    fn records(&self) -> MutexGuard<'_, HashMap<String, NetworkRecord>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Network {
    /// Takes down the networks of pods that are no more. Touches only what this daemon recorded.
    pub async fn sweep(&self, live_pods: &HashSet<String>) {
        let started = Instant::now();
        for record in self.records_without(live_pods) {
            tracing::info!(
                pod = record.pod_id,
                "it is no more; taking its network down"
            );
            let left = SWEEP.saturating_sub(started.elapsed());
            match tokio::time::timeout(left, self.detach(&record)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.leftovers.add(record, &error),
                // What it was at has been killed.
                Err(_) => self.leftovers.put(record),
            }
        }
    }

    fn records_without(&self, live_pods: &HashSet<String>) -> Vec<NetworkRecord> {
        let entries = std::fs::read_dir(&self.config.cache_dir);
        let paths = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let records = paths.filter_map(|path| {
            let bytes = std::fs::read(path).ok()?;
            serde_json::from_slice::<NetworkRecord>(&bytes).ok()
        });
        records
            .filter(|record| !live_pods.contains(&record.pod_id))
            .collect()
    }

    /// Tries leftovers again, for ever.
    pub async fn tidy(&self) {
        loop {
            if self.leftovers.records().is_empty() {
                self.leftovers.added.notified().await;
            }
            tokio::time::sleep(PAUSE).await;
            let records: Vec<_> = self.leftovers.records().values().cloned().collect();
            for record in records {
                match self.detach(&record).await {
                    Ok(()) => {
                        tracing::info!(pod = record.pod_id, "its network is gone at last");
                        self.leftovers.records().remove(&record.pod_id);
                    }
                    Err(error) => {
                        tracing::warn!(
                            pod = record.pod_id,
                            "its network still cannot be taken down: {}",
                            chain(&error)
                        );
                    }
                }
            }
        }
    }

    /// Prepares `GC`: plugins may drop all that belongs to none of `live`. Nothing is attached until the returned
    /// future has run or is dropped.
    pub async fn garbage_collection(
        &self,
        live: Vec<NetworkRecord>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let passed = Arc::clone(&self.gate).write_owned().await;
        let config = self.config.clone();
        async move {
            let _passed = passed;
            let selection = Selection::look(&config.conf_dir).unwrap_or_default();
            let Some(mut conflist) = selection.network else {
                return;
            };
            let plugins = Plugins {
                limit: config.plugin_timeout.min(COLLECT),
                ..config.plugins()
            };
            let settled = conflist.settle(&KnownVersions::default(), &plugins).await;
            if let Err(error) = settled {
                return tracing::warn!("CNI: {}", chain(&error));
            }
            let attached = live.iter().filter_map(|record| record.attached.as_ref());
            let same = attached.filter(|one| one.conflist.name == conflist.name);
            let valid: Vec<Value> = same.map(|one| one.invocation.attachment()).collect();
            for error in conflist.collect_garbage(&valid, &plugins).await {
                tracing::warn!("CNI: {}", chain(&error));
            }
        }
    }
}
