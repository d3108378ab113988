// SPDX-License-Identifier: Apache-2.0
//! Networks that could not be torn down and will be tried again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_text::chain;
use tokio::sync::Notify;

use crate::failure::NetworkError;
use crate::record::NetworkRecord;

/// The records of such networks by pod id.
#[derive(Debug, Default)]
pub struct Leftovers {
    records: Mutex<HashMap<String, NetworkRecord>>,
    added: Notify,
}

impl Leftovers {
    pub fn add(&self, record: NetworkRecord, why: &NetworkError) {
        tracing::warn!(
            pod = record.pod_id,
            "cannot tear down its network, will try again: {}",
            chain(why)
        );
        self.put(record);
    }

    pub fn put(&self, record: NetworkRecord) {
        self.records().insert(record.pod_id.clone(), record);
        self.added.notify_one();
    }

    pub fn remove(&self, pod_id: &str) {
        self.records().remove(pod_id);
    }

    /// Waits until there is at least one.
    pub async fn wait(&self) {
        while self.records().is_empty() {
            self.added.notified().await;
        }
    }

    pub fn all(&self) -> Vec<NetworkRecord> {
        self.records().values().cloned().collect()
    }

    fn records(&self) -> MutexGuard<'_, HashMap<String, NetworkRecord>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
