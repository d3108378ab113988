// SPDX-License-Identifier: Apache-2.0
//! What the guest sees besides CPUs and memory: virtio devices behind MMIO transports, and a serial
//! port that only logs.
//!
//! [`mmio`] implements the transport (status, features, queue setup, reset) on vCPU threads. A device
//! serves its queues on a [`worker`] thread. They share the device's mutex: the transport locks it for
//! activation, reset and the configuration space, a worker for everything else. No device knows the
//! VM. Everything that comes from queues and registers may be hostile.
#![deny(clippy::indexing_slicing)]
#![deny(clippy::arithmetic_side_effects)]

pub mod balloon;
pub mod blk;
pub mod budget;
pub mod chain;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod driver;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod registers;
pub mod ring;
pub mod rng;
pub mod saved;
pub mod serial;
pub mod vsock;
pub mod worker;

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::memory::Memory;
pub use budget::Budget;
pub use ring::Turn;
use ring::{Interrupt, Ring, RingError};
use saved::{Busy, Purpose, QueueState};

/// What a device gets when the driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Active {
    pub memory: Arc<Memory>,
    pub rings: Vec<Ring>,
    /// The features that the driver accepted.
    pub features: u64,
    pub interrupt: Arc<Interrupt>,
}

impl Active {
    /// Where a device is in its queues, between two turns.
    fn queues(&self) -> Vec<QueueState> {
        self.rings.iter().map(Ring::state).collect()
    }
}

/// A virtio device behind its transport, which handles status, feature negotiation and reset.
pub trait VirtioDevice: Send {
    fn device_id(&self) -> u32;
    /// The feature bits of this device type. The transport adds those of the ring.
    fn features(&self) -> u64;
    fn queue_sizes(&self) -> &'static [u16];
    /// The configuration space.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, active: Active);
    /// Forgets everything about the guest: the driver reset the device, or a ring is broken.
    fn deactivate(&mut self);
    /// What [`Self::activate`] gave, until [`Self::deactivate`].
    fn active(&self) -> Option<&Active>;
    /// Where the device is in its queues, between two turns. `None` if it is not active. An error says what it has in
    /// flight that would be lost.
    fn save(&self, _purpose: Purpose) -> Result<Option<Vec<QueueState>>, Busy> {
        Ok(self.active().map(Active::queues))
    }
    /// Takes over what the driver has written to the configuration space, before the device is activated for a driver that
    /// goes on. Most devices have nothing to write there.
    fn restore_config(&mut self, _space: &[u8]) {}
    /// Serves queue `index`: the driver has notified it, or more chains were left than fit one turn.
    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError>;
    /// A host file descriptor to watch, edge-triggered.
    fn host_source(&self) -> Option<RawFd> {
        None
    }
    /// The host file descriptor had an event.
    fn host_ready(&mut self) -> Result<Turn, RingError> {
        Ok(Turn::Idle)
    }
}
