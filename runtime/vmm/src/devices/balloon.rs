// SPDX-License-Identifier: Apache-2.0
//! virtio-balloon (virtio 1.2, 5.5): gives memory that the guest does not use back to the host. Runs on the io worker.
//!
//! Normally the guest reports free pages by itself (free page reporting). Reporting is slow and covers
//! only large runs of pages. To get memory back at once, the control socket sets a target: the guest
//! then puts pages into the balloon until the target is reached or no page is free.

use std::sync::Arc;

use super::chain::{Buffers, Chain, Place, writable_places};
use super::ring::{RingError, Served};
use super::{Active, Budget, Turn, VirtioDevice};
use crate::memory::{self, Memory};
use crate::statistics::BalloonCounters;

const DEVICE_ID: u32 = 5;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
/// A balloon page has 4 KiB, whatever page size the guest uses.
const PAGE_SHIFT: u32 = 12;
const INFLATE: usize = 0;
/// The statistics and free-page-hint queues are not offered and take no number, so reporting is third.
const REPORTING: usize = 2;
/// How many buffers a chain may have. Linux's have one, or up to 32 if they report free pages.
const CHAIN_MAX: usize = 64;
/// The bytes are those of released memory, of which the host releases some gigabytes a second.
const BUDGET: Budget = Budget::of_chains(64).with_bytes(256 << 20);
/// A page number or a reported range may need a system call of its own, of several microseconds. So it counts as many
/// buffers.
const RELEASE_COST: usize = 4;
const NUMBER_BYTES: usize = 4;

/// The balloon of one guest.
#[derive(Debug)]
pub struct Balloon {
    /// How many pages are in the balloon, as the guest says.
    actual_pages: [u8; 4],
    /// How many pages should be in it.
    target_pages: u32,
    active: Option<Active>,
    counters: Arc<BalloonCounters>,
}

impl Balloon {
    #[must_use]
    pub fn new(counters: Arc<BalloonCounters>) -> Self {
        Self {
            actual_pages: [0; 4],
            target_pages: 0,
            active: None,
            counters,
        }
    }

    /// Asks the guest to have this many pages of 4 KiB in the balloon.
    pub fn set_target(&mut self, pages: u32) {
        self.target_pages = pages;
        if let Some(active) = &self.active {
            active.interrupt.config_changed(&self.config());
        }
    }
}

/// Gives back the pages whose numbers are in `list`, from byte `done` of the list on. Neighbouring pages are released
/// in one call. Returns how much was released, and where the turn ends if that is before the list does.
fn release_listed(
    memory: &Memory,
    list: &Buffers<'_>,
    done: usize,
    budget: &mut Budget,
) -> (u64, Option<usize>) {
    let most = budget.buffers_left() / RELEASE_COST;
    let part = list.part(done, most.saturating_mul(NUMBER_BYTES));
    let mut bytes = vec![0; part.len()];
    part.copy_to(&mut bytes);
    let (numbers, _) = bytes.as_chunks::<NUMBER_BYTES>();
    let pages: Vec<u64> = numbers
        .iter()
        .map(|&number| u32::from_le_bytes(number).into())
        .collect();
    budget.spend_buffers(pages.len().saturating_mul(RELEASE_COST));
    let runs = pages.chunk_by(|&page, &next| page.checked_add(1) == Some(next));
    let released = runs.fold(0, |sum: u64, run| {
        let first = run.first().map_or(0, |&page| page << PAGE_SHIFT);
        let len = u64::try_from(run.len()).unwrap_or(0) << PAGE_SHIFT;
        // Ranges outside of memory are ignored.
        sum.saturating_add(memory::release(memory, first, len).unwrap_or(0))
    });
    let end = done.saturating_add(part.len());
    (released, Some(end).filter(|&end| end < list.len()))
}

/// Gives back the memory that a reporting chain describes, from byte `done` of it on, as much as the budget allows.
/// Returns the same as [`release_listed`].
fn release_reported(
    memory: &Memory,
    places: &[Place],
    done: usize,
    budget: &mut Budget,
) -> (u64, Option<usize>) {
    let (mut skip, mut end, mut released) = (done, 0usize, 0u64);
    for &(address, len) in places {
        end = end.saturating_add(len);
        let Some(rest) = len.checked_sub(skip).filter(|&rest| rest > 0) else {
            skip = skip.saturating_sub(len);
            continue;
        };
        if budget.bytes_left() == 0 || budget.buffers_left() == 0 {
            return (released, Some(end.saturating_sub(rest)));
        }
        let start = address.0.saturating_add(u64::try_from(skip).unwrap_or(0));
        let part = until_page(start, rest, budget.bytes_left());
        let bytes = memory::release(memory, start, u64::try_from(part).unwrap_or(0));
        released = released.saturating_add(bytes.unwrap_or(0));
        budget.spend_bytes(part);
        budget.spend_buffers(RELEASE_COST);
        if part < rest {
            let left = rest.saturating_sub(part);
            return (released, Some(end.saturating_sub(left)));
        }
        skip = 0;
    }
    (released, None)
}

