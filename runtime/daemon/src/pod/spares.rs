// SPDX-License-Identifier: Apache-2.0
//! VMs that are kept ready for pods to come (`sandbox.spares`): how many, of which kind, and which pod gets one.
//!
//! A spare is a VM that was forked from its template and whose agent answers, with all that a pod's VM has on the host. It
//! is no pod's yet. A pod of the same [`Kind`] takes it over and only has to configure it ([`super::owner`]). When no pod
//! boots, [`super::owner`] makes another one in its place.
//!
//! Spares are of the kinds that pods ask for most: [`Kinds`] scores them, and later requests count more. To the store a
//! spare is a pod that is being created, so a daemon that finds one of an earlier daemon gives back all that it has.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_host::Guest;
use bulkhead_host::template::Template;
use bulkhead_network::{Attachment, NetworkRecord};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::life::record::{PodRecord, VmSize};
use super::templates::Sources;

/// What a request counts. All earlier ones together count at most 15 times as much.
const SCORE: u64 = 1 << 20;
/// What remains of all scores after each request, in sixteenths.
const REMAINS_SIXTEENTHS: u64 = 15;
/// How many kinds are remembered.
const MOST_KINDS: usize = 16;
/// A spare gives way to one of a kind that is asked for this many times as often.
const MUCH_MORE: u64 = 4;

/// Which pods can have a spare: those whose VM is to have this size, and whose template is of this namespace (empty: the
/// node's).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    pub size: VmSize,
    pub namespace: String,
}

/// A VM that is no pod's yet.
#[derive(Debug)]
pub struct Spare {
    pub kind: Kind,
    /// What it has on the host, as it is stored.
    pub record: PodRecord,
    pub attachment: Attachment,
    pub guest: Guest,
    /// What it was forked from.
    pub template: Arc<Template>,
}

impl Spare {
    /// Whether a pod can have it for which this network was planned, if VMs are started from these files now.
    pub fn fits(&self, planned: &NetworkRecord, now: &Sources) -> bool {
        let is_alive = self.guest.process.identity().is_alive();
        is_alive && self.record.made_from == *now && self.attachment.serves(planned)
    }
}

/// The spares of this node.
#[derive(Debug)]
pub struct Spares {
    /// How many are kept at most.
    most: usize,
    state: Mutex<State>,
    changed: Notify,
    /// Held while one is made and added.
    pub making: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    kinds: Kinds,
    ready: Vec<Spare>,
    counts: Counts,
    is_closed: bool,
}

/// How pods of this daemon fared.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Counts {
    taken: u64,
    missed: u64,
}

/// What there is, for status answers.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    pub most: usize,
    pub ready: usize,
    /// How many pods took one.
    pub taken: u64,
    /// How many found none that they could have.
    pub missed: u64,
}

impl Status {
    /// For people.
    pub fn sentence(&self) -> String {
        let Self {
            most,
            ready,
            taken,
            missed,
        } = self;
        match most {
            0 => "No VM is kept ready for pods to come (sandbox.spares is 0)".to_owned(),
            _ => format!(
                "{ready} of {most} VMs are ready for pods to come; {taken} pods took one, {missed} found none"
            ),
        }
    }
}

impl Spares {
    pub fn new(most: usize) -> Self {
        Self {
            most,
            state: Mutex::default(),
            changed: Notify::new(),
            making: tokio::sync::Mutex::default(),
        }
    }

    pub fn is_off(&self) -> bool {
        self.most == 0
    }

    /// Notes that pods of this kind are to be expected.
    pub fn expect(&self, kind: &Kind) {
        self.state().kinds.note(kind);
        self.changed.notify_one();
    }

    /// Takes a spare of this kind that `fits`. What was asked for is noted.
    pub fn take(&self, kind: &Kind, fits: impl Fn(&Spare) -> bool) -> Option<Spare> {
        if self.is_off() {
            return None;
        }
        let mut state = self.state();
        state.kinds.note(kind);
        let can = |spare: &Spare| spare.kind == *kind && fits(spare);
        let found = state.ready.iter().position(can);
        let taken = found.map(|place| state.ready.remove(place));
        state.counts.taken += u64::from(taken.is_some());
        state.counts.missed += u64::from(taken.is_none());
        self.changed.notify_one();
        taken
    }

    /// Adds a spare. It comes back if there are to be none any more.
    pub fn add(&self, spare: Spare) -> Result<(), Box<Spare>> {
        let mut state = self.state();
        if state.is_closed {
            return Err(Box::new(spare));
        }
        state.ready.push(spare);
        Ok(())
    }

    /// The kind of the spare that is to be made next. `None` if there are enough.
    pub fn missing(&self) -> Option<Kind> {
        let state = self.state();
        let is_full = state.is_closed || state.ready.len() >= self.most;
        let ready: Vec<&Kind> = state.ready.iter().map(|spare| &spare.kind).collect();
        let missing = state.kinds.most_wanted(&ready).map(|(kind, _)| kind);
        missing.filter(|_| !is_full).cloned()
    }

    /// Removes the spares that are no longer of use: those that do not fit, and one that must give way to a kind that is
    /// asked for much more often. The caller ends them.
    pub fn remove_useless(&self, fits: impl Fn(&Spare) -> bool) -> Vec<Spare> {
        let mut state = self.state();
        let (fitting, mut useless): (Vec<_>, Vec<_>) = state.ready.drain(..).partition(fits);
        state.ready = fitting;
        let kinds: Vec<&Kind> = state.ready.iter().map(|spare| &spare.kind).collect();
        let is_full = state.ready.len() >= self.most;
        if is_full && let Some(place) = state.kinds.outdone(&kinds) {
            useless.push(state.ready.remove(place));
        }
        useless
    }

