// SPDX-License-Identifier: Apache-2.0
//! How long a VM may take to boot, or to stop. The limit does not count the time in which the VM had to wait for a CPU.
//!
//! A VM may get little CPU time without being stuck: that of a BestEffort pod is in a cgroup with the lowest weight.
//! The kernel counts for each thread how long it was ready to run and waited for a CPU
//! (`/proc/PID/task/TID/schedstat`). This time is subtracted from the time since the start. The rest is what the boot
//! would have taken on its own CPU. So the same limit applies to a guest that loops for ever and to one that sleeps for
//! ever, but not to one that gets no CPU. For that, only the time limit of the caller applies, which counts all time.
//!
//! A kernel without these counters shows zeros. Then all time counts.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

/// By what factor a boot or stop may take longer if it must share its CPU. It makes kubelet's four minutes for a boot of
/// the default 60 s.
pub const STARVED: u32 = 4;
/// The least time between two checks of a VM's limits.
const STEP: Duration = Duration::from_secs(1);

/// How long the threads of a process have run on the host's CPUs so far, and how long they have waited for one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scheduled {
    pub on_cpu: Duration,
    /// The time in which threads were ready to run but did not run.
    pub waiting: Duration,
}

impl Scheduled {
    /// Reads the counters of a process. All are zero if it has ended.
    pub fn of(pid: i32) -> Self {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
        let files = threads
            .into_iter()
            .flatten()
            .flatten()
            .map(|thread| thread.path().join("schedstat"));
        files
            .filter_map(|file| Self::parse(&std::fs::read_to_string(file).ok()?))
            .fold(Self::default(), Self::and)
    }

    /// Parses schedstat: nanoseconds on a CPU, nanoseconds of waiting for one, and the number of times that it ran.
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split_whitespace().map(str::parse);
        let mut next = || Some(Duration::from_nanos(numbers.next()?.ok()?));
        Some(Self {
            on_cpu: next()?,
            waiting: next()?,
        })
    }

    fn and(self, other: Self) -> Self {
        Self {
            on_cpu: self.on_cpu.saturating_add(other.on_cpu),
            waiting: self.waiting.saturating_add(other.waiting),
        }
    }
}

/// How much time a boot or stop has taken so far. It is shown in the error if that is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// The time since it began.
    pub passed: Duration,
    pub scheduled: Scheduled,
}

impl Spent {
    /// The time that counts. If several threads waited at the same time, their sum may exceed the time that has passed.
    fn counts(&self) -> Duration {
        self.passed.saturating_sub(self.scheduled.waiting)
    }
}

impl fmt::Display for Spent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1?} after its start, of which it ran {:.1?} and waited {:.1?} for a CPU",
            self.passed, self.scheduled.on_cpu, self.scheduled.waiting
        )
    }
}

/// Measures what a VM has had since it was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    pid: i32,
    pub since: Instant,
    before: Scheduled,
}

impl Clock {
    /// What the VM has had up to now does not count.
    pub fn of(pid: i32) -> Self {
        Self {
            before: Scheduled::of(pid),
            ..Self::of_new(pid)
        }
    }

    /// All that the VM has had counts, because its process has just begun.
    pub fn of_new(pid: i32) -> Self {
        Self {
            pid,
            since: Instant::now(),
            before: Scheduled::default(),
        }
    }

    pub fn spent(&self) -> Spent {
        let now = Scheduled::of(self.pid);
        Spent {
            passed: self.since.elapsed(),
            scheduled: Scheduled {
                on_cpu: now.on_cpu.saturating_sub(self.before.on_cpu),
                waiting: now.waiting.saturating_sub(self.before.waiting),
            },
        }
    }
}

/// The limits of one boot.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The limit for the time that counts.
    pub own: Duration,
    /// When the boot is given up in any case.
    pub until: Instant,
}

/// Whether a boot or stop may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may go on. No limit can be reached before so much time has passed since the start.
    GoOn(Duration),
    /// The time that counts has reached its limit.
    Slow,
    /// The caller's time limit is over, though the time that counts is below its limit.
    Late,
}

/// Decides whether a boot or stop may go on. `own` limits the time that counts, and `all` the time since the start.
pub fn judge(spent: &Spent, own: Duration, all: Duration) -> Verdict {
    let counts = spent.counts();
    if counts >= own {
        return Verdict::Slow;
    }
    if spent.passed >= all {
        return Verdict::Late;
    }
    // The time that counts cannot reach its limit sooner.
    let left = own.saturating_sub(counts).max(STEP);
    Verdict::GoOn(spent.passed.saturating_add(left).min(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Duration = Duration::from_secs(60);
    const ALL: Duration = Duration::from_secs(225);

    fn spent(passed: u64, on_cpu: u64, waiting: u64) -> Spent {
        Spent {
            passed: Duration::from_secs(passed),
            scheduled: Scheduled {
                on_cpu: Duration::from_secs(on_cpu),
                waiting: Duration::from_secs(waiting),
            },
        }
    }

    #[test]
    fn only_time_that_a_vm_had_counts() {
        let go_on = |seconds| Verdict::GoOn(Duration::from_secs(seconds));
        for (case, spent, expected) in [
            ("at the start", spent(0, 0, 0), go_on(60)),
            ("loops on a CPU of its own", spent(60, 60, 0), Verdict::Slow),
            ("sleeps for ever", spent(60, 0, 0), Verdict::Slow),
            ("starved from the start", spent(60, 0, 60), go_on(120)),
            (
                "starved, and two threads waited at once",
                spent(60, 1, 90),
                go_on(120),
            ),
            (
                "has half a CPU and needs all of it",
                spent(100, 50, 50),
                go_on(110),
            ),
            (
                "has had its time at last",
                spent(130, 60, 70),
                Verdict::Slow,
            ),
            ("could end any moment", spent(129, 59, 70), go_on(130)),
            (
                "starved till the caller's end",
                spent(225, 5, 215),
                Verdict::Late,
            ),
            (
                "the caller's end comes first",
                spent(200, 5, 190),
                go_on(225),
            ),
        ] {
            assert_eq!(judge(&spent, OWN, ALL), expected, "{case}");
        }
    }

    #[test]
    fn a_kernel_without_counters_has_all_time_count() {
        assert_eq!(Scheduled::parse("0 0 0\n"), Some(Scheduled::default()));
        assert_eq!(judge(&spent(60, 0, 0), OWN, ALL), Verdict::Slow);
    }

    #[test]
    fn counters_are_read_of_all_threads_and_nonsense_is_none() {
        let parsed = Scheduled::parse("1000000 2000000 7\n").unwrap();
        assert_eq!(parsed.on_cpu, Duration::from_millis(1));
        assert_eq!(parsed.waiting, Duration::from_millis(2));
        for text in ["", "1", "x y z", "-1 2 3"] {
            assert_eq!(Scheduled::parse(text), None, "{text:?}");
        }
        let own = i32::try_from(std::process::id()).unwrap();
        let busy = std::time::Instant::now();
        while busy.elapsed() < Duration::from_millis(30) {}
        assert!(Scheduled::of(own).on_cpu > Duration::ZERO);
        assert_eq!(Scheduled::of(0), Scheduled::default());
    }

    #[test]
    fn an_error_says_what_the_vm_had() {
        let text = spent(93, 12, 33).to_string();
        assert_eq!(
            text,
            "93.0s after its start, of which it ran 12.0s and waited 33.0s for a CPU"
        );
    }
}
