// SPDX-License-Identifier: Apache-2.0
//! How long something in the guest may take. The limit does not count the time in which the host ran something else
//! instead of the guest's CPUs, because a pod may get little CPU time without anything in it being stuck.

use std::fs;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, timeout};

/// The unit of /proc/stat, `USER_HZ`: 100 a second on x86-64.
const TICK: Duration = Duration::from_millis(10);
/// The field of a CPU's line in which the host's kernel tells how long this CPU waited for one of the host.
const STEAL: usize = 8;
/// How long to wait before the first look, and the least time between two.
const STEP: Duration = Duration::from_secs(1);

/// A limit for the time that counts, and one for all time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub own: Duration,
    pub longest: Duration,
}

impl Limits {
    /// Waits for `work`. If it took too long, the error is how long.
    pub async fn wait<T>(self, work: impl Future<Output = T>) -> Result<T, Duration> {
        let mut work = pin!(work);
        let started = Instant::now();
        // Most work ends in this time, and then nothing has to be read.
        if let Ok(done) = timeout(STEP, &mut work).await {
            return Ok(done);
        }
        let before = stolen();
        loop {
            let passed = started.elapsed();
            let Some(time) = self.left(passed, longest_wait(&before, &stolen())) else {
                return Err(passed);
            };
            if let Ok(done) = timeout(time, &mut work).await {
                return Ok(done);
            }
        }
    }

    /// How long to wait until the next look, after so much time of which the guest's CPUs were without one of the host.
    /// Nothing if a limit is reached.
    fn left(self, passed: Duration, stolen: Duration) -> Option<Duration> {
        let own = self.own.checked_sub(passed.saturating_sub(stolen))?;
        let longest = self.longest.checked_sub(passed)?;
        let left = own.min(longest);
        (!left.is_zero()).then(|| left.max(STEP))
    }
}

/// How long each CPU was without one of the host so far. Empty if the kernel does not tell.
fn stolen() -> Vec<Duration> {
    parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
}

/// Parses the lines of single CPUs: `cpu0`, then numbers of ticks.
fn parse(text: &str) -> Vec<Duration> {
    let cpus = text
        .lines()
        .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "));
    cpus.map(|line| {
        let field = line.split_ascii_whitespace().nth(STEAL);
        let ticks = field.and_then(|field| field.parse().ok()).unwrap_or(0);
        TICK.saturating_mul(ticks)
    })
    .collect()
}

/// The time of the CPU that was without one of the host for longest: the work may have been on that one.
fn longest_wait(before: &[Duration], now: &[Duration]) -> Duration {
    let waits = before
        .iter()
        .zip(now)
        .map(|(before, now)| now.saturating_sub(*before));
    waits.max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        own: Duration::from_secs(60),
        longest: Duration::from_secs(105),
    };

    fn left(passed: u64, stolen: u64) -> Option<u64> {
        let [passed, stolen] = [passed, stolen].map(Duration::from_secs);
        LIMITS.left(passed, stolen).map(|left| left.as_secs())
    }

    #[test]
    fn time_without_a_cpu_of_the_host_does_not_count() {
        assert_eq!(left(60, 0), None);
        assert_eq!(left(60, 20), Some(20));
        assert_eq!(left(80, 20), None);
        assert_eq!(left(60, 60), Some(45));
        assert_eq!(left(105, 100), None);
        assert_eq!(left(200, 200), None);
        // The clock of the host and that of the guest may differ a little.
        assert_eq!(left(60, 70), Some(45));
    }

    #[test]
    fn stolen_time_is_that_of_the_cpu_which_waited_longest() {
        let text = "cpu  10 0 10 500 0 0 0 700 0 0\ncpu0 5 0 5 250 0 0 0 300 0 0\ncpu1 5 0 5 250 0 0 0 400 0 0\nintr 7\n";
        let found = parse(text);
        assert_eq!(found, [3, 4].map(Duration::from_secs));
        let before = [1, 3].map(Duration::from_secs);
        assert_eq!(longest_wait(&before, &found), Duration::from_secs(2));
        // A CPU that came later counts from its next look on.
        assert_eq!(longest_wait(&before[..1], &found), Duration::from_secs(2));
        assert_eq!(parse("cpu 1 2\ncpu0\ncpu1 x"), [Duration::ZERO; 2]);
        assert_eq!(longest_wait(&[], &found), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_is_given_up() {
        let limits = Limits {
            own: Duration::from_secs(2),
            longest: Duration::from_secs(4),
        };
        assert_eq!(limits.wait(async { 7 }).await, Ok(7));
        let never = limits.wait(std::future::pending::<()>());
        let passed = never.await.expect_err("a limit");
        assert!(
            (limits.own..=limits.longest).contains(&passed),
            "{passed:?}"
        );
    }
}
