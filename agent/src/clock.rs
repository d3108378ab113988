// SPDX-License-Identifier: Apache-2.0
//! The guest's wall clock. The daemon says when to correct it and by how much; the kernel's NTP code does the rest: it
//! adds a small correction bit by bit, and learns from several of them how fast the clock runs wrong.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, Timespec, clock_settime};

use crate::sys;

const NANOSECONDS_PER_SECOND: i64 = 1_000_000_000;
/// The most that the kernel corrects bit by bit (`MAXPHASE` in linux/timex.h).
const MOST_NANOSECONDS: i64 = NANOSECONDS_PER_SECOND / 2;
/// The kernel's time constant for corrections that are 16 seconds apart. Each doubling of the time adds one.
const SHORTEST_INTERVAL_LOG2: u32 = 4;
/// `MAXTC` in linux/timex.h.
const MOST_CONSTANT: u32 = 10;

#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct ClockError {
    what: &'static str,
    source: io::Error,
}

/// What the clock shows, in nanoseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(i64::MAX)
}

/// Sets the clock. Zero means that the time is not known.
pub fn set(unix_nanoseconds: i64) -> Result<(), ClockError> {
    if unix_nanoseconds == 0 {
        return Ok(());
    }
    let (tv_sec, tv_nsec) = split(unix_nanoseconds);
    clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec }).map_err(|e| ClockError {
        what: "set the clock",
        source: e.into(),
    })
}

/// Adds to the clock at once.
pub fn step(add_nanoseconds: i64) -> Result<(), ClockError> {
    sys::step_clock(split(add_nanoseconds)).map_err(|source| ClockError {
        what: "add to the clock",
        source,
    })?;
    // What the kernel was still correcting was for the clock as it was.
    correct(0, 0)
}

/// Makes the clock run faster or slower until it has made up for `add_nanoseconds`. The next correction comes after
/// `interval_seconds`.
pub fn correct(add_nanoseconds: i64, interval_seconds: u32) -> Result<(), ClockError> {
    let add = add_nanoseconds.clamp(-MOST_NANOSECONDS, MOST_NANOSECONDS);
    sys::correct_clock(add, constant(interval_seconds)).map_err(|source| ClockError {
        what: "correct the clock",
        source,
    })
}

/// The kernel's time constant for corrections so far apart.
fn constant(interval_seconds: u32) -> u32 {
    let log2 = interval_seconds.checked_ilog2().unwrap_or_default();
    log2.saturating_sub(SHORTEST_INTERVAL_LOG2)
        .min(MOST_CONSTANT)
}

/// Whole seconds, which may be negative, and nanoseconds, which are not.
fn split(nanoseconds: i64) -> (i64, i64) {
    (
        nanoseconds.div_euclid(NANOSECONDS_PER_SECOND),
        nanoseconds.rem_euclid(NANOSECONDS_PER_SECOND),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_now_have_nanoseconds_that_are_not_negative() {
        assert_eq!(split(1_500_000_000), (1, 500_000_000));
        assert_eq!(split(-1_500_000_000), (-2, 500_000_000));
        assert_eq!(split(-1), (-1, 999_999_999));
    }

    #[test]
    fn the_kernel_corrects_more_slowly_when_the_next_correction_comes_later() {
        let of = [0, 1, 16, 31, 64, 256, 2048, u32::MAX].map(constant);
        assert_eq!(of, [0, 0, 0, 0, 2, 4, 7, 10]);
    }
}
