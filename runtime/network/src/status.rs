// SPDX-License-Identifier: Apache-2.0
//! What is remembered of the network's readiness: plugins are not asked, and nothing is logged, more often than needed.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bulkhead_text::{Problem, chain};

use crate::cni::{CniError, Conflist};

/// What the plugins said last, and what has been logged.
#[derive(Debug, Default)]
pub struct LastStatus {
    /// Held while they are asked, so that they are asked once.
    pub said: tokio::sync::Mutex<Option<Said>>,
    logged: Mutex<String>,
}

/// What the plugins of a network said of themselves.
#[derive(Debug)]
pub struct Said {
    pub at: Instant,
    pub conflist: Conflist,
    pub answer: Result<(), Problem>,
}

impl LastStatus {
    /// Logs files that are not valid, each time that they are others than before.
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

/// Files that were skipped, and why, on one line.
pub fn list(errors: &[CniError]) -> String {
    let texts: Vec<_> = errors.iter().map(|error| chain(error)).collect();
    texts.join("; ")
}
