// SPDX-License-Identifier: Apache-2.0
//! A queue of an active device, with its interrupt: pops chains from the available ring, pushes them to
//! the used ring, and signals the driver once per turn.

use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::budget::Budget;
use super::registers::RegisterPage;
use super::saved::QueueState;
use crate::memory::Memory;

/// Registers that a device changes without a write of the driver (virtio 1.2, 4.2.2).
pub const INTERRUPT_STATUS: u64 = 0x60;
pub const DEVICE_STATUS: u64 = 0x70;
pub const CONFIG_GENERATION: u64 = 0xfc;

/// Interrupt status bits.
pub const USED_RING: u32 = 1;
const CONFIG_CHANGE: u32 = 2;
/// The status bit DEVICE_NEEDS_RESET (2.1).
const NEEDS_RESET: u32 = 0x40;

/// Why a ring cannot be used any more. The device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("queue is broken")]
    Broken(#[source] virtio_queue::Error),
    #[error("available ring has a chain that cannot be read")]
    Unreadable,
    #[error("device has no queue {0}")]
    NoQueue(usize),
}

/// What a device wants after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Call it again when something happens.
    Idle,
    /// Call it again after the other devices had their turn.
    More,
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It goes back to the driver with so many bytes written to it.
    Whole(usize),
    /// The turn is over in the midst of it. At the next turn the device goes on after so many bytes of it.
    Until(usize),
}

/// The interrupt line of one device, with its interrupt registers.
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
        // Fails only if the counter is at its maximum. Then an interrupt is pending anyway.
        let _ = self.line.write(1);
    }

    pub fn used_ring(&self) {
        self.raise(USED_RING);
    }

    /// Sets the configuration space and tells the driver that it changed.
    pub fn config_changed(&self, space: &[u8]) {
        self.registers.show_config(space);
        self.registers.increment(CONFIG_GENERATION);
        self.raise(CONFIG_CHANGE);
    }

    /// Sets DEVICE_NEEDS_RESET: the device has given up on its rings.
    pub fn needs_reset(&self) {
        self.registers.set_bits(DEVICE_STATUS, NEEDS_RESET);
        self.raise(CONFIG_CHANGE);
    }

    /// Clears the bits that the driver has handled, except [`USED_RING`]. That bit may stay set, because a
    /// driver looks into its rings at every interrupt. So an acknowledgement of it alone need not cause an exit.
    pub fn acknowledge(&self, bits: u32) {
        self.registers
            .clear_bits(INTERRUPT_STATUS, bits & !USED_RING);
    }

    pub fn reset(&self) {
        self.registers.show(INTERRUPT_STATUS, 0);
        self.registers.show(DEVICE_STATUS, 0);
    }
}

/// One virtqueue, from the device's side.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    interrupt: Arc<Interrupt>,
    pushed: bool,
    /// How much of the next chain earlier turns have served.
    done: usize,
}

impl Ring {
    /// `queue` has been checked by the transport. One that is not ready has no chains.
    #[must_use]
    pub fn new(queue: Queue, interrupt: Arc<Interrupt>) -> Self {
        Self {
            queue,
            interrupt,
            pushed: false,
            done: 0,
        }
    }

    /// A ring that goes on where another was.
    #[must_use]
    pub fn restored(queue: Queue, state: &QueueState, interrupt: Arc<Interrupt>) -> Self {
        Self {
            done: state.done(),
            ..Self::new(queue, interrupt)
        }
    }

    /// Where it is between two turns.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.state_before(0)
    }

    /// The same, as if the last `waiting` chains had not been popped. None of them may have been pushed.
    #[must_use]
    pub fn state_before(&self, waiting: u16) -> QueueState {
        QueueState::of(&self.queue, self.done, waiting)
    }

    /// Takes the next chain from the available ring.
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
        // The index says that there is one, so `None` means that the ring itself is unreadable.
        chains.next().map(Some).ok_or(RingError::Unreadable)
    }

    /// Undoes the last [`Self::pop`].
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Puts a chain on the used ring. `len` bytes were written to it.
    pub fn push(&mut self, memory: &Memory, head: u16, len: u32) -> Result<(), RingError> {
        self.pushed = true;
        self.done = 0;
        self.queue
            .add_used(memory, head, len)
            .map_err(RingError::Broken)
    }

    /// Asks the driver for notifications. True if chains became available in the meantime: go on popping.
    pub fn rearm(&mut self, memory: &Memory) -> Result<bool, RingError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue
            .enable_notification(memory)
            .map_err(RingError::Broken)
    }

    /// Where the available ring ends. It moves with each chain that the driver makes available.
    pub fn end(&self, memory: &Memory) -> Result<u16, RingError> {
        let end = self.queue.avail_idx(memory, Ordering::Acquire);
        Ok(end.map_err(RingError::Broken)?.0)
    }

    /// Asks the driver for a notification of the next chain that it makes available, although others may wait. Returns
    /// [`Self::end`] as it is after that.
    pub fn rearm_at_end(&mut self, memory: &Memory) -> Result<u16, RingError> {
        let next = self.queue.next_avail();
        let end = self.end(memory)?;
        self.queue.set_next_avail(end);
        let rearmed = self.queue.enable_notification(memory);
        self.queue.set_next_avail(next);
        rearmed.map_err(RingError::Broken)?;
        self.end(memory)
    }

    /// Serves chains until there are none or `budget` is used up, then signals once. `serve` handles one
    /// chain, of which earlier turns have served so many bytes. Between two turns the driver can change a chain, so
    /// `serve` checks all of it at each.
    pub fn serve<'m>(
        &mut self,
        memory: &'m Memory,
        mut budget: Budget,
        mut serve: impl FnMut(DescriptorChain<&'m Memory>, usize, &mut Budget) -> Served,
    ) -> Result<Turn, RingError> {
        let mut turn = Turn::More;
        while budget.begin() {
            let Some(chain) = self.pop(memory)? else {
                if self.rearm(memory)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head_index();
            match serve(chain, self.done, &mut budget) {
                Served::Whole(len) => {
                    self.push(memory, head, u32::try_from(len).unwrap_or(u32::MAX))?;
                }
                Served::Until(done) => {
                    self.undo_pop();
                    self.done = done;
                    break;
                }
            }
        }
        self.signal(memory)?;
        Ok(turn)
    }

    /// Interrupts the guest if chains were pushed and the driver wants an interrupt.
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