/// How much of a range to release now, if it is more than `most`: up to the end of a page, because only whole pages are
/// released.
fn until_page(start: u64, len: usize, most: usize) -> usize {
    let end = u64::try_from(most)
        .ok()
        .and_then(|most| start.checked_add(most));
    let end = end.and_then(|end| end.checked_next_multiple_of(1 << PAGE_SHIFT));
    let part = end.and_then(|end| usize::try_from(end.saturating_sub(start)).ok());
    part.map_or(len, |part| part.min(len))
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64, 64]
    }

    fn config(&self) -> Vec<u8> {
        [self.target_pages.to_le_bytes(), self.actual_pages].concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(pages)) = (offset, data.try_into()) {
            self.actual_pages = pages;
            self.counters.set_actual(u32::from_le_bytes(pages));
        }
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn deactivate(&mut self) {
        self.active = None;
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn restore_config(&mut self, space: &[u8]) {
        self.write_config(4, space.get(4..8).unwrap_or_default());
    }

    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError> {
        let Some(active) = &mut self.active else {
            return Ok(Turn::Idle);
        };
        let memory = &*active.memory;
        let ring = active.rings.get_mut(index);
        let ring = ring.ok_or(RingError::NoQueue(index))?;
        ring.serve(memory, BUDGET, |chain, done, budget| {
            let end = match index {
                REPORTING => {
                    let places = writable_places(chain, memory, CHAIN_MAX, budget);
                    let places = places.unwrap_or_default();
                    let (bytes, end) = release_reported(memory, &places, done, budget);
                    self.counters.reported(bytes);
                    end
                }
                INFLATE => match Chain::resolve(chain, memory, CHAIN_MAX, budget) {
                    Ok(chain) => {
                        let (bytes, end) = release_listed(memory, &chain.readable, done, budget);
                        self.counters.inflated(bytes);
                        end
                    }
                    Err(_) => None,
                },
                // Deflate queue: nothing to do. The guest takes pages back by touching them.
                _ => None,
            };
            end.map_or(Served::Whole(0), Served::Until)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver::{Driver, INDIRECT, NEXT, WRITE};

    const PAGE: u64 = 4096;
    const LIST: u64 = 0x20_0000;
    const PAGES: u64 = 0x40_0000;

    fn balloon(driver: &Driver) -> (Balloon, Arc<BalloonCounters>) {
        let counters = Arc::<BalloonCounters>::default();
        let mut balloon = Balloon::new(Arc::clone(&counters));
        driver.activate(&mut balloon, 0);
        driver.write(PAGES, &[1; 4 * 4096]);
        (balloon, counters)
    }

    #[test]
    fn reported_pages_are_given_back_and_nothing_beside_them() {
        let driver = Driver::new();
        let (mut balloon, counters) = balloon(&driver);
        driver.offer(REPORTING, 0, &[(PAGES + PAGE, 8192, WRITE, 0)]);
        assert_eq!(balloon.queue_ready(REPORTING).unwrap(), Turn::Idle);
        assert_eq!(driver.used(REPORTING), [(0, 0)]);
        assert_eq!(counters.snapshot().reported_bytes, 8192);
        assert_eq!(driver.read(PAGES, 1), [1]);
        assert_eq!(driver.read(PAGES + PAGE, 8192), [0; 8192]);
        assert_eq!(driver.read(PAGES + 3 * PAGE, 1), [1]);
    }

    #[test]
    fn inflating_takes_the_listed_pages() {
        let driver = Driver::new();
        let (mut balloon, counters) = balloon(&driver);
        let numbers = [PAGES / PAGE, PAGES / PAGE + 1, PAGES / PAGE + 3];
        let list: Vec<u8> = numbers
            .iter()
            .flat_map(|n| u32::try_from(*n).unwrap().to_le_bytes())
            .collect();
        driver.write(LIST, &list);
        driver.offer(INFLATE, 0, &[(LIST, 12, 0, 0)]);
        assert_eq!(balloon.queue_ready(INFLATE).unwrap(), Turn::Idle);
        assert_eq!(counters.snapshot().inflated_bytes, 3 * PAGE);
        let first = [0, 1, 2, 3].map(|page| driver.read(PAGES + page * PAGE, 1)[0]);
        assert_eq!(first, [0, 0, 1, 0]);
    }

    #[test]
    fn a_list_that_is_longer_than_a_turn_goes_on_at_the_next() {
        let driver = Driver::new();
        let (mut balloon, counters) = balloon(&driver);
        // 4 MiB of page numbers, which never follow one another: more than a million system calls.
        let pair = [PAGES / PAGE, PAGES / PAGE + 2].map(|page| u32::try_from(page).unwrap());
        let list: Vec<u8> = pair.iter().flat_map(|n| n.to_le_bytes()).collect();
        driver.write(LIST, &list.repeat((1 << 20) / list.len()));
        let part = |next| (LIST, 1 << 20, NEXT, next);
        let chain = [part(1), part(2), part(3), (LIST, 1 << 20, 0, 0)];
        driver.offer(INFLATE, 0, &chain);
        assert_eq!(balloon.queue_ready(INFLATE).unwrap(), Turn::More);
        assert!(driver.used(INFLATE).is_empty(), "the chain is not done");
        let first = counters.snapshot().inflated_bytes;
        assert!(first > 0 && first <= 1024 * PAGE, "{first}");
        let turns = 1
            + (0..2000)
                .take_while(|_| balloon.queue_ready(INFLATE).unwrap() == Turn::More)
                .count();
        assert_eq!(driver.used(INFLATE), [(0, 0)]);
        assert!(turns > 1000, "{turns}");
        assert_eq!(counters.snapshot().inflated_bytes, (1 << 20) * PAGE);
    }

    #[test]
    fn reported_memory_is_released_in_parts_and_all_of_it() {
        let driver = Driver::new();
        let (mut balloon, counters) = balloon(&driver);
        let piece = |next| (PAGES, 16 << 20, NEXT | WRITE, next);
        let chain: Vec<_> = (1..16)
            .map(piece)
            .chain([(PAGES, 16 << 20, WRITE, 0)])
            .collect();
        for _ in 0..3 {
            driver.offer(REPORTING, 0, &chain);
        }
        let mut turns = 0;
        loop {
            turns += 1;
            if balloon.queue_ready(REPORTING).unwrap() == Turn::Idle {
                break;
            }
        }
        assert_eq!(driver.used(REPORTING).len(), 3);
        assert_eq!(counters.snapshot().reported_bytes, 3 * 16 * (16 << 20));
        assert_eq!(turns, 4, "256 MiB a turn");
    }

    #[test]
    fn a_range_is_cut_at_the_end_of_a_page() {
        assert_eq!(until_page(0x1000, 0x10_0000, 0x2000), 0x2000);
        assert_eq!(until_page(0x1001, 0x10_0000, 0x2000), 0x2fff);
        assert_eq!(until_page(0x1000, 0x1000, 0x2000), 0x1000);
        assert_eq!(until_page(u64::MAX - 5, 5, 0x2000), 5);
    }

    #[test]
    fn a_table_of_65535_buffers_is_refused_without_being_read() {
        let driver = Driver::new();
        let (mut balloon, counters) = balloon(&driver);
        driver.indirect(LIST, u16::MAX, (PAGES, 4096, WRITE));
        driver.offer(
            REPORTING,
            0,
            &[(LIST, u32::from(u16::MAX) * 16, INDIRECT, 0)],
        );
        assert_eq!(balloon.queue_ready(REPORTING).unwrap(), Turn::Idle);
        assert_eq!(driver.used(REPORTING), [(0, 0)]);
        assert_eq!(counters.snapshot().reported_bytes, 0);
    }

    #[test]
    fn a_target_is_shown_and_told() {
        let driver = Driver::new();
        let (mut balloon, _) = balloon(&driver);
        assert_eq!(balloon.config(), [0; 8]);
        balloon.set_target(0x0102);
        assert_eq!(balloon.config()[..4], [2, 1, 0, 0]);
        balloon.write_config(4, &[7, 0, 0, 0]);
        assert_eq!(balloon.config(), [2, 1, 0, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn pages_that_are_no_memory_are_the_guests_loss() {
        let driver = Driver::new();
        let (mut balloon, counters) = balloon(&driver);
        for (case, address, len) in [
            ("outside", 1 << 40, 4096),
            ("across the end", (32 << 20) - PAGE, 8192),
            ("overflow", u64::MAX - 10, 4096),
            ("less than a page", PAGES + 100, 200),
        ] {
            driver.offer(REPORTING, 0, &[(address, len, WRITE, 0)]);
            assert_eq!(
                balloon.queue_ready(REPORTING).unwrap(),
                Turn::Idle,
                "{case}"
            );
            assert_eq!(driver.used(REPORTING).len(), 1, "{case}");
        }
        driver.write(LIST, &[0xff; 8]);
        driver.offer(INFLATE, 0, &[(LIST, 8, 0, 0)]);
        balloon.queue_ready(INFLATE).unwrap();
        let statistics = counters.snapshot();
        assert_eq!(
            (statistics.reported_bytes, statistics.inflated_bytes),
            (0, 0)
        );
        assert_eq!(driver.read(PAGES, 4096), [1; 4096]);
        assert!(balloon.queue_ready(7).is_err(), "there is no such queue");
    }
}
