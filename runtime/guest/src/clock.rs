// SPDX-License-Identifier: Apache-2.0
//! Compares a guest's clock with the host's, and corrects it.
//!
//! The guest is asked for its time a few times. Its answer is of some moment between question and answer, most likely
//! of the middle, and at most half of the time between them away from it. So the quickest answer says most. A guest
//! that lies only gets a wrong clock, which its root could set anyway.

use std::time::{Duration, Instant};

use bulkhead_proto::agent as protocol;

use crate::agent::{Agent, AgentError, SHORT, within};
use crate::news::Clock;

/// How often a guest is asked at most.
const MOST_QUESTIONS: usize = 8;
/// An answer that came within this time is good enough.
const QUICK: Duration = Duration::from_millis(2);
/// The host's own clock was set while an answer was on its way if it differs by more than this from the time that
/// passed.
const SET_MEANWHILE: Duration = Duration::from_millis(1);
/// How far a clock may be wrong before it is set. A smaller error is corrected bit by bit, so that no program sees the
/// time jump.
const MOST_CORRECTED_NANOSECONDS: u64 = 50_000_000;
/// The same after the host's clock was set, which makes the time jump anyway.
const MOST_CORRECTED_AFTER_STEP_NANOSECONDS: u64 = 5_000_000;

/// How a guest's clock compares with the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// How far the guest's clock is behind. Negative if it is ahead.
    pub behind_nanoseconds: i64,
    /// How wrong that may be.
    pub uncertain_nanoseconds: u64,
}

/// What made a comparison necessary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Time has passed.
    Regular,
    /// The host's clock was set.
    Step,
}

/// How to correct a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Correction {
    AtOnce,
    BitByBit,
}

impl Comparison {
    /// What an answer says that came `took` after the question, when the host's `clock` showed `asked` and then
    /// `answered`. `None` if the host's clock was set in between.
    fn of(asked: i64, answered: i64, took: Duration, guest: i64) -> Option<Self> {
        let took = i64::try_from(took.as_nanos()).ok()?;
        let shown = answered.checked_sub(asked)?;
        let slack = i64::try_from(SET_MEANWHILE.as_nanos()).ok()?;
        if shown.abs_diff(took) > slack.unsigned_abs() {
            return None;
        }
        let half = took / 2;
        Some(Self {
            behind_nanoseconds: asked.saturating_add(half).saturating_sub(guest),
            uncertain_nanoseconds: half.unsigned_abs(),
        })
    }

    /// How the clock is to be corrected. `None` if it may be right.
    pub fn correction(&self, occasion: Occasion) -> Option<Correction> {
        let wrong = self.behind_nanoseconds.unsigned_abs();
        let most = match occasion {
            Occasion::Regular => MOST_CORRECTED_NANOSECONDS,
            Occasion::Step => MOST_CORRECTED_AFTER_STEP_NANOSECONDS,
        };
        if wrong > most.max(self.uncertain_nanoseconds) {
            return Some(Correction::AtOnce);
        }
        // A quick answer is used even if the clock is not further away than it is uncertain: the middle is the best
        // guess, and from many guesses the guest's kernel learns how fast its clock is.
        let is_quick = self.uncertain_nanoseconds <= MOST_CORRECTED_AFTER_STEP_NANOSECONDS;
        (is_quick || wrong > self.uncertain_nanoseconds).then_some(Correction::BitByBit)
    }
}

impl Agent {
    /// What the guest's clock shows, in nanoseconds since 1970. It may be anything.
    async fn read_clock(&self) -> Result<i64, AgentError> {
        let mut client = self.client();
        let call = client.read_clock(protocol::ReadClockRequest {});
        let answer = within("ReadClock", SHORT, call).await?;
        Ok(answer.clock_unix_nanoseconds)
    }

