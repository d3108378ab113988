// SPDX-License-Identifier: Apache-2.0
//! Waiting for what nobody tells a test: looks again and again, for a bounded time.
//!
//! `what` completes the sentence "waited until ...". A look returns what it found, or else says what it saw instead.
//! When the time is up, the error says what was awaited and what was seen last.

use std::fmt::{self, Debug};
use std::time::{Duration, Instant};

/// How long a test waits for anything before it fails. Long, because an emulated host takes seconds to boot a pod.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// The shortest and the longest pause between two looks.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// What was awaited has not come in time.
#[derive(Debug)]
pub struct Late {
    what: String,
    patience: Duration,
    /// What the last look saw.
    pub seen: String,
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            patience,
            seen,
        } = self;
        write!(f, "waited {patience:?} until {what}, in vain; seen: {seen}")
    }
}

impl std::error::Error for Late {}

/// Waits with a test's usual patience. Fails the test when the time is up.
pub async fn until<T>(what: &str, look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let found = try_until(what, PATIENCE, look).await;
    found.unwrap_or_else(|late| panic!("{late}"))
}

/// Waits for at most `patience`. A look that does not end is cancelled then.
pub async fn try_until<T>(
    what: &str,
    patience: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> Result<T, Late> {
    let mut wait = Wait::new(what, patience);
    while let Some(left) = wait.left() {
        match tokio::time::timeout(left, look()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(seen)) => tokio::time::sleep(wait.pause(seen)).await,
            Err(_) => break,
        }
    }
    Err(wait.late)
}

/// [`try_until`] for tests without asynchronous code. Nothing ends a look that hangs.
pub fn try_until_blocking<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T, Late> {
    let mut wait = Wait::new(what, patience);
    while wait.left().is_some() {
        match look() {
            Ok(found) => return Ok(found),
            Err(seen) => std::thread::sleep(wait.pause(seen)),
        }
    }
    Err(wait.late)
}

/// The result of a look that asks for no more than whether something `is_so`, and has `seen` this.
pub fn whether(is_so: bool, seen: impl Debug) -> Result<(), String> {
    if is_so {
        Ok(())
    } else {
        Err(format!("{seen:?}"))
    }
}

/// The clock of one wait. A helper that also runs in spawned tasks loops with it by itself, because the compiler cannot
/// tell that a future with an asynchronous closure is [`Send`].
#[derive(Debug)]
pub struct Wait {
    started: Instant,
    /// When the present look began.
    looking: Instant,
    late: Late,
}

impl Wait {
    /// Starts to wait with a test's usual patience.
    pub fn until(what: &str) -> Self {
        Self::new(what, PATIENCE)
    }

    fn new(what: &str, patience: Duration) -> Self {
        let now = Instant::now();
        Self {
            started: now,
            looking: now,
            late: Late {
                what: what.to_owned(),
                patience,
                seen: "nothing, the first look did not end".to_owned(),
            },
        }
    }

    /// Call this after a look in vain: waits for the next one. Fails the test when the time is up.
    pub async fn again(&mut self, seen: String) {
        let pause = self.pause(seen);
        assert!(self.left().is_some(), "{}", self.late);
        tokio::time::sleep(pause).await;
    }

    /// The time that is left, if any.
    fn left(&self) -> Option<Duration> {
        let left = self.late.patience.checked_sub(self.started.elapsed());
        left.filter(|left| !left.is_zero())
    }

    /// Returns how long to pause after a look in vain. Looking takes CPU that a busy host needs for what is awaited, so
    /// the pause is longer than the look was.
    fn pause(&mut self, seen: String) -> Duration {
        self.late.seen = seen;
        let [shortest, longest] = PAUSES;
        let pause = (self.looking.elapsed() * 4).clamp(shortest, longest);
        self.looking = Instant::now() + pause;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(120);

    #[tokio::test]
    async fn what_a_later_look_finds_is_returned() {
        let mut looks = 0;
        let found = until("the third look", async || {
            looks += 1;
            whether(looks == 3, looks).map(|()| looks)
        });
        assert_eq!(found.await, 3);
    }

    #[tokio::test]
    async fn an_error_names_what_was_awaited_and_what_was_seen_last() {
        let mut looks = 0;
        let late = try_until("it rains", SHORT, async || {
            looks += 1;
            whether(false, format!("sun {looks}"))
        });
        let late = late.await.expect_err("it never rains").to_string();
        assert!(looks > 1, "{looks} looks");
        let expected = format!("waited 120ms until it rains, in vain; seen: \"sun {looks}\"");
        assert_eq!(late, expected);

        let late = try_until_blocking("it rains", SHORT, || whether(false, 7));
        assert_eq!(late.expect_err("it never rains").seen, "7");
    }

    #[tokio::test]
    #[should_panic(expected = "waited 120ms until it rains, in vain; seen: sun")]
    async fn a_loop_of_its_own_fails_when_the_time_is_up() {
        let mut wait = Wait::new("it rains", SHORT);
        loop {
            wait.again("sun".to_owned()).await;
        }
    }

    #[tokio::test]
    async fn a_look_that_does_not_end_is_cancelled() {
        let late = try_until::<()>("a reply comes", SHORT, std::future::pending);
        let late = late.await.expect_err("no look ends");
        assert!(late.seen.contains("first look did not end"), "{late}");
    }
}
