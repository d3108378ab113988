// SPDX-License-Identifier: Apache-2.0
//! The progress of running pulls, for those who watch them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// How far a pull is. Layers that were in the store before count as received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PullProgress {
    /// Bytes as the registry sends them, compressed.
    pub received_bytes: u64,
    /// Zero until the manifest is known.
    pub total_bytes: u64,
}

/// The counters of one pull, to which its tasks add.
#[derive(Debug, Default)]
pub struct Counters {
    received_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Counters {
    pub fn expect(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn receive(&self, bytes: u64) {
        self.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes as not received, because they were wrong.
    pub fn take_back(&self, bytes: u64) {
        self.received_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn read(&self) -> PullProgress {
        PullProgress {
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
        }
    }
}

/// The running pulls by reference. If there are several for one reference, only the latest.
#[derive(Debug, Default)]
pub struct Pulls(Mutex<HashMap<String, Weak<Counters>>>);

impl Pulls {
    /// Registers a pull. It counts as running as long as the counters exist.
    pub fn begin(&self, reference: &str) -> Arc<Counters> {
        let counters = Arc::default();
        let mut pulls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.retain(|_, counters| counters.strong_count() > 0);
        pulls.insert(reference.to_owned(), Arc::downgrade(&counters));
        counters
    }

    pub fn read(&self, reference: &str) -> Option<PullProgress> {
        let pulls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counters = pulls.get(reference)?.upgrade()?;
        Some(counters.read())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pull_is_in_progress_until_it_ends() {
        let pulls = Pulls::default();
        assert_eq!(pulls.read("a"), None);
        let first = pulls.begin("a");
        first.expect(100);
        first.receive(40);
        let expected = PullProgress {
            received_bytes: 40,
            total_bytes: 100,
        };
        assert_eq!(pulls.read("a"), Some(expected));
        let second = pulls.begin("a");
        assert_eq!(pulls.read("a"), Some(PullProgress::default()));
        drop(first);
        assert!(pulls.read("a").is_some());
        drop(second);
        assert_eq!(pulls.read("a"), None);
    }
}
