// SPDX-License-Identifier: Apache-2.0
//! virtio-fs (virtio 1.2, 5.11) without a file system: FUSE requests go to a file server over a
//! stream socket, and its replies come back. Runs on the files worker.
//!
//! Every VM has this device; a server is connected later or never. Requests are answered with
//! ENOTCONN while there has been no server, and with EIO after it has gone. This file checks what the
//! guest sends, [`flight`] remembers which requests wait for a reply, and [`link`] owns the socket and
//! checks what the server sends.
//!
//! ```text
//! guest chain -> copy, check, number -> socket -> server -> socket -> check -> guest chain
//! ```

mod flight;
mod link;

use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::{fmt, io};

use bulkhead_share::fuse::{MOST_BYTES, REPLY_HEADER, REQUEST_HEADER, UNANSWERED, failure};

use super::chain::{Buffers, Chain, writable_places};
use super::ring::RingError;
use super::saved::{Busy, Purpose, QueueState};
use super::{Active, Budget, Turn, VirtioDevice};
use crate::memory::Memory;
use crate::statistics::DeviceCounters;
use flight::{CHAIN_MAX, Flight, REQUEST_PLACES, Waiting};
use link::{Arrived, Link};

const DEVICE_ID: u32 = 26;
/// The tag that the guest mounts.
pub const TAG: &[u8] = b"bulkhead";
/// The configuration space has `tag`, then `num_request_queues` (virtio 1.2, 5.11.4).
const TAG_BYTES: usize = 36;
/// The high-priority queue: FORGET, which has no reply, and INTERRUPT.
const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
const QUEUE_SIZES: [u16; 2] = [128, REQUEST_PLACES];
/// How many requests or replies are served before other devices get their turn.
const BUDGET: Budget = Budget::of_chains(64);

/// The fields of `struct fuse_in_header` that the device looks at. The server gets the whole header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RequestHeader {
    len: u32,
    opcode: u32,
    unique: u64,
}

impl RequestHeader {
    fn parse(bytes: &[u8; REQUEST_HEADER]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ..] = *bytes;
        Self {
            len: u32::from_le_bytes([a, b, c, d]),
            opcode: u32::from_le_bytes([e, f, g, h]),
            unique: u64::from_le_bytes([i, j, k, l, m, n, o, p]),
        }
    }
}

/// The shared directories of one guest.
pub struct Fs {
    link: Link,
    flight: Flight,
    active: Option<Active>,
    counters: Arc<DeviceCounters>,
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fs")
            .field("link", &self.link)
            .field("flight", &self.flight)
            .finish_non_exhaustive()
    }
}

impl Fs {
    pub fn new(counters: Arc<DeviceCounters>) -> io::Result<Self> {
        Ok(Self {
            link: Link::new()?,
            flight: Flight::default(),
            active: None,
            counters,
        })
    }

    /// Connects the file server. There can be only one at a time.
    pub fn connect(&mut self, server: UnixStream) -> io::Result<()> {
        self.link.connect(server)
    }

