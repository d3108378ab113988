// SPDX-License-Identifier: Apache-2.0
//! virtio-net (virtio 1.2, 5.1) over a TAP device that uses the same header. Runs on the io worker.
//!
//! Frames go directly between the TAP and guest memory; only the guest's header is copied and checked
//! ([`header`]). Without a TAP the link is down, and frames of the guest are dropped.

mod header;
mod offload;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use self::header::{HEADER_BYTES, NUM_BUFFERS};
use super::chain::{Buffers, Chain, Place, writable_places};
use super::ring::{Ring, RingError, Served};
use super::saved::{Busy, Purpose, QueueState};
use super::{Active, Budget, Turn, VirtioDevice};
use crate::config::MacAddress;
use crate::memory::Memory;
use crate::statistics::DeviceCounters;
use crate::sys;

const DEVICE_ID: u32 = 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

const RX: usize = 0;
const TX: usize = 1;
/// Size of an Ethernet header with a VLAN tag.
const LINK_BYTES: usize = 18;
/// The largest frame with segmentation offload, including its headers.
const LARGEST_FRAME: usize = 65550;
const CHAIN_MAX: usize = 64;
/// As many as a queue has entries. A driver that keeps to the rules cannot have more out.
const MOST_WAITING: usize = 256;
/// Frames per turn.
const BUDGET: Budget = Budget::of_chains(64);

/// A network device.
#[derive(Debug)]
pub struct Net {
    tap: Option<File>,
    mac: MacAddress,
    mtu: u16,
    /// The offloads that the TAP supports, as feature bits. Without one there are no frames, so there is no work: then a
    /// driver that goes on from a template's device, which has a TAP, finds what it has negotiated.
    offload: u64,
    active: Option<Active>,
    /// Receive chains that were popped from the ring and wait for a frame.
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    /// Whether the TAP may have frames.
    tap_readable: bool,
    counters: Arc<DeviceCounters>,
}

/// A receive chain. Its addresses were checked when it was popped.
#[derive(Debug)]
struct Waiting {
    head: u16,
    pieces: Vec<Place>,
    len: usize,
}

impl Net {
    /// `tap` must be non-blocking.
    #[must_use]
    pub fn new(
        tap: Option<File>,
        mac: MacAddress,
        mtu: u16,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        let offload = tap.as_ref().map_or(offload::ALL, |tap| {
            offload::offer(|flags| sys::set_tap_offload(tap.as_fd(), flags))
        });
        Self {
            tap,
            mac,
            mtu,
            offload,
            active: None,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            tap_readable: false,
            counters,
        }
    }

    fn set_offload(&self, features: u64) {
        if let Some(tap) = &self.tap {
            // Not expected to fail: the TAP accepted a larger set when asked. Without offloads it does the work itself.
            let _ = sys::set_tap_offload(tap.as_fd(), offload::tun_flags(features));
        }
    }

    /// The most bytes that a frame with its header can have with these features.
    fn frame_bytes(&self, features: u64) -> usize {
        let frame = if features & offload::GUEST_SEGMENTS != 0 {
            LARGEST_FRAME
        } else {
            usize::from(self.mtu).saturating_add(LINK_BYTES)
        };
        frame.saturating_add(HEADER_BYTES)
    }

    /// Pops receive chains until the largest possible frame fits, because the TAP truncates a frame that
    /// does not fit. If there are not enough chains yet, returns how the turn ends.
    fn collect(
        &mut self,
        active: &mut Active,
        budget: &mut Budget,
    ) -> Result<Option<Turn>, RingError> {
        let memory = &*active.memory;
        let merge = active.features & F_MRG_RXBUF != 0;
        let need = self.frame_bytes(active.features);
        let ring = active.rings.get_mut(RX).ok_or(RingError::NoQueue(RX))?;
        loop {
            let enough = if merge {
                self.waiting_bytes >= need
            } else {
                !self.waiting.is_empty()
            };
            if enough {
                return Ok(None);
            }
            if self.waiting.len() >= MOST_WAITING {
                return Ok(Some(Turn::Idle));
            }
            if budget.is_spent() {
                return Ok(Some(Turn::More));
            }
            let Some(chain) = ring.pop(memory)? else {
                if ring.rearm(memory)? {
                    continue;
                }
                return Ok(Some(Turn::Idle));
            };
            let head = chain.head_index();
            // Also for a chain without buffers, of which a driver could offer any number.
            budget.spend_buffers(1);
            let pieces = writable_places(chain, memory, CHAIN_MAX, budget).unwrap_or_default();
            let len = pieces
                .iter()
                .fold(0, |sum: usize, p| sum.saturating_add(p.1));
            if len <= HEADER_BYTES {
                self.counters.fail();
                ring.push(memory, head, 0)?;
                continue;
            }
            self.waiting_bytes = self.waiting_bytes.saturating_add(len);
            self.waiting.push_back(Waiting { head, pieces, len });
        }
    }

