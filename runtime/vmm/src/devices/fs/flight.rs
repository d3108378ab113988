// SPDX-License-Identifier: Apache-2.0
//! Requests that wait for their reply. Each has a number that the device chose. Their count is bounded.
//! Only the device uses this file.

use crate::devices::chain::Place;

/// The size of the request queue.
pub const REQUEST_PLACES: u16 = 256;
/// A driver that keeps to the rules cannot have more requests in flight.
const MOST: usize = REQUEST_PLACES as usize;
/// A chain has at most as many buffers as its queue has entries.
pub const CHAIN_MAX: usize = REQUEST_PLACES as usize;
/// A number has the slot's index in its low bits, and above them how often the slot was used. So a
/// late reply to an earlier request cannot pass for a reply to the present one.
const SLOT_BITS: u32 = 16;

/// A request that was sent to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub queue: usize,
    pub head: u16,
    /// The request's number in the guest (`unique`).
    pub unique: u64,
    /// Where the reply has to be written.
    pub room: Vec<Place>,
}

/// All requests in flight.
#[derive(Debug, Default)]
pub struct Flight {
    slots: Vec<Slot>,
    count: usize,
}

/// A place for a request. It is used again after the request's end, so its uses are counted.
#[derive(Debug, Default)]
struct Slot {
    uses: u64,
    waiting: Option<Waiting>,
}

impl Flight {
    pub fn is_full(&self) -> bool {
        self.count >= MOST
    }

    /// Remembers a request and returns its number, or `None` if there are too many.
    pub fn begin(&mut self, waiting: Waiting) -> Option<u64> {
        let free = self.slots.iter().position(|slot| slot.waiting.is_none());
        let index = match free {
            Some(index) => index,
            None if self.slots.len() < MOST => {
                self.slots.push(Slot::default());
                self.slots.len().checked_sub(1)?
            }
            None => return None,
        };
        let slot = self.slots.get_mut(index)?;
        slot.uses = slot.uses.wrapping_add(1);
        slot.waiting = Some(waiting);
        self.count = self.count.saturating_add(1);
        Some(slot.uses << SLOT_BITS | u64::try_from(index).ok()?)
    }

    /// The request with this number, if it still waits.
    pub fn get(&self, number: u64) -> Option<&Waiting> {
        let (index, uses) = split(number);
        let slot = self.slots.get(index)?;
        slot.waiting.as_ref().filter(|_| slot.uses == uses)
    }

    /// Removes the request with this number.
    pub fn end(&mut self, number: u64) -> Option<Waiting> {
        let (index, uses) = split(number);
        let slot = self.slots.get_mut(index).filter(|slot| slot.uses == uses)?;
        let waiting = slot.waiting.take()?;
        self.count = self.count.saturating_sub(1);
        Some(waiting)
    }

    /// Removes all requests.
    pub fn take_all(&mut self) -> Vec<Waiting> {
        self.count = 0;
        let slots = self.slots.iter_mut();
        slots.filter_map(|slot| slot.waiting.take()).collect()
    }
}

fn split(number: u64) -> (usize, u64) {
    let index = number & ((1 << SLOT_BITS) - 1);
    (
        usize::try_from(index).unwrap_or(usize::MAX),
        number >> SLOT_BITS,
    )
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn waiting(unique: u64) -> Waiting {
        Waiting {
            queue: 1,
            head: 0,
            unique,
            room: Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn for_all_histories_a_number_finds_its_own_request_and_no_other(
            // Begin a request, or end the one that so many began before the last.
            steps in proptest::collection::vec(prop_oneof![Just(None), (0usize..400).prop_map(Some)], 1..800),
        ) {
            let mut flight = Flight::default();
            let (mut numbers, mut open) = (Vec::new(), HashMap::new());
            for (unique, step) in (0u64..).zip(steps) {
                match step {
                    None => match flight.begin(waiting(unique)) {
                        Some(number) => {
                            prop_assert!(!numbers.contains(&number), "a number twice");
                            numbers.push(number);
                            open.insert(number, unique);
                        }
                        None => prop_assert_eq!(open.len(), MOST),
                    },
                    Some(back) => {
                        let number = numbers.iter().rev().nth(back).copied().unwrap_or(unique);
                        let found = flight.end(number).map(|waiting| waiting.unique);
                        prop_assert_eq!(found, open.remove(&number));
                        prop_assert!(flight.get(number).is_none());
                    }
                }
                prop_assert_eq!(flight.is_full(), open.len() == MOST);
            }
            prop_assert_eq!(flight.take_all().len(), open.len());
        }
    }
}
