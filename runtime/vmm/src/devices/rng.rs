// SPDX-License-Identifier: Apache-2.0
//! virtio-rng (virtio 1.2, 5.4): bytes from the host's random source. Runs on the io worker.

use std::io::Read;
use std::sync::Arc;

use super::chain::Chain;
use super::ring::{RingError, Served};
use super::{Active, Budget, Turn, VirtioDevice};
use crate::statistics::DeviceCounters;

const DEVICE_ID: u32 = 4;
/// A request gets at most this many bytes. The driver asks again if it wants more.
const MOST_BYTES: usize = 1024;
/// How many requests are served before other devices get their turn.
const BUDGET: Budget = Budget::of_chains(32);

/// An entropy device over any source, so that a test can pass a byte slice.
#[derive(Debug)]
pub struct Rng<S> {
    source: S,
    active: Option<Active>,
    counters: Arc<DeviceCounters>,
}

/// The host kernel's random source.
#[derive(Debug)]
pub struct HostRandom;

impl Read for HostRandom {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let flags = rustix::rand::GetRandomFlags::empty();
        Ok(rustix::rand::getrandom(bytes, flags)?)
    }
}

impl<S: Read> Rng<S> {
    #[must_use]
    pub fn new(source: S, counters: Arc<DeviceCounters>) -> Self {
        Self {
            source,
            active: None,
            counters,
        }
    }

    /// Fills a chain. Returns how many bytes were written, 0 if the source fails.
    fn fill(source: &mut S, chain: &Chain<'_>) -> usize {
        let mut bytes = [0; MOST_BYTES];
        let want = chain.writable.len().min(MOST_BYTES);
        let got = bytes.get_mut(..want).map_or(Ok(0), |b| source.read(b));
        let got = got.unwrap_or(0);
        chain.writable.copy_from(bytes.get(..got).unwrap_or(&[]))
    }
}

impl<S: Read + Send> VirtioDevice for Rng<S> {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
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

    fn queue_ready(&mut self, _index: usize) -> Result<Turn, RingError> {
        let Some(active) = &mut self.active else {
            return Ok(Turn::Idle);
        };
        let memory = &*active.memory;
        let ring = active.rings.first_mut().ok_or(RingError::NoQueue(0))?;
        ring.serve(memory, BUDGET, |chain, _, budget| {
            let len = match Chain::resolve(chain, memory, 16, budget) {
                Ok(chain) => Self::fill(&mut self.source, &chain),
                Err(_) => self.counters.fail(),
            };
            self.counters.read(len);
            Served::Whole(len)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver::{Driver, NEXT, WRITE};

    const DATA: u64 = 0x20_0000;

    fn served(pieces: &[(u64, u32, u16, u16)]) -> (Driver, u32) {
        let driver = Driver::new();
        let mut rng = Rng::new(&[7; 5000][..], Arc::default());
        driver.activate(&mut rng, 0);
        driver.offer(0, 0, pieces);
        assert_eq!(rng.queue_ready(0).unwrap(), Turn::Idle);
        let used = driver.used(0);
        assert_eq!(used.len(), 1);
        (driver, used[0].1)
    }

    #[test]
    fn writable_buffers_are_filled_up_to_the_most_of_a_request() {
        let (driver, len) = served(&[(DATA, 10, NEXT | WRITE, 1), (DATA + 100, 20, WRITE, 0)]);
        assert_eq!(len, 30);
        assert_eq!(driver.read(DATA, 11), [&[7; 10][..], &[0]].concat());
        assert_eq!(driver.read(DATA + 100, 20), [7; 20]);
        assert_eq!(driver.interrupt_status(), 1);
        let (_, len) = served(&[(DATA, 4000, WRITE, 0)]);
        assert_eq!(len, 1024);
    }

    #[test]
    fn what_cannot_be_written_comes_back_empty() {
        for (case, piece) in [
            ("read-only", (DATA, 100, 0, 0)),
            ("outside of memory", (1 << 40, 100, WRITE, 0)),
            ("end outside of memory", (DATA, u32::MAX, WRITE, 0)),
        ] {
            assert_eq!(served(&[piece]).1, 0, "{case}");
        }
    }
}
