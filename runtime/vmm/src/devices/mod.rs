// SPDX-License-Identifier: Apache-2.0
//! What the guest sees besides CPUs and memory: virtio devices on MMIO transports and a serial
//! port that only logs.
//!
//! [`mmio`] owns the virtio rules (status, features, queues, reset) and runs on vCPU threads; a
//! device owns its data and runs on a [`worker`] thread. They meet in the device's mutex: the
//! transport takes it for activation, reset and the configuration space, a worker for everything
//! else. A device never knows the VM. Everything in queues and registers is hostile.
#![deny(clippy::indexing_slicing)]
#![deny(clippy::arithmetic_side_effects)]

pub mod balloon;
pub mod blk;
pub mod chain;
#[cfg(test)]
mod driver;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod registers;
pub mod ring;
pub mod rng;
pub mod serial;
pub mod vsock;
pub mod worker;

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::memory::Memory;
pub use ring::Turn;
use ring::{Interrupt, Ring, RingError};

/// What a device gets when the driver sets DRIVER_OK, all of it at once.
#[derive(Debug)]
pub struct Active {
    pub memory: Arc<Memory>,
    pub rings: Vec<Ring>,
    /// What the driver accepted.
    pub features: u64,
    pub interrupt: Arc<Interrupt>,
}

/// The device half of a virtio device. The transport owns status, feature negotiation and reset.
pub trait VirtioDevice: Send {
    fn device_id(&self) -> u32;
    /// Its own feature bits; the transport adds those of the ring.
    fn features(&self) -> u64;
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration space.
    fn config(&self) -> Vec<u8>;
    /// Most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, active: Active);
    /// The driver reset the device, or its ring broke: forget everything of the guest.
    fn deactivate(&mut self);
    /// The driver has put something in queue `index`.
    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError>;
    /// A host descriptor to watch for input, edge-triggered.
    fn host_source(&self) -> Option<RawFd> {
        None
    }
    /// The host descriptor has something.
    fn host_ready(&mut self) -> Result<Turn, RingError> {
        Ok(Turn::Idle)
    }
}
