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
use crate::record::{Found, NetworkRecord, remove_unfinished};
use crate::request::AttachRequest;

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_secs(15);
/// How long the daemon's start waits for teardowns. The rest is done while it serves.
const SWEEP: Duration = Duration::from_secs(10);
/// How long one plugin may take for `GC`, because no pod is attached meanwhile.
const COLLECT: Duration = Duration::from_secs(10);

impl Network {
    /// Tears down the networks of pods that no longer exist, and mends the files of the others.
    pub async fn sweep(&self, live: &[NetworkRecord]) {
        let started = Instant::now();
        remove_unfinished(&self.config.cache_dir);
        let pods: HashSet<&str> = live.iter().map(|record| record.pod_id.as_str()).collect();
        for record in live {
            if let Err(error) = record.mend(&self.config.cache_dir) {
                tracing::error!(pod = record.pod_id, "{}", chain(&error));
            }
        }
        let Found {
            mut records,
            traces,
        } = Found::all_but(&pods, &self.config.cache_dir, &self.config.netns_dir);
        for pod in traces {
            records.push(self.guess(pod).await);
        }
        for record in records {
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

    /// The record of a pod of which only a trace is left: its network as a new one would be made now. Plugins find what
    /// they have made by the pod's id, so that is enough unless the configuration has changed.
    async fn guess(&self, pod_id: String) -> NetworkRecord {
        let request = AttachRequest {
            pod_id,
            ..Default::default()
        };
        let planned = self.plan(request.clone()).await;
        let planned = planned.inspect_err(|error| tracing::warn!("{}", chain(error)));
        let nothing = || NetworkRecord {
            attached: None,
            pod_id: request.pod_id.clone(),
        };
        planned.unwrap_or_else(|_| nothing())
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
