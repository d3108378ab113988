// SPDX-License-Identifier: Apache-2.0
//! What of a device is saved between two of its turns: the registers of its transport, and how far it is in its queues.
//! Pure.
//!
//! A device has nothing else of its own that the guest could miss, see [`super::VirtioDevice::save`]. What is read here may
//! have been written by anybody: [`super::mmio::MmioTransport::restore`] checks it as if the driver had written it.

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;

use crate::bounded::bounded;

/// No device has more queues, or a larger configuration space.
const MOST_QUEUES: usize = 8;
const MOST_CONFIG_BYTES: usize = 256;

/// What devices are saved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Others are forked from the VM, which ends. None of them knows whom its guest talks to.
    Template,
    /// The VM goes on. One that is restored tells its guest that all connections have ended.
    Checkpoint,
}

/// Why a device cannot be saved now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device} has {what}")]
pub struct Busy {
    pub device: &'static str,
    pub what: &'static str,
}

/// Why a transport cannot go on from a state.
#[derive(Debug, thiserror::Error)]
pub enum TransportRefused {
    #[error("its driver uses features {found:#x}, and this host offers {offered:#x}")]
    Features { found: u64, offered: u64 },
    #[error("it has {found} queues, this VMM's device has {here}")]
    Queues { found: usize, here: usize },
    #[error("queue {0} is not one that a driver may set up")]
    Queue(usize),
}

/// How far a device is in a queue, and where the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    most: u16,
    size: u16,
    is_ready: bool,
    has_event_index: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    /// How many bytes of the next chain have been served.
    done: u64,
}

impl QueueState {
    /// `waiting` chains were taken from the queue and not used: they will be taken once more.
    pub(super) fn of(queue: &Queue, done: usize, waiting: u16) -> Self {
        let state = queue.state();
        Self {
            most: state.max_size,
            size: state.size,
            is_ready: state.ready,
            has_event_index: state.event_idx_enabled,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail.wrapping_sub(waiting),
            next_used: state.next_used,
            done: u64::try_from(done).unwrap_or(0),
        }
    }

    /// The queue, if a driver could have set it up on a device whose queue has `most` entries.
    pub(super) fn queue(&self, most: u16) -> Option<Queue> {
        let state = virtio_queue::QueueState {
            max_size: self.most,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: self.has_event_index,
            size: self.size,
            ready: self.is_ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        Queue::try_from(state).ok().filter(|_| self.most == most)
    }

    pub(super) fn done(&self) -> usize {
        usize::try_from(self.done).unwrap_or(0)
    }
}

/// A device behind its transport (virtio 1.2, 4.2.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub(super) status: u32,
    pub(super) interrupt_status: u32,
    pub(super) generation: u32,
    pub(super) offered_half: u32,
    pub(super) accepted_half: u32,
    pub(super) selected: u32,
    pub(super) accepted: u64,
    /// Whether the device serves its queues. It does not after it has given up on them.
    pub(super) is_active: bool,
    #[serde(deserialize_with = "bounded::<MOST_QUEUES, _, _>")]
    pub(super) queues: Vec<QueueState>,
    /// The configuration space as the driver has seen it.
    #[serde(deserialize_with = "bounded::<MOST_CONFIG_BYTES, _, _>")]
    pub(super) config: Vec<u8>,
}

#[cfg(test)]
impl QueueState {
    /// Moves the descriptor table.
    pub fn move_to(&mut self, address: u64) {
        self.descriptors = address;
    }

    pub fn resize(&mut self, size: u16) {
        self.size = size;
    }
}

#[cfg(test)]
impl TransportState {
    /// A state of numbers that `next` makes up, with as many queues and as much configuration space as there may be.
    pub fn sample(mut next: impl FnMut() -> u64) -> Self {
        let mut word = || u32::try_from(next() >> 32).unwrap();
        let mut long = || u64::from(word()) << 32 | u64::from(word());
        let mut queue = || {
            let [a, b, c, d, flags, ..] = long().to_le_bytes();
            QueueState {
                most: u16::from_le_bytes([a, b]),
                size: u16::from_le_bytes([c, d]),
                is_ready: flags & 1 != 0,
                has_event_index: flags & 2 != 0,
                descriptors: long(),
                available: long(),
                used: long(),
                next_available: u16::from(a),
                next_used: u16::from(b),
                done: long(),
            }
        };
        Self {
            queues: (0..MOST_QUEUES).map(|_| queue()).collect(),
            status: word(),
            interrupt_status: word(),
            generation: word(),
            offered_half: word(),
            accepted_half: word(),
            selected: word(),
            accepted: u64::from(word()),
            is_active: word() & 1 != 0,
            config: (0..MOST_CONFIG_BYTES)
                .map(|_| word().to_le_bytes()[0])
                .collect(),
        }
    }
}
