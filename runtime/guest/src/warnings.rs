// SPDX-License-Identifier: Apache-2.0
//! Which warnings about a guest are logged. A guest may cause the same one again and again, and the log is the host's.

use std::time::{Duration, Instant};

/// How many warnings may come at once: what goes wrong in an honest guest is seen as a whole.
const AT_ONCE: u32 = 5;
/// The time between two warnings of a guest that causes more: 60 lines an hour, however many guests' pods a node has.
const EVERY: Duration = Duration::from_secs(60);

/// Lets some warnings through and counts the others.
#[derive(Debug, Default)]
pub struct Warnings {
    /// When all warnings so far are paid for, if each takes [`EVERY`].
    paid: Option<Instant>,
    left_out: u64,
}

impl Warnings {
    /// Whether this warning is to be logged. If so, also how many were left out since the last one.
    pub fn allow(&mut self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&mut self, now: Instant) -> Option<u64> {
        let paid = self.paid.map_or(now, |paid| paid.max(now)) + EVERY;
        if paid.duration_since(now) > EVERY * AT_ONCE {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.paid = Some(paid);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_warnings_are_logged_at_once_then_one_a_minute_with_the_number_of_the_others() {
        let mut warnings = Warnings::default();
        let start = Instant::now();
        let logged = |warnings: &mut Warnings, number: u64, after: Duration| -> Vec<u64> {
            let times = (0..number).map(|_| warnings.allow_at(start + after));
            times.flatten().collect()
        };
        assert_eq!(logged(&mut warnings, 1000, Duration::ZERO), [0; 5]);
        assert_eq!(logged(&mut warnings, 10, EVERY / 2), [0; 0]);
        assert_eq!(logged(&mut warnings, 10, EVERY), [1005]);
        assert_eq!(logged(&mut warnings, 1, EVERY * 2), [9]);
        let rested = EVERY * 100;
        assert_eq!(logged(&mut warnings, 1000, rested), [0; 5]);
    }
}
