// SPDX-License-Identifier: Apache-2.0
//! virtio-rng (virtio 1.2, 5.4): bytes from the host's random source. Runs on the io worker.

use std::io::Read;
use std::sync::Arc;

use super::chain::Chain;
use super::ring::RingError;
use super::{Active, Turn, VirtioDevice};
use crate::statistics::DeviceCounters;

const DEVICE_ID: u32 = 4;
/// A request gets at most this much: the driver asks again.
const MOST_BYTES: usize = 1024;
/// Requests served before other devices have their turn.
const BUDGET: usize = 32;

/// An entropy device over any source, so that a test can pass a byte slice.
#[derive(Debug)]
pub struct Rng<S> {
    source: S,
    active: Option<Active>,
    counters: Arc<DeviceCounters>,
}

/// The kernel's random source.
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

    /// Fills a chain; a chain that makes no sense gets nothing.
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

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn deactivate(&mut self) {
        self.active = None;
    }

    fn queue_ready(&mut self, _index: usize) -> Result<Turn, RingError> {
        let Some(active) = &mut self.active else {
            return Ok(Turn::Idle);
        };
        let memory = &*active.memory;
        let ring = active.rings.first_mut().ok_or(RingError::NoQueue(0))?;
        let mut turn = Turn::More;
        for _ in 0..BUDGET {
            let Some(chain) = ring.pop(memory)? else {
                if ring.rearm(memory)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head_index();
            let len = match Chain::resolve(chain, memory, 16) {
                Ok(chain) => Self::fill(&mut self.source, &chain),
                Err(_) => self.counters.fail(),
            };
            self.counters.read(len);
            ring.push(memory, head, u32::try_from(len).unwrap_or(0))?;
        }
        ring.signal(memory)?;
        Ok(turn)
    }
}
