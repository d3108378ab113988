// SPDX-License-Identifier: Apache-2.0
//! Remembers the last state of the network, so that plugins are not asked, and nothing is logged, more often than
//! needed.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bulkhead_text::{Problem, chain};

use crate::cni::{CniError, Conflist};

/// The last result of `STATUS`, and what was logged last.
#[derive(Debug, Default)]
pub struct LastStatus {
    /// Locked while plugins are asked, so that they are asked only once at a time.
    pub said: tokio::sync::Mutex<Option<Said>>,
    logged: Mutex<String>,
}

/// The result of `STATUS` of the plugins of a network.
#[derive(Debug)]
pub struct Said {
    pub at: Instant,
    pub conflist: Conflist,
    pub answer: Result<(), Problem>,
}

impl LastStatus {
    /// Logs the files that are not valid, if they are not the same as the last time.
    pub fn tell_skipped(&self, skipped: &[CniError]) {
        let text = list(skipped);
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if *logged != text {
            if !text.is_empty() {
                tracing::warn!("CNI: skipped {text}");
            }
            *logged = text;
        }
    }
}

/// Lists the files that were skipped, and why, on one line.
pub fn list(errors: &[CniError]) -> String {
    let texts: Vec<_> = errors.iter().map(|error| chain(error)).collect();
    texts.join("; ")
}