    /// Returns all spares for the caller to end. From now on there are none.
    pub fn close(&self) -> Vec<Spare> {
        let mut state = self.state();
        state.is_closed = true;
        std::mem::take(&mut state.ready)
    }

    /// Waits until something was taken or is expected, or [`Spares::look_again`] was called.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Wakes whoever waits for a change.
    pub fn look_again(&self) {
        self.changed.notify_one();
    }

    pub fn status(&self) -> Status {
        let state = self.state();
        Status {
            most: self.most,
            ready: state.ready.len(),
            taken: state.counts.taken,
            missed: state.counts.missed,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often each kind was asked for.
#[derive(Debug, Default)]
struct Kinds(Vec<(Kind, u64)>);

impl Kinds {
    fn note(&mut self, kind: &Kind) {
        for (_, score) in &mut self.0 {
            *score = *score / 16 * REMAINS_SIXTEENTHS;
        }
        match self.0.iter_mut().find(|(known, _)| known == kind) {
            Some((_, score)) => *score += SCORE,
            None => self.0.push((kind.clone(), SCORE)),
        }
        self.0.sort_by_key(|(_, score)| std::cmp::Reverse(*score));
        self.0.truncate(MOST_KINDS);
    }

    /// The kind of which one more is worth most, and what it is worth: its score is shared by all of its kind.
    fn most_wanted(&self, ready: &[&Kind]) -> Option<(&Kind, u64)> {
        let worth = |(kind, score): &'_ (Kind, u64)| score / (count(kind, ready) + 1);
        let best = self.0.iter().max_by_key(|one| worth(one))?;
        Some((&best.0, worth(best)))
    }

    /// The place of a spare that is worth far less than one of another kind would be.
    fn outdone(&self, ready: &[&Kind]) -> Option<usize> {
        let score = |kind: &Kind| {
            let found = self.0.iter().find(|(known, _)| known == kind);
            found.map_or(0, |(_, score)| *score)
        };
        let worth = |kind: &&Kind| score(kind) / count(kind, ready).max(1);
        let (place, least) = ready
            .iter()
            .enumerate()
            .min_by_key(|(_, kind)| worth(kind))?;
        let (_, most) = self.most_wanted(ready)?;
        (most > worth(least).saturating_mul(MUCH_MORE)).then_some(place)
    }
}

fn count(kind: &Kind, ready: &[&Kind]) -> u64 {
    let same = ready.iter().filter(|one| **one == kind);
    same.fold(0, |count, _| count + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(memory_mib: u32) -> Kind {
        Kind {
            size: VmSize {
                memory_mib,
                ..VmSize::default()
            },
            namespace: String::new(),
        }
    }

    fn asked(requests: impl IntoIterator<Item = u32>) -> Kinds {
        let mut kinds = Kinds::default();
        for memory_mib in requests {
            kinds.note(&kind(memory_mib));
        }
        kinds
    }

    /// Which spares there are if `most` of them are made one after the other.
    fn made(kinds: &Kinds, most: usize) -> Vec<u32> {
        let mut ready: Vec<Kind> = Vec::new();
        while ready.len() < most {
            let known: Vec<&Kind> = ready.iter().collect();
            let next = kinds.most_wanted(&known).unwrap().0.clone();
            ready.push(next);
        }
        ready.iter().map(|kind| kind.size.memory_mib).collect()
    }

    #[test]
    fn spares_are_of_the_kinds_that_were_asked_for_in_proportion() {
        assert!(Kinds::default().most_wanted(&[]).is_none());
        assert_eq!(made(&asked([1]), 3), [1, 1, 1]);
        let kinds = asked([1, 2, 1, 2, 1]);
        assert_eq!(made(&kinds, 3), [1, 2, 1]);
        // What was asked for lately counts more.
        let kinds = asked(std::iter::repeat_n(1, 100).chain(std::iter::repeat_n(2, 20)));
        assert_eq!(made(&kinds, 2), [2, 2]);
    }

    #[test]
    fn a_spare_gives_way_only_if_another_kind_is_asked_for_far_more_often() {
        let (one, two) = (kind(1), kind(2));
        let taking_turns = asked((0..40).map(|number| 1 + number % 2));
        assert_eq!(taking_turns.outdone(&[&one]), None);
        assert_eq!(taking_turns.outdone(&[&two]), None);
        let changed = asked(std::iter::repeat_n(1, 5).chain(std::iter::repeat_n(2, 30)));
        assert_eq!(changed.outdone(&[&one, &two]), Some(0));
        assert_eq!(changed.outdone(&[&two, &two]), None);
        assert_eq!(changed.outdone(&[&kind(3)]), Some(0), "nobody asks for it");
    }

    #[test]
    fn kinds_that_nobody_asks_for_any_more_are_forgotten() {
        let kinds = asked(1..100);
        assert_eq!(kinds.0.len(), MOST_KINDS);
        assert_eq!(kinds.0[0].0, kind(99));
    }

    #[test]
    fn without_spares_nothing_is_taken_or_missing() {
        let none = Spares::new(0);
        assert!(none.is_off() && none.take(&kind(1), |_| true).is_none());
        none.expect(&kind(1));
        assert_eq!(none.missing(), None);
        assert_eq!((none.status().taken, none.status().missed), (0, 0));
        let some = Spares::new(2);
        assert!(some.take(&kind(1), |_| true).is_none());
        assert_eq!(some.missing(), Some(kind(1)));
        assert_eq!(some.status().missed, 1);
        assert!(some.close().is_empty());
        assert_eq!(some.missing(), None);
    }
}
