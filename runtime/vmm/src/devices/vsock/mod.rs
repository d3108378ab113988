// SPDX-License-Identifier: Apache-2.0
//! virtio-vsock (virtio 1.2, 5.10). Runs on the io worker. This file moves packets between the
//! queues and the [`muxer`], which owns the streams. [`reset`] tells the guest of a restored VM that its connections are gone.

mod alarm;
mod callers;
mod handshake;
pub mod muxer;
pub mod packet;
mod reset;
mod rooms;
mod stream;
mod table;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::chain::{Chain, ChainError};
use super::ring::RingError;
use super::saved::{Busy, Purpose, QueueState};
use super::{Active, Budget, Turn, VirtioDevice};
use crate::statistics::{DeviceCounters, Milestone};
use muxer::Muxer;
use packet::{CHAIN_MAX, HEADER_BYTES, Header};
use reset::Reset;
use rooms::Rooms;

const DEVICE_ID: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
/// The event queue. Its only event is the reset of the transport, see [`reset`].
const EVENT: usize = 2;
const BUDGET: Budget = Budget::of_chains(128);
/// The most receive buffers that a stream fills in one turn. Linux's buffers have 4 KiB.
const BURST: usize = 16;

/// The vsock device of one guest.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    active: Option<Active>,
    /// Packets of the guest wait, because it does not take our resets or the budget is used up.
    stalled: bool,
    reset: Reset,
    counters: Arc<DeviceCounters>,
    ready: Arc<Milestone>,
}

impl Vsock {
    #[must_use]
    pub fn new(
        guest_cid: u32,
        muxer: Muxer,
        counters: Arc<DeviceCounters>,
        ready: Arc<Milestone>,
    ) -> Self {
        Self {
            guest_cid: guest_cid.into(),
            muxer,
            active: None,
            stalled: false,
            reset: Reset::default(),
            counters,
            ready,
        }
    }

    /// Prepares for a guest that believes in connections which have ended: those of a VM that was saved.
    pub fn begin_with_reset(&mut self) -> io::Result<()> {
        self.reset = Reset::Due;
        self.muxer.use_other_ports()
    }

    /// Takes packets from the guest.
    fn transmit(&mut self, active: &mut Active) -> Result<Turn, RingError> {
        let memory = &*active.memory;
        let ring = active.rings.get_mut(TX).ok_or(RingError::NoQueue(TX))?;
        let mut turn = Turn::More;
        let mut budget = BUDGET;
        while budget.begin() {
            self.stalled = !self.muxer.takes_input();
            if self.stalled {
                turn = Turn::Idle;
                break;
            }
            let Some(chain) = ring.pop(memory)? else {
                if ring.rearm(memory)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head_index();
            let chain = Chain::resolve(chain, memory, CHAIN_MAX, &mut budget);
            match chain.and_then(|chain| self.take_packet(chain)) {
                Ok(len) => budget.spend_bytes(len),
                Err(_) => {
                    self.counters.fail();
                }
            }
            ring.push(memory, head, 0)?;
        }
        ring.signal(memory)?;
        // After a full budget the rest is taken at the next turn, whatever causes that.
        self.stalled |= turn == Turn::More;
        Ok(turn)
    }

    /// Takes one packet. Returns how many bytes of data it has.
    fn take_packet(&mut self, mut chain: Chain<'_>) -> Result<usize, ChainError> {
        let header = Header::parse(&chain.readable.take::<HEADER_BYTES>()?);
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let (data, _) = chain.readable.split(len)?;
        self.muxer.from_guest(&header, &data);
        Ok(len)
    }

    /// Gives packets to the guest as long as it has receive buffers.
    fn receive(&mut self, active: &mut Active) -> Result<Turn, RingError> {
        let memory = &*active.memory;
        let ring = active.rings.get_mut(RX).ok_or(RingError::NoQueue(RX))?;
        let mut rooms = Rooms::default();
        let mut turn = Turn::More;
        let mut wanted = 1;
        let mut budget = BUDGET;
        while budget.begin() {
            if !self.muxer.has_output() {
                turn = Turn::Idle;
                break;
            }
            rooms.take(wanted, ring, memory, &self.counters, &mut budget)?;
            if rooms.is_empty() {
                if ring.rearm(memory)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            }
            let room = rooms.data();
            let Some(header) = self.muxer.next_packet(&room) else {
                continue;
            };
            let len = usize::try_from(header.len).unwrap_or(usize::MAX);
            rooms.give(header, ring, memory)?;
            budget.spend_bytes(len);
            // A stream that fills its buffers may have much to send, so the next read may fill several.
            wanted = if len >= room.len() { BURST } else { 1 };
        }
        rooms.put_back(ring);
        ring.signal(memory)?;
        Ok(turn)
    }

    /// Gives packets to the guest, after taking packets from it if `take` is set. Also takes packets that were
    /// stalled, if there is a place for resets again. A guest that has to forget its connections does so before it is given
    /// packets.
    fn turn(&mut self, take: bool) -> Result<Turn, RingError> {
        let Some(mut active) = self.active.take() else {
            return Ok(Turn::Idle);
        };
        let result = (|| {
            let mut turn = Turn::Idle;
            if take {
                turn = self.transmit(&mut active)?;
            }
            let events = active.rings.get_mut(EVENT);
            let events = events.ok_or(RingError::NoQueue(EVENT))?;
            if !self.reset.advance(events, &active.memory, &self.counters)? {
                return Ok(turn);
            }
            let mut received = self.receive(&mut active)?;
            if self.stalled && self.muxer.takes_input() {
                turn = self.transmit(&mut active)?;
                received = self.receive(&mut active)?;
            }
            Ok(if received == Turn::More {
                received
            } else {
                turn
            })
        })();
        self.active = Some(active);
        result
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 16]
    }

    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, active: Active) {
        self.ready.reached();
        self.active = Some(active);
    }

    fn deactivate(&mut self) {
        self.active = None;
        self.stalled = false;
        // The driver has forgotten them.
        self.reset = Reset::Over;
        self.muxer.guest_reset();
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self, purpose: Purpose) -> Result<Option<Vec<QueueState>>, Busy> {
        let is_quiet = !self.stalled && self.muxer.is_quiet();
        if purpose == Purpose::Template && !is_quiet {
            return Err(Busy {
                device: "vsock",
                what: "a connection open",
            });
        }
        Ok(self.active().map(Active::queues))
    }

    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError> {
        match index {
            RX => self.turn(false),
            TX => self.turn(true),
            EVENT => self.turn(false),
            other => Err(RingError::NoQueue(other)),
        }
    }

    fn host_source(&self) -> Option<RawFd> {
        Some(self.muxer.event_source())
    }

    fn host_ready(&mut self) -> Result<Turn, RingError> {
        let polled = self.muxer.poll();
        let turned = self.turn(false)?;
        Ok(if polled == Turn::More { polled } else { turned })
    }
}