    /// Moves frames from the TAP to the guest.
    fn receive(&mut self, active: &mut Active) -> Result<Turn, RingError> {
        let memory = Arc::clone(&active.memory);
        let mut turn = Turn::More;
        let mut budget = BUDGET;
        while budget.begin() {
            if !self.tap_readable {
                turn = Turn::Idle;
                break;
            }
            if let Some(end) = self.collect(active, &mut budget)? {
                turn = end;
                break;
            }
            let Some(tap) = &self.tap else {
                return Ok(Turn::Idle);
            };
            let merge = active.features & F_MRG_RXBUF != 0;
            let room = self.room(&memory, merge);
            budget.spend_buffers(room.slices().len());
            match sys::read(tap.as_fd(), room.slices()) {
                Ok(len) if len >= HEADER_BYTES => {
                    budget.spend_bytes(len);
                    self.deliver(active, &room, len)?;
                }
                Ok(_) => {
                    self.counters.fail();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.tap_readable = false,
                Err(_) => {
                    // The frame is lost. If the TAP itself is gone, no further event will come.
                    self.counters.fail();
                    self.tap_readable = false;
                }
            }
        }
        let ring = active.rings.get_mut(RX).ok_or(RingError::NoQueue(RX))?;
        ring.signal(&memory)?;
        Ok(turn)
    }

    /// The buffers in which the next frame may go: all waiting chains, or only the first without merging.
    fn room<'m>(&self, memory: &'m Memory, merge: bool) -> Buffers<'m> {
        let mut room = Buffers::default();
        let most = if merge { usize::MAX } else { 1 };
        for waiting in self.waiting.iter().take(most) {
            room.extend(&Buffers::at(memory, &waiting.pieces));
        }
        room
    }

    /// Returns those chains to the guest that a frame of `len` bytes, header included, fills.
    fn deliver(
        &mut self,
        active: &mut Active,
        room: &Buffers<'_>,
        len: usize,
    ) -> Result<(), RingError> {
        let memory = &*active.memory;
        let ring = active.rings.get_mut(RX).ok_or(RingError::NoQueue(RX))?;
        let mut rest = len;
        let mut used = Vec::new();
        while rest > 0 {
            let Some(waiting) = self.waiting.pop_front() else {
                break;
            };
            self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting.len);
            let part = rest.min(waiting.len);
            rest = rest.saturating_sub(part);
            used.push((waiting.head, u32::try_from(part).unwrap_or(0)));
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        room.part(NUM_BUFFERS, 2).copy_from(&count.to_le_bytes());
        for (head, part) in used {
            ring.push(memory, head, part)?;
        }
        self.counters.read(len.saturating_sub(HEADER_BYTES));
        Ok(())
    }

    /// Moves frames from the guest to the TAP.
    fn transmit(&mut self, active: &mut Active) -> Result<Turn, RingError> {
        let memory = &*active.memory;
        let ring = active.rings.get_mut(TX).ok_or(RingError::NoQueue(TX))?;
        ring.serve(memory, BUDGET, |chain, _, budget| {
            match Chain::resolve(chain, memory, CHAIN_MAX, budget) {
                Ok(chain) => {
                    budget.spend_bytes(chain.readable.len().min(LARGEST_FRAME));
                    self.send(chain.readable, active.features);
                }
                Err(_) => {
                    self.counters.fail();
                }
            }
            Served::Whole(0)
        })
    }

    /// Sends one frame. A bad frame, or one that the TAP does not take, is dropped.
    fn send(&self, mut frame: Buffers<'_>, features: u64) {
        let Some(tap) = &self.tap else {
            return;
        };
        let header = frame.take::<HEADER_BYTES>().ok();
        let header = header.filter(|_| !frame.is_empty() && frame.len() <= LARGEST_FRAME);
        let checked = header.and_then(|raw| header::check(raw, frame.len(), features).ok());
        let Some(mut header) = checked else {
            self.counters.fail();
            return;
        };
        let mut whole = Buffers::default();
        whole.append(VolatileSlice::from(&mut header[..]));
        whole.extend(&frame);
        match sys::write(tap.as_fd(), whole.slices()) {
            Ok(len) => self.counters.written(len.saturating_sub(HEADER_BYTES)),
            Err(_) => {
                self.counters.fail();
            }
        }
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        F_MAC | F_MTU | F_STATUS | F_MRG_RXBUF | self.offload
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn config(&self) -> Vec<u8> {
        let [a, b, c, d, e, f] = self.mac.0;
        let [up, _] = u16::from(self.tap.is_some()).to_le_bytes();
        let [low, high] = self.mtu.to_le_bytes();
        // struct virtio_net_config (virtio 1.2, 5.1.4): mac, status, max_virtqueue_pairs, mtu.
        vec![a, b, c, d, e, f, up, 0, 1, 0, low, high]
    }

    fn activate(&mut self, active: Active) {
        self.set_offload(active.features);
        self.tap_readable = true;
        self.active = Some(active);
    }

    fn deactivate(&mut self) {
        self.active = None;
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self, _purpose: Purpose) -> Result<Option<Vec<QueueState>>, Busy> {
        let waiting = u16::try_from(self.waiting.len()).unwrap_or(0);
        let state = |(index, ring): (usize, &Ring)| match index {
            RX => ring.state_before(waiting),
            _ => ring.state(),
        };
        let active = self.active.as_ref();
        Ok(active.map(|active| active.rings.iter().enumerate().map(state).collect()))
    }

    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError> {
        let Some(mut active) = self.active.take() else {
            return Ok(Turn::Idle);
        };
        let turn = match index {
            RX => self.receive(&mut active),
            TX => self.transmit(&mut active),
            other => Err(RingError::NoQueue(other)),
        };
        self.active = Some(active);
        turn
    }

    fn host_source(&self) -> Option<RawFd> {
        self.tap.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn host_ready(&mut self) -> Result<Turn, RingError> {
        self.tap_readable = true;
        self.queue_ready(RX)
    }
}

#[cfg(test)]
mod tests;
