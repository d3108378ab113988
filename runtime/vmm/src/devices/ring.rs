// SPDX-License-Identifier: Apache-2.0
//! A queue of an active device with its interrupt: pop chains, push them back, signal once.

use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::registers::RegisterPage;
use crate::memory::Memory;

/// Registers that a device changes by itself (virtio 1.2, 4.2.2).
pub const INTERRUPT_STATUS: u64 = 0x60;
pub const DEVICE_STATUS: u64 = 0x70;
pub const CONFIG_GENERATION: u64 = 0xfc;

/// Interrupt status bits.
pub const USED_RING: u32 = 1;
const CONFIG_CHANGE: u32 = 2;
/// A device status bit (2.1).
const NEEDS_RESET: u32 = 0x40;

/// A ring that cannot be used any more. The device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("queue is broken")]
    Broken(#[source] virtio_queue::Error),
    #[error("queue has chains that cannot be read")]
    Unreadable,
    #[error("device has no queue {0}")]
    NoQueue(usize),
}

/// What a device wants after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// To be called when something happens.
    Idle,
    /// To be called again after the others had their turn.
    More,
}

/// The interrupt line of one device, and what its registers say of it.
#[derive(Debug)]
pub struct Interrupt {
    line: EventFd,
    registers: RegisterPage,
}

impl Interrupt {
    pub fn new(registers: RegisterPage) -> io::Result<Self> {
        Ok(Self {
            line: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            registers,
        })
    }

    /// The eventfd to register as an irqfd.
    #[must_use]
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    fn raise(&self, bit: u32) {
        self.registers.set_bits(INTERRUPT_STATUS, bit);
        // Fails only if the counter is at its maximum, and then the line is high anyway.
        let _ = self.line.write(1);
    }

    pub fn used_ring(&self) {
        self.raise(USED_RING);
    }

    /// The configuration space is `space` from now on.
    pub fn config_changed(&self, space: &[u8]) {
        self.registers.show_config(space);
        self.registers.increment(CONFIG_GENERATION);
        self.raise(CONFIG_CHANGE);
    }

    /// The device gave up on its rings (DEVICE_NEEDS_RESET).
    pub fn needs_reset(&self) {
        self.registers.set_bits(DEVICE_STATUS, NEEDS_RESET);
        self.raise(CONFIG_CHANGE);
    }

    /// The driver has seen these bits. That of used buffers stays: a driver looks into its rings at every interrupt,
    /// and saying that it did (alone, [`USED_RING`]) need not come here.
    pub fn acknowledge(&self, bits: u32) {
        self.registers
            .clear_bits(INTERRUPT_STATUS, bits & !USED_RING);
    }

    pub fn reset(&self) {
        self.registers.show(INTERRUPT_STATUS, 0);
        self.registers.show(DEVICE_STATUS, 0);
    }
}

/// One queue, from the device's side.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    interrupt: Arc<Interrupt>,
    pushed: bool,
}

impl Ring {
    /// `queue` has been checked by the transport, or is not ready and then stays empty.
    #[must_use]
    pub fn new(queue: Queue, interrupt: Arc<Interrupt>) -> Self {
        Self {
            queue,
            interrupt,
            pushed: false,
        }
    }

    /// Takes the next chain that the driver made available.
    pub fn pop<'m>(
        &mut self,
        memory: &'m Memory,
    ) -> Result<Option<DescriptorChain<&'m Memory>>, RingError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let available = self.queue.avail_idx(memory, Ordering::Acquire);
        if available.map_err(RingError::Broken)? == Wrapping(self.queue.next_avail()) {
            return Ok(None);
        }
        let mut chains = self.queue.iter(memory).map_err(RingError::Broken)?;
        // There is one, so none here means that the ring itself cannot be read.
        chains.next().map(Some).ok_or(RingError::Unreadable)
    }

    /// Puts back the chain that [`Self::pop`] returned last.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain of which `len` bytes were written.
    pub fn push(&mut self, memory: &Memory, head: u16, len: u32) -> Result<(), RingError> {
        self.pushed = true;
        self.queue
            .add_used(memory, head, len)
            .map_err(RingError::Broken)
    }

    /// Asks to be told of new chains. True if some came in the meantime: then go on popping.
    pub fn rearm(&mut self, memory: &Memory) -> Result<bool, RingError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue
            .enable_notification(memory)
            .map_err(RingError::Broken)
    }

    /// Serves chains until there are none or `budget` is used up, and signals once. `serve` does one and returns how
    /// many bytes it wrote.
    pub fn serve<'m>(
        &mut self,
        memory: &'m Memory,
        budget: usize,
        mut serve: impl FnMut(DescriptorChain<&'m Memory>) -> usize,
    ) -> Result<Turn, RingError> {
        let mut turn = Turn::More;
        for _ in 0..budget {
            let Some(chain) = self.pop(memory)? else {
                if self.rearm(memory)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head_index();
            let len = serve(chain);
            self.push(memory, head, u32::try_from(len).unwrap_or(u32::MAX))?;
        }
        self.signal(memory)?;
        Ok(turn)
    }

    /// Interrupts the guest if chains were returned and it wants to know.
    pub fn signal(&mut self, memory: &Memory) -> Result<(), RingError> {
        if !std::mem::take(&mut self.pushed) {
            return Ok(());
        }
        let wanted = self.queue.needs_notification(memory);
        if wanted.map_err(RingError::Broken)? {
            self.interrupt.used_ring();
        }
        Ok(())
    }
}