    /// Takes requests from the guest as long as the server can take them.
    fn take(&mut self, active: &mut Active, queue: usize) -> Result<Turn, RingError> {
        let memory = Arc::clone(&active.memory);
        let ring = active.rings.get_mut(queue);
        let ring = ring.ok_or(RingError::NoQueue(queue))?;
        let mut turn = Turn::More;
        let mut budget = BUDGET;
        while budget.begin() {
            // The remaining requests wait in the ring until the server has read or answered some.
            if !self.link.takes_output() || self.flight.is_full() {
                turn = Turn::Idle;
                break;
            }
            let Some(chain) = ring.pop(&memory)? else {
                if ring.rearm(&memory)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head_index();
            let room = writable_places(chain.clone(), &memory, CHAIN_MAX, &mut budget);
            let request = Chain::resolve(chain, &memory, CHAIN_MAX, &mut budget);
            let sent = match (room, request) {
                (Ok(room), Ok(chain)) => {
                    budget.spend_bytes(chain.readable.len().min(MOST_BYTES));
                    let waiting = Waiting {
                        queue,
                        head,
                        unique: 0,
                        room,
                    };
                    self.send(&memory, &chain.readable, waiting)
                }
                _ => Some(self.counters.fail()),
            };
            if let Some(len) = sent {
                ring.push(&memory, head, u32::try_from(len).unwrap_or(0))?;
            }
        }
        ring.signal(&memory)?;
        Ok(turn)
    }

    /// Checks a copy of a request and sends that copy to the server. Returns `None` if the chain has to wait
    /// for a reply; otherwise how many bytes were written to the chain, which can go back at once.
    fn send(
        &mut self,
        memory: &Memory,
        request: &Buffers<'_>,
        mut waiting: Waiting,
    ) -> Option<usize> {
        let mut start = [0; REQUEST_HEADER];
        if request.copy_to(&mut start) < REQUEST_HEADER {
            return Some(self.counters.fail());
        }
        let header = RequestHeader::parse(&start);
        waiting.unique = header.unique;
        let room = Buffers::at(memory, &waiting.room);
        let refuse = |errno| match room.len() >= REPLY_HEADER {
            true => Some(room.copy_from(&failure(header.unique, errno))),
            false => Some(0),
        };
        let len = request.len();
        let answered = !UNANSWERED.contains(&header.opcode);
        if u32::try_from(len) != Ok(header.len)
            || len > MOST_BYTES
            || (answered && room.len() < REPLY_HEADER)
        {
            self.counters.fail();
            return refuse(libc::EINVAL);
        }
        if let Some(errno) = self.link.refusal() {
            self.counters.fail();
            return refuse(errno);
        }
        let mut message = vec![0; len];
        request.copy_to(&mut message);
        if answered {
            // Replace the guest's number by our own, so that no two requests in flight have the same.
            let Some(number) = self.flight.begin(waiting) else {
                return refuse(libc::EBUSY);
            };
            if let Some(unique) = start.get_mut(8..16) {
                unique.copy_from_slice(&number.to_le_bytes());
            }
        }
        // The guest may have changed the header in the meantime. Send the one that was checked.
        if let Some(first) = message.get_mut(..REQUEST_HEADER) {
            first.copy_from_slice(&start);
        }
        self.counters.written(len);
        self.link.send(message);
        if answered { None } else { Some(0) }
    }

    /// Hands replies to the guest.
    fn give(&mut self, active: &mut Active) -> Result<Turn, RingError> {
        let memory = Arc::clone(&active.memory);
        let mut turn = Turn::More;
        let mut budget = BUDGET;
        while budget.begin() {
            let (waiting, len) = match self.link.receive(&memory, &mut self.flight) {
                Arrived::Reply { waiting, len } => (waiting, len),
                Arrived::Nothing => {
                    turn = Turn::Idle;
                    break;
                }
                Arrived::End => {
                    self.fail_all(active)?;
                    turn = Turn::Idle;
                    break;
                }
            };
            let bytes = usize::try_from(len).unwrap_or(0);
            budget.spend_buffers(waiting.room.len());
            budget.spend_bytes(bytes);
            self.counters.read(bytes);
            let ring = active.rings.get_mut(waiting.queue);
            let ring = ring.ok_or(RingError::NoQueue(waiting.queue))?;
            ring.push(&memory, waiting.head, len)?;
        }
        for ring in &mut active.rings {
            ring.signal(&memory)?;
        }
        Ok(turn)
    }

    /// Fails all requests in flight, because the server has gone.
    fn fail_all(&mut self, active: &mut Active) -> Result<(), RingError> {
        let memory = Arc::clone(&active.memory);
        for waiting in self.flight.take_all() {
            self.counters.fail();
            let room = Buffers::at(&memory, &waiting.room);
            let len = room.copy_from(&failure(waiting.unique, libc::EIO));
            let ring = active.rings.get_mut(waiting.queue);
            let ring = ring.ok_or(RingError::NoQueue(waiting.queue))?;
            ring.push(&memory, waiting.head, u32::try_from(len).unwrap_or(0))?;
        }
        Ok(())
    }

    fn with_active(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Active) -> Result<Turn, RingError>,
    ) -> Result<Turn, RingError> {
        let Some(mut active) = self.active.take() else {
            return Ok(Turn::Idle);
        };
        let result = work(self, &mut active);
        self.active = Some(active);
        result
    }
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut space = vec![0; TAG_BYTES + 4];
        for (to, from) in space.iter_mut().zip(TAG) {
            *to = *from;
        }
        if let Some(queues) = space.get_mut(TAG_BYTES) {
            *queues = 1;
        }
        space
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn deactivate(&mut self) {
        self.active = None;
        self.flight = Flight::default();
        // The FUSE session that the server knows is of no use to a driver that starts again.
        self.link.close();
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn save(&self, _purpose: Purpose) -> Result<Option<Vec<QueueState>>, Busy> {
        // What the server knows of the session is in no state here.
        if !self.link.is_new() {
            return Err(Busy {
                device: "shared directories",
                what: "or had a file server",
            });
        }
        Ok(self.active().map(Active::queues))
    }

    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError> {
        match index {
            HIPRIO | REQUESTS => self.with_active(|fs, active| {
                let turn = fs.take(active, index)?;
                if fs.link.is_lost() {
                    fs.give(active)?;
                }
                Ok(turn)
            }),
            other => Err(RingError::NoQueue(other)),
        }
    }

    fn host_source(&self) -> Option<RawFd> {
        Some(self.link.event_source())
    }

    fn host_ready(&mut self) -> Result<Turn, RingError> {
        self.link.poll();
        self.with_active(|fs, active| {
            let mut turn = fs.give(active)?;
            // The server may have read or answered something, so requests that waited in the rings can go on.
            for queue in [HIPRIO, REQUESTS] {
                if fs.take(active, queue)? == Turn::More {
                    turn = Turn::More;
                }
            }
            Ok(turn)
        })
    }
}

#[cfg(test)]
mod tests;
