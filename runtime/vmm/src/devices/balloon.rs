// SPDX-License-Identifier: Apache-2.0
//! virtio-balloon (virtio 1.2, 5.5): gives memory that the guest does not use back to the host. Runs on the io worker.
//!
//! Normally the guest reports free pages by itself (free page reporting). Reporting is slow and covers
//! only large runs of pages. To get memory back at once, the control socket sets a target: the guest
//! then puts pages into the balloon until the target is reached or no page is free.

use std::sync::Arc;

use super::chain::{Buffers, Chain};
use super::ring::RingError;
use super::{Active, Turn, VirtioDevice};
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
const BUDGET: usize = 64;

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

/// Gives back the pages whose numbers are in `list`. Neighbouring pages are released in one call.
fn release_listed(memory: &Memory, mut list: Buffers<'_>) -> u64 {
    let mut released: u64 = 0;
    let mut run: Option<(u64, u64)> = None;
    loop {
        let page = list.take::<4>().ok().map(u32::from_le_bytes).map(u64::from);
        let grown = match (run, page) {
            (Some((first, count)), Some(page)) if first.checked_add(count) == Some(page) => {
                Some((first, count.saturating_add(1)))
            }
            _ => None,
        };
        if grown.is_some() {
            run = grown;
            continue;
        }
        if let Some((first, count)) = run {
            // No overflow: page numbers have 32 bits. Ranges outside of memory are ignored.
            let bytes = memory::release(memory, first << PAGE_SHIFT, count << PAGE_SHIFT);
            released = released.saturating_add(bytes.unwrap_or(0));
        }
        match page {
            Some(page) => run = Some((page, 1)),
            None => return released,
        }
    }
}

/// Gives back the memory that the buffers of a reporting chain describe.
fn release_reported(memory: &Memory, chain: virtio_queue::DescriptorChain<&Memory>) -> u64 {
    chain.writable().fold(0, |sum: u64, descriptor| {
        let len = u64::from(descriptor.len());
        let bytes = memory::release(memory, descriptor.addr().0, len);
        sum.saturating_add(bytes.unwrap_or(0))
    })
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

    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError> {
        let Some(active) = &mut self.active else {
            return Ok(Turn::Idle);
        };
        let memory = &*active.memory;
        let ring = active.rings.get_mut(index);
        let ring = ring.ok_or(RingError::NoQueue(index))?;
        ring.serve(memory, BUDGET, |chain| {
            match index {
                REPORTING => self.counters.reported(release_reported(memory, chain)),
                INFLATE => {
                    if let Ok(chain) = Chain::resolve(chain, memory, 64) {
                        let bytes = release_listed(memory, chain.readable);
                        self.counters.inflated(bytes);
                    }
                }
                // Deflate queue: nothing to do. The guest takes pages back by touching them.
                _ => {}
            }
            0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver::{Driver, WRITE};

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
