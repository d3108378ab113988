// SPDX-License-Identifier: Apache-2.0
//! Notices that the host's wall clock was set, or that it no longer runs as fast as before.
//!
//! Guests keep time by the counter of the CPU, as the host does. So their clocks go on as they were when the host's is
//! set or slewed, and have to be told. One task looks, for all guests: the kernel wakes it when the clock was set (a
//! timer with `TFD_TIMER_CANCEL_ON_SET`), also by a resume from suspend, and every [`TICK`] it compares the wall clock
//! with the one that is never corrected.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::sys;

const TICK: Duration = Duration::from_secs(10);
/// How far the wall clock may go astray from what was expected of it before guests are told.
const MOST_ASTRAY_NANOSECONDS: i64 = 2_000_000;
/// By which part the usual rate moves to the present one with each tick.
const SMOOTHING: i64 = 8;
const BILLION: i64 = 1_000_000_000;

/// What has happened to the host's clock since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// How often it was set.
    pub steps: u64,
    /// How often it was found to run faster or slower than before.
    pub strays: u64,
}

/// Tells of changes of the host's clock.
#[derive(Debug)]
pub struct HostClock(watch::Receiver<Changes>);

impl HostClock {
    /// Starts the task that looks. Call it in a tokio runtime. Without it guests are compared from time to time only.
    pub fn start() -> Self {
        let (sender, receiver) = watch::channel(Changes::default());
        tokio::spawn(async move {
            if let Err(e) = look(&sender).await {
                tracing::error!(
                    "cannot notice that the host's clock is set; pods follow it within minutes: {e}"
                );
            }
            // Those who listen must not think that nobody tells them any more.
            sender.closed().await;
        });
        Self(receiver)
    }

    /// The changes, from now on.
    pub fn changes(&self) -> watch::Receiver<Changes> {
        let mut changes = self.0.clone();
        changes.mark_unchanged();
        changes
    }
}

async fn look(sender: &watch::Sender<Changes>) -> io::Result<()> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = sys::register(timerfd_create(TimerfdClockId::Realtime, flags)?)?;
    let mut rate = Rate::default();
    loop {
        match tick(&timer).await? {
            Tick::Set => {
                rate = Rate::default();
                sender.send_modify(|changes| changes.steps += 1);
            }
            Tick::Passed => {
                if rate.is_astray(read(ClockId::MonotonicRaw), read(ClockId::Realtime)) {
                    sender.send_modify(|changes| changes.strays += 1);
                }
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tick {
    Passed,
    /// The clock was set.
    Set,
}

/// Waits until [`TICK`] has passed or the clock is set.
async fn tick(timer: &AsyncFd<OwnedFd>) -> io::Result<Tick> {
    let now = clock_gettime(ClockId::Realtime);
    let at = Itimerspec {
        it_interval: Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: Timespec {
            tv_sec: now.tv_sec.saturating_add_unsigned(TICK.as_secs()),
            tv_nsec: now.tv_nsec,
        },
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    match timerfd_settime(timer.as_fd(), flags, &at) {
        // The clock was set since the timer was set last.
        Err(Errno::CANCELED) => return Ok(Tick::Set),
        set => set?,
    };
    loop {
        let mut ready = timer.readable().await?;
        match rustix::io::read(timer.as_fd(), &mut [0; 8]) {
            Ok(_) => return Ok(Tick::Passed),
            Err(Errno::CANCELED) => return Ok(Tick::Set),
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(e) => return Err(e.into()),
        }
    }
}

fn read(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec
        .saturating_mul(BILLION)
        .saturating_add(time.tv_nsec)
}

/// How fast the wall clock runs, compared with the clock that is never corrected. Pure.
#[derive(Debug, Default)]
struct Rate {
    last: Option<(i64, i64)>,
    /// Nanoseconds that the wall clock gains in a second, as usual.
    usual: i64,
    /// How far it is from where it would be at the usual rate, in nanoseconds.
    astray: i64,
}

impl Rate {
    /// Takes what both clocks show. Returns whether guests, which expect the usual rate, should be told.
    fn is_astray(&mut self, raw: i64, wall: i64) -> bool {
        let Some((last_raw, last_wall)) = self.last.replace((raw, wall)) else {
            return false;
        };
        let passed = raw.saturating_sub(last_raw).max(1);
        let gained = wall.saturating_sub(last_wall).saturating_sub(passed);
        let rate = scale(gained, BILLION, passed);
        let expected = scale(self.usual, passed, BILLION);
        self.astray = self.astray.saturating_add(gained).saturating_sub(expected);
        self.usual = self
            .usual
            .saturating_add(rate.saturating_sub(self.usual) / SMOOTHING);
        let is_astray = self.astray.saturating_abs() > MOST_ASTRAY_NANOSECONDS;
        if is_astray {
            self.astray = 0;
        }
        is_astray
    }
}

/// `value * times / by`, as far as it fits.
fn scale(value: i64, times: i64, by: i64) -> i64 {
    let scaled = i128::from(value) * i128::from(times) / i128::from(by.max(1));
    i64::try_from(scaled).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten seconds for each rate, in nanoseconds that the wall clock gains in a second. Returns when guests are told.
    fn told(rates: impl IntoIterator<Item = i64>) -> Vec<usize> {
        let (mut rate, mut raw, mut wall) = (Rate::default(), 0, 1_700_000_000 * BILLION);
        assert!(!rate.is_astray(raw, wall));
        let mut told = Vec::new();
        for (tick, gain) in rates.into_iter().enumerate() {
            raw += 10 * BILLION;
            wall += 10 * (BILLION + gain);
            if rate.is_astray(raw, wall) {
                told.push(tick);
            }
        }
        told
    }

    #[test]
    fn a_clock_that_runs_a_little_wrong_all_the_time_is_told_of_at_first_only() {
        assert_eq!(told([0; 500]), [0usize; 0]);
        // 40 parts in a million, as between a good and a bad quartz.
        let first = told([40_000; 500]);
        assert!(
            first.len() <= 2 && first.iter().all(|tick| *tick < 50),
            "{first:?}"
        );
    }

    #[test]
    fn a_clock_that_is_slewed_is_told_of_at_once_and_when_that_ends() {
        // As fast as NTP may.
        let slewed = [0; 100].into_iter().chain([500_000; 200]).chain([0; 100]);
        let told = told(slewed);
        assert_eq!(told.first(), Some(&100));
        assert!(told.contains(&300), "{told:?}");
        assert!(told.len() < 60, "{}: {told:?}", told.len());
        assert!(!told.contains(&299) && !told.contains(&399), "{told:?}");
    }

    #[tokio::test]
    async fn the_clock_is_watched_without_being_set() {
        let clock = HostClock::start();
        let mut changes = clock.changes();
        let told = tokio::time::timeout(Duration::from_millis(200), changes.changed()).await;
        assert!(told.is_err(), "nobody has set the clock: {told:?}");
    }
}
