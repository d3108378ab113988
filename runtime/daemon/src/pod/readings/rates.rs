// SPDX-License-Identifier: Apache-2.0
//! Calculates the current CPU usage from CPU time counters.
//!
//! The usage is the average between two readings that are at least [`WINDOW`] apart. A reading that comes earlier gets
//! the last result again. The first reading gets the average since the start. Counters never run backwards, even if a
//! guest reports less than before.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// An average over a shorter time tells more about the scheduler than about the workload.
const WINDOW: Duration = Duration::from_secs(1);
const NANOSECONDS: u128 = 1_000_000_000;

/// CPU time of one container or pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuUse {
    pub total_ns: u64,
    /// The current usage, in billionths of a CPU.
    pub nano_cores: u64,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    total_ns: u64,
    nano_cores: u64,
}

/// The last sample of each container and pod.
#[derive(Debug, Default)]
pub struct Rates(Mutex<HashMap<String, Sample>>);

impl Rates {
    /// Records that `id`, which is `age` old, has used `total_ns` until `now`.
    pub fn observe(&self, id: &str, total_ns: u64, age: Duration, now: Instant) -> CpuUse {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = samples.get(id).copied();
        let total_ns = total_ns.max(last.map_or(0, |last| last.total_ns));
        let (before, since) = match last {
            Some(last) => {
                let since = now.saturating_duration_since(last.at);
                if since < WINDOW {
                    return CpuUse {
                        total_ns,
                        nano_cores: last.nano_cores,
                    };
                }
                (last.total_ns, since)
            }
            None => (0, age),
        };
        let nano_cores = rate(total_ns - before, since);
        let sample = Sample {
            at: now,
            total_ns,
            nano_cores,
        };
        samples.insert(id.to_owned(), sample);
        CpuUse {
            total_ns,
            nano_cores,
        }
    }

    /// Forgets all except these.
    pub fn keep(&self, ids: &HashSet<&str>) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        samples.retain(|id, _| ids.contains(id.as_str()));
    }
}

fn rate(used_ns: u64, time: Duration) -> u64 {
    if time.is_zero() {
        return 0;
    }
    u64::try_from(u128::from(used_ns) * NANOSECONDS / time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_rate_is_taken_between_two_questions() {
        let rates = Rates::default();
        let start = Instant::now();
        let ns = |milliseconds: u64| milliseconds * 1_000_000;
        let first = rates.observe("a", ns(2000), 4 * SECOND, start);
        assert_eq!(first.nano_cores, 500_000_000, "the average since the start");
        let soon = rates.observe("a", ns(2100), 4 * SECOND, start + SECOND / 2);
        assert_eq!((soon.nano_cores, soon.total_ns), (500_000_000, ns(2100)));
        let later = rates.observe("a", ns(4000), 5 * SECOND, start + 2 * SECOND);
        assert_eq!(later.nano_cores, 1_000_000_000);
    }

    #[test]
    fn a_counter_does_not_run_backwards() {
        let rates = Rates::default();
        let start = Instant::now();
        rates.observe("a", 5000, SECOND, start);
        let back = rates.observe("a", 1000, SECOND, start + 2 * SECOND);
        assert_eq!((back.total_ns, back.nano_cores), (5000, 0));
        rates.keep(&HashSet::new());
        assert_eq!(rates.observe("a", 1000, SECOND, start).total_ns, 1000);
        assert_eq!(
            rates.observe("b", 1000, Duration::ZERO, start).nano_cores,
            0
        );
    }
}
