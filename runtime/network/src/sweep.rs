// SPDX-License-Identifier: Apache-2.0
//! Tears down networks that belong to no pod: those that an earlier daemon left, and those whose plugins failed to
//! remove them after a failed boot. They are tried again until that succeeds.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_text::chain;
use serde_json::Value;

use crate::cni::{KnownVersions, Plugins, Selection};
use crate::network::Network;
use crate::record::NetworkRecord;

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_secs(15);
/// How long the daemon's start waits for teardowns. The rest is done while it serves.
const SWEEP: Duration = Duration::from_secs(10);
/// How long one plugin may take for `GC`, because no pod is attached meanwhile.
const COLLECT: Duration = Duration::from_secs(10);

impl Network {
    /// Tears down the networks of pods that no longer exist. Touches only networks with a record.
    pub async fn sweep(&self, live_pods: &HashSet<String>) {
        let started = Instant::now();
        for record in NetworkRecord::all_but(&self.config.cache_dir, live_pods) {
            tracing::info!(
                pod = record.pod_id,
                "the pod no longer exists; tearing down its network"
            );
            let left = SWEEP.saturating_sub(started.elapsed());
            match tokio::time::timeout(left, self.detach(&record)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.leftovers.add(record, &error),
                // Too late: the running plugin was killed when the future was dropped.
                Err(_) => self.leftovers.put(record),
            }
        }
    }

    /// Tries again to tear down leftovers. Runs for ever.
    pub async fn tidy(&self) {
        loop {
            self.leftovers.wait().await;
            tokio::time::sleep(PAUSE).await;
            for record in self.leftovers.all() {
                match self.detach(&record).await {
                    Ok(()) => {
                        tracing::info!(pod = record.pod_id, "tore down its network at last");
                        self.leftovers.remove(&record.pod_id);
                    }
                    Err(error) => {
                        tracing::warn!(
                            pod = record.pod_id,
                            "its network still cannot be torn down: {}",
                            chain(&error)
                        );
                    }
                }
            }
        }
    }

    /// Prepares `GC`, in which plugins may remove everything that belongs to none of `live`. No pod is attached until
    /// the returned future has completed or was dropped.
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