    /// Compares the guest's clock with `clock`, the host's.
    pub async fn compare_clocks(&self, clock: Clock) -> Result<Option<Comparison>, AgentError> {
        let mut best: Option<Comparison> = None;
        for _ in 0..MOST_QUESTIONS {
            let (asked, since) = (clock(), Instant::now());
            let guest = self.read_clock().await?;
            let (answered, took) = (clock(), since.elapsed());
            let Some(one) = Comparison::of(asked, answered, took, guest) else {
                continue;
            };
            if best.is_none_or(|best| one.uncertain_nanoseconds < best.uncertain_nanoseconds) {
                best = Some(one);
            }
            if took <= QUICK {
                break;
            }
        }
        Ok(best)
    }

    /// Corrects the guest's clock. The next comparison comes after `interval`.
    pub async fn correct_clock(
        &self,
        found: Comparison,
        how: Correction,
        interval: Duration,
    ) -> Result<(), AgentError> {
        let request = protocol::AdjustClockRequest {
            add_nanoseconds: found.behind_nanoseconds,
            step: how == Correction::AtOnce,
            interval_seconds: u32::try_from(interval.as_secs()).unwrap_or(u32::MAX),
        };
        let mut client = self.client();
        let call = client.adjust_clock(request);
        within("AdjustClock", SHORT, call).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn compare(took_ms: u64, guest_ms: i64) -> Option<Comparison> {
        let (asked, took) = (1000 * MS, Duration::from_millis(took_ms));
        let answered = asked + i64::try_from(took.as_nanos()).unwrap();
        Comparison::of(asked, answered, took, guest_ms * MS)
    }

    #[test]
    fn an_answer_is_of_the_middle_between_question_and_answer() {
        let found = compare(4, 1002).unwrap();
        assert_eq!(found.behind_nanoseconds, 0);
        assert_eq!(found.uncertain_nanoseconds, 2_000_000);
        assert_eq!(compare(4, 992).unwrap().behind_nanoseconds, 10 * MS);
        assert_eq!(compare(4, 1012).unwrap().behind_nanoseconds, -10 * MS);
    }

    #[test]
    fn an_answer_during_which_the_host_was_set_says_nothing() {
        let took = Duration::from_millis(4);
        assert_eq!(Comparison::of(0, 3_600_000 * MS, took, 0), None);
        assert_eq!(Comparison::of(3_600_000 * MS, 0, took, 0), None);
        assert!(Comparison::of(i64::MIN, i64::MAX, took, 0).is_none());
    }

    #[test]
    fn whatever_a_guest_says_is_a_comparison() {
        for guest in [i64::MIN, 0, i64::MAX] {
            let found = Comparison::of(1000 * MS, 1001 * MS, Duration::from_millis(1), guest);
            let found = found.unwrap().correction(Occasion::Regular);
            assert_eq!(found, Some(Correction::AtOnce), "{guest}");
        }
    }

    #[test]
    fn a_clock_jumps_only_if_it_is_far_off_or_the_hosts_clock_has_jumped() {
        use Correction::{AtOnce, BitByBit};
        use Occasion::{Regular, Step};
        let table = [
            (1, 1, Regular, Some(BitByBit)),
            (-49, 1, Regular, Some(BitByBit)),
            (51, 1, Regular, Some(AtOnce)),
            (-3_600_000, 1, Regular, Some(AtOnce)),
            (4, 1, Step, Some(BitByBit)),
            (-6, 1, Step, Some(AtOnce)),
            // An answer that took too long says little.
            (20, 30, Regular, None),
            (20, 30, Step, None),
            (40, 30, Regular, Some(BitByBit)),
            (100, 30, Step, Some(AtOnce)),
        ];
        for (behind_ms, uncertain_ms, occasion, expected) in table {
            let found = Comparison {
                behind_nanoseconds: behind_ms * MS,
                uncertain_nanoseconds: uncertain_ms * 1_000_000,
            };
            assert_eq!(found.correction(occasion), expected, "{found:?}");
        }
    }
}
