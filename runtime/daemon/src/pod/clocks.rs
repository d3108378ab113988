// SPDX-License-Identifier: Apache-2.0
//! Keeps a guest's clock with the host's: one task for each guest, as long as its VM lives.
//!
//! The clocks are compared when the daemon has the guest, then after pauses that double, and at once when the host's
//! clock was set or its rate has changed ([`bulkhead_host::clock`]). A comparison is a few small calls. Between them
//! the guest's kernel corrects the rate of its clock by what it has learned.

use std::time::Duration;

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::clock::{Correction, Occasion};
use bulkhead_host::Guest;
use bulkhead_host::clock::Changes;
use bulkhead_text::chain;
use tokio::sync::watch;

use crate::clock::now;
use crate::random::random;

/// The pause before the first comparison, so that it does not slow down the start of the first containers: the guest
/// was given the time when it was configured. Also the pause after the clock was set.
const SETTLING: Duration = Duration::from_secs(2);
/// The first pause between comparisons, and the longest.
const SHORTEST: Duration = Duration::from_secs(64);
const LONGEST: Duration = Duration::from_secs(256);
/// The pause before a guest is asked again that did not answer, or not quickly enough.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_LONGEST: Duration = Duration::from_secs(30);

/// Keeps the clock of `guest` right until its VM ends. `host` tells of changes of the host's clock.
pub async fn keep(guest: Guest, host: watch::Receiver<Changes>) {
    tokio::select! {
        () = guest.process.ended() => {}
        () = Keeper::new(&guest, host).run() => {}
    }
}

struct Keeper<'a> {
    guest: &'a Guest,
    /// The beginning of the pod's id.
    name: String,
    host: watch::Receiver<Changes>,
    /// The changes that were heard of, and those that the guest's clock has followed.
    heard: Changes,
    followed: Changes,
    pause: Pause,
}

/// What came of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    /// The clock was set. The next comparison says how well.
    Set,
    /// Nothing can be said yet.
    Unclear,
}

impl<'a> Keeper<'a> {
    fn new(guest: &'a Guest, host: watch::Receiver<Changes>) -> Self {
        let heard = *host.borrow();
        Self {
            guest,
            name: guest.files.name(),
            host,
            heard,
            followed: heard,
            pause: Pause::default(),
        }
    }

    async fn run(mut self) {
        let mut pause = SETTLING;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = self.host.changed() => if changed.is_err() {
                    return;
                }
            }
            let changes = *self.host.borrow_and_update();
            if changes != self.heard {
                self.heard = changes;
                self.pause.restart();
            }
            let occasion = match changes.steps == self.followed.steps {
                true => Occasion::Regular,
                false => Occasion::Step,
            };
            pause = match self.compare(occasion).await {
                Ok(outcome) => {
                    if outcome != Outcome::Unclear {
                        self.followed = changes;
                    }
                    self.pause.after(outcome)
                }
                Err(error) => {
                    tracing::debug!(pod = self.name, "compare clocks: {}", chain(&error));
                    self.pause.after(Outcome::Unclear)
                }
            };
        }
    }

    async fn compare(&self, occasion: Occasion) -> Result<Outcome, AgentError> {
        let agent = &self.guest.agent;
        let found = match agent.compare_clocks(now).await {
            // The agent of an earlier version can only be told the time, which makes the clock jump a little.
            Err(error) if error.is_unknown_call() => {
                if occasion == Occasion::Step || self.pause.length == SHORTEST {
                    agent.set_clock(now()).await?;
                }
                return Ok(Outcome::Good);
            }
            found => found?,
        };
        let Some(found) = found else {
            return Ok(Outcome::Unclear);
        };
        let how = found.correction(occasion);
        tracing::debug!(
            pod = self.name,
            behind_us = found.behind_nanoseconds / 1000,
            uncertain_us = found.uncertain_nanoseconds / 1000,
            ?occasion,
            correction = ?how,
            "compared clocks"
        );
        let Some(how) = how else {
            return Ok(Outcome::Unclear);
        };
        agent.correct_clock(found, how, self.pause.length).await?;
        Ok(match how {
            Correction::AtOnce => Outcome::Set,
            Correction::BitByBit => Outcome::Good,
        })
    }
}

/// How long to wait for the next comparison. Pure, but for the dice.
#[derive(Debug)]
struct Pause {
    /// The pause after a comparison that was good.
    length: Duration,
    /// The next pause after the clock was set. It doubles, because a guest may say that its clock is wrong each time.
    settle: Duration,
    again: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self {
            length: SHORTEST,
            settle: SETTLING,
            again: AGAIN,
        }
    }
}

impl Pause {
    fn restart(&mut self) {
        *self = Self::default();
    }

    fn after(&mut self, outcome: Outcome) -> Duration {
        match outcome {
            Outcome::Good => {
                let length = self.length;
                self.length = length.saturating_mul(2).min(LONGEST);
                (self.settle, self.again) = (SETTLING, AGAIN);
                // After a step all guests are compared at once. They need not go on so.
                length.saturating_sub(length.saturating_mul(random::<1>()[0].into()) / 2048)
            }
            Outcome::Set => {
                let settle = self.settle;
                self.length = SHORTEST;
                self.settle = settle.saturating_mul(2).min(LONGEST);
                settle
            }
            Outcome::Unclear => {
                let again = self.again;
                self.again = again.saturating_mul(2).min(AGAIN_LONGEST);
                again
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_compared_every_few_minutes_and_more_often_after_a_change() {
        let mut pause = Pause::default();
        let mut seconds = |outcome| pause.after(outcome).as_secs_f64().round();
        for most in [64.0, 128.0, 256.0, 256.0] {
            let one = seconds(Outcome::Good);
            assert!(one > most * 0.85 && one <= most, "{one} of {most}");
        }
        assert_eq!(seconds(Outcome::Set), 2.0);
        assert!(seconds(Outcome::Good) <= 64.0);
    }

    #[test]
    fn a_guest_that_says_it_is_wrong_each_time_is_asked_less_and_less_often() {
        let mut pause = Pause::default();
        let seconds: Vec<_> = (0..9)
            .map(|_| pause.after(Outcome::Set).as_secs())
            .collect();
        assert_eq!(seconds, [2, 4, 8, 16, 32, 64, 128, 256, 256]);
        pause.restart();
        assert_eq!(pause.after(Outcome::Set), SETTLING);
    }

    #[test]
    fn a_guest_that_does_not_answer_is_asked_less_and_less_often() {
        let mut pause = Pause::default();
        let seconds: Vec<_> = (0..8)
            .map(|_| pause.after(Outcome::Unclear).as_secs())
            .collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
        pause.after(Outcome::Good);
        assert_eq!(pause.after(Outcome::Unclear).as_secs(), 1);
    }
}
