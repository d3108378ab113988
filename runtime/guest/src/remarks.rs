// SPDX-License-Identifier: Apache-2.0
//! What the daemon's log says about one guest, and how often.
//!
//! A guest causes lines in the log by what it sends or does not answer, so it could fill the node's journal. All such
//! lines of one guest have one budget, whichever part of the daemon writes them: some at once, and then one in a while.
//! What is left out is counted. The next line that is written says how many there were, and the end of the guest does.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use crate::pace::Pace;

/// How many lines may come at once: a pod with trouble in several volumes and containers is still described.
const BURST_LINES: u64 = 20;
/// Then there is one line in so many seconds, which is 8,640 a day.
const SECONDS_A_LINE: u64 = 10;

/// The lines about one guest. Clones share the budget.
#[derive(Clone, Debug)]
pub struct Remarks(Arc<OfGuest>);

#[derive(Debug)]
struct OfGuest {
    pod: String,
    budget: Mutex<Budget>,
}

#[derive(Debug)]
struct Budget {
    /// In seconds: a line costs [`SECONDS_A_LINE`] of them.
    pace: Pace,
    left_out: u64,
}

impl Remarks {
    /// `pod` stands in each line.
    pub fn new(pod: impl Into<String>) -> Self {
        Self(Arc::new(OfGuest {
            pod: pod.into(),
            budget: Mutex::new(Budget::new()),
        }))
    }

    /// Logs a warning, or counts it if there were too many lately.
    pub fn warn(&self, text: impl Display) {
        let budget = self.0.budget.lock();
        let left_out = budget.unwrap_or_else(PoisonError::into_inner).spend();
        if let Some(left_out) = left_out {
            let left_out = Some(left_out).filter(|count| *count > 0);
            tracing::warn!(pod = self.0.pod, left_out, "{text}");
        }
    }
}

impl Budget {
    fn new() -> Self {
        Self {
            pace: Pace::new(1, BURST_LINES * SECONDS_A_LINE),
            left_out: 0,
        }
    }

    /// Takes a line out of the budget. Returns how many were left out before it; `None` if it is left out, too.
    fn spend(&mut self) -> Option<u64> {
        if self.pace.try_take(SECONDS_A_LINE) {
            return Some(std::mem::take(&mut self.left_out));
        }
        self.left_out = self.left_out.saturating_add(1);
        None
    }
}

impl Drop for OfGuest {
    fn drop(&mut self) {
        let budget = self.budget.get_mut();
        let left_out = budget.unwrap_or_else(PoisonError::into_inner).left_out;
        if left_out > 0 {
            tracing::warn!(
                pod = self.pod,
                left_out,
                "the guest has ended; more was to be said of it"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_causes_many_lines_gets_a_burst_and_the_rest_is_counted() {
        let mut budget = Budget::new();
        for _ in 0..BURST_LINES {
            assert_eq!(budget.spend(), Some(0));
        }
        for _ in 0..100_000 {
            assert_eq!(budget.spend(), None);
        }
        assert_eq!(budget.left_out, 100_000);
        // What was left out is not owed: after a pause for one line, that line comes.
        budget
            .pace
            .skip(std::time::Duration::from_secs(SECONDS_A_LINE));
        assert_eq!(budget.spend(), Some(100_000));
        assert_eq!((budget.spend(), budget.left_out), (None, 1));
    }

    #[test]
    fn clones_share_the_budget() {
        let remarks = Remarks::new("pod");
        let other = remarks.clone();
        for _ in 0..=BURST_LINES {
            other.warn("a line");
        }
        assert_eq!(remarks.0.budget.lock().unwrap().left_out, 1);
    }
}
