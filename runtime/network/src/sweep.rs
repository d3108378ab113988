// SPDX-License-Identifier: Apache-2.0
//! Takes down networks that belong to no pod: what an earlier daemon left, and what a plugin would not take down when a
//! pod could not be made. They are tried again until their plugins agree.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_text::chain;
use serde_json::Value;

use crate::cni::{KnownVersions, Plugins, Selection};
use crate::network::Network;
use crate::record::NetworkRecord;

/// Between two tries.
const PAUSE: Duration = Duration::from_secs(15);
/// How long a daemon's start waits for networks to go; the rest goes on while it serves.
const SWEEP: Duration = Duration::from_secs(10);
/// How long attaching may have to wait for one plugin that collects garbage.
const COLLECT: Duration = Duration::from_secs(10);

impl Network {
    /// Takes down the networks of pods that are no more. Touches only what this daemon recorded.
    pub async fn sweep(&self, live_pods: &HashSet<String>) {
        let started = Instant::now();
        for record in NetworkRecord::all_but(&self.config.cache_dir, live_pods) {
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

    /// Tries leftovers again, for ever.
    pub async fn tidy(&self) {
        loop {
            self.leftovers.wait().await;
            tokio::time::sleep(PAUSE).await;
            for record in self.leftovers.all() {
                match self.detach(&record).await {
                    Ok(()) => {
                        tracing::info!(pod = record.pod_id, "its network is gone at last");
                        self.leftovers.remove(&record.pod_id);
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
