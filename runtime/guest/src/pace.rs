// SPDX-License-Identifier: Apache-2.0
//! Slows down what comes from a guest, or leaves it out: a rate that it may keep for ever, and a burst above it.

use std::time::{Duration, Instant};

/// How much was taken lately.
#[derive(Debug)]
pub struct Pace {
    per_second: u64,
    burst: u64,
    /// When all that was taken so far is paid for at the rate.
    paid: Instant,
}

impl Pace {
    /// A rate of zero means no limit.
    #[must_use]
    pub fn new(per_second: u64, burst: u64) -> Self {
        Self {
            per_second,
            burst,
            paid: Instant::now(),
        }
    }

    /// Counts `amount`. Returns how long to wait before more is taken, which is zero within the burst.
    pub fn take(&mut self, amount: u64) -> Duration {
        self.take_at(amount, Instant::now())
    }

    /// Counts `amount` only if it is within the burst. Returns whether it is.
    pub fn try_take(&mut self, amount: u64) -> bool {
        let before = self.paid;
        let is_within = self.take(amount).is_zero();
        if !is_within {
            self.paid = before;
        }
        is_within
    }

    fn take_at(&mut self, amount: u64, now: Instant) -> Duration {
        let time = |amount: u64| {
            let nanoseconds =
                u128::from(amount) * 1_000_000_000 / u128::from(self.per_second.max(1));
            Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
        };
        if self.per_second == 0 {
            return Duration::ZERO;
        }
        let paid = self.paid.max(now).checked_add(time(amount));
        self.paid = paid.unwrap_or(self.paid);
        let ahead = self.paid.saturating_duration_since(now);
        ahead.saturating_sub(time(self.burst))
    }
}

#[cfg(test)]
impl Pace {
    /// Lets time pass.
    pub(crate) fn skip(&mut self, time: Duration) {
        self.paid = self.paid.checked_sub(time).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_then_the_rate_holds() {
        let mut pace = Pace::new(100, 50);
        let start = Instant::now();
        assert_eq!(pace.take_at(50, start), Duration::ZERO);
        assert_eq!(pace.take_at(1, start), Duration::from_millis(10));
        let later = start + Duration::from_millis(510);
        assert_eq!(pace.take_at(50, later), Duration::ZERO, "paid for again");
        let mut now = later;
        for _ in 0..1000 {
            now += pace.take_at(10, now);
        }
        assert_eq!(now.duration_since(later), Duration::from_secs(100));
    }

    #[test]
    fn a_rate_of_zero_is_no_limit_and_a_great_amount_does_not_overflow() {
        assert_eq!(Pace::new(0, 0).take(u64::MAX), Duration::ZERO);
        assert!(Pace::new(1, 0).take(1 << 60) > Duration::from_secs(1 << 30));
    }

    #[test]
    fn what_is_not_taken_is_not_paid_for() {
        let mut pace = Pace::new(1, 100);
        assert!(pace.try_take(60) && pace.try_take(40));
        for _ in 0..1000 {
            assert!(!pace.try_take(60));
        }
        pace.skip(Duration::from_secs(60));
        assert!(pace.try_take(60) && !pace.try_take(60));
    }
}
