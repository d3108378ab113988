// SPDX-License-Identifier: Apache-2.0
//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2): registers, status handshake, feature
//! negotiation, queue setup, reset. Writes of the driver come here, on vCPU threads, under the lock of
//! the bus slot. Reads do not: the driver finds the values in the [`RegisterPage`].

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::registers::{CONFIG_SPACE, RegisterPage};
use super::ring::{CONFIG_GENERATION, DEVICE_STATUS, INTERRUPT_STATUS, Interrupt, Ring, USED_RING};
use super::saved::{Busy, Purpose, QueueState, TransportRefused, TransportState};
use super::{Active, VirtioDevice};
use crate::memory::Memory;

/// The driver writes a queue's number here to notify the device.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// The driver writes here which interrupts it has handled.
pub const INTERRUPT_ACK: u64 = 0x64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"BULK");

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

/// Device status bits (virtio 1.2, 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const FAILED: u32 = 0x80;
    pub const KNOWN: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// A device, shared by its transport, its worker and, for some devices, the control socket.
pub type SharedDevice = Arc<Mutex<dyn VirtioDevice>>;

/// While it is there, the device has no turn.
pub type Turnless<'a> = MutexGuard<'a, dyn VirtioDevice + 'static>;

/// The transport of one device.
#[allow(missing_debug_implementations)]
pub struct MmioTransport {
    device: SharedDevice,
    memory: Arc<Memory>,
    registers: RegisterPage,
    interrupt: Arc<Interrupt>,
    notifiers: Arc<[EventFd]>,
    queues: Vec<Queue>,
    offered: u64,
    accepted: u64,
    status: u32,
    offered_half: u32,
    accepted_half: u32,
    selected: u32,
}

/// Locks a mutex. A panic under a lock ends the process, so nobody ever sees a poisoned one.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MmioTransport {
    pub fn new(
        device: SharedDevice,
        memory: Arc<Memory>,
        registers: RegisterPage,
    ) -> io::Result<Self> {
        let interrupt = Arc::new(Interrupt::new(registers.clone())?);
        let (device_id, offered, sizes) = {
            let device = lock(&device);
            (device.device_id(), device.features(), device.queue_sizes())
        };
        let queues: Result<Vec<_>, _> = sizes.iter().map(|&size| Queue::new(size)).collect();
        let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
        let notifiers: io::Result<Vec<_>> = sizes.iter().map(|_| EventFd::new(flags)).collect();
        for (offset, value) in [
            (0x00, MAGIC),
            (0x04, VERSION),
            (0x08, device_id),
            (0x0c, VENDOR),
        ] {
            registers.show(offset, value);
        }
        // Length of shared memory regions: all ones means that there is none (4.2.2).
        for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
            registers.show(offset, u32::MAX);
        }
        let transport = Self {
            device,
            memory,
            registers,
            interrupt,
            notifiers: notifiers?.into(),
            queues: queues.map_err(io::Error::other)?,
            offered: offered | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC,
            accepted: 0,
            status: 0,
            offered_half: 0,
            accepted_half: 0,
            selected: 0,
        };
        transport.show();
        Ok(transport)
    }

    #[must_use]
    pub fn device(&self) -> SharedDevice {
        Arc::clone(&self.device)
    }

    #[must_use]
    pub fn interrupt(&self) -> Arc<Interrupt> {
        Arc::clone(&self.interrupt)
    }

    /// One eventfd per queue. The driver's notification writes to it.
    #[must_use]
    pub fn notifiers(&self) -> Arc<[EventFd]> {
        Arc::clone(&self.notifiers)
    }

    /// Updates the register page after a write that may have changed these values.
    fn show(&self) {
        let (size, ready) = self.queue().map_or((0, false), |queue| {
            (u32::from(queue.max_size()), queue.ready())
        });
        self.registers
            .show(0x10, half(self.offered, self.offered_half));
        self.registers.show(0x34, size);
        self.registers.show(0x44, u32::from(ready));
        self.registers.set_bits(DEVICE_STATUS, self.status);
    }

    /// Reads a register as the driver sees it. Normally the driver reads the page itself, without an exit.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    /// Handles the driver's write of `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            let mut device = lock(&self.device);
            device.write_config(offset, data);
            self.show_config(&*device);
        } else if let Ok(bytes) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(bytes));
            self.show();
        }
    }

    /// Handles a write to a register (offsets: virtio 1.2, 4.2.2). Some work only in one phase of the handshake.
    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.offered_half = value,
            0x20 if self.is(status::DRIVER) && !self.is(status::FEATURES_OK) => {
                self.accept(value);
            }
            0x24 => self.accepted_half = value,
            0x30 => self.selected = value,
            QUEUE_NOTIFY => self.notify(value),
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            DEVICE_STATUS => self.write_status(value),
            _ if self.is(status::FEATURES_OK) && !self.is(status::DRIVER_OK) => {
                self.write_queue(offset, value);
            }
            _ => {}
        }
    }

    fn is(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.selected).ok()?)
    }

    /// Takes over one half of the features that the driver accepts.
    fn accept(&mut self, value: u32) {
        let value = u64::from(value);
        self.accepted = match self.accepted_half {
            0 => (self.accepted & !0xffff_ffff) | value,
            1 => (self.accepted & 0xffff_ffff) | value << 32,
            _ => self.accepted,
        };
    }

    /// Notifies the device of a queue. Normally an ioeventfd does this without an exit.
    fn notify(&self, queue: u32) {
        let notifier = usize::try_from(queue)
            .ok()
            .and_then(|q| self.notifiers.get(q));
        if let Some(notifier) = notifier {
            let _ = notifier.write(1);
        }
    }

    /// Handles a write to a register of the selected queue: size, ready, or half of an address.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let Ok(selected) = usize::try_from(self.selected) else {
            return;
        };
        let Some(queue) = self.queues.get_mut(selected) else {
            return;
        };
        if queue.ready() && offset != 0x44 {
            return;
        }
        match offset {
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // A driver clears status bits only by a reset (2.1.1).
        let mut new = (value & status::KNOWN) & !self.status;
        if new & status::FEATURES_OK != 0 && !self.features_are_ok() {
            new &= !status::FEATURES_OK;
        }
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        if new & status::DRIVER_OK != 0 && (self.status | new) & ready != ready {
            new &= !status::DRIVER_OK;
        }
        self.status |= new;
        if new & status::DRIVER_OK != 0 {
            self.activate();
        } else {
            // The driver may read the space now, so it must be current. A change is announced only after DRIVER_OK.
            self.show_config(&*lock(&self.device));
        }
    }

    /// Shows the configuration space. True if it changed. A disk may grow or shrink meanwhile and show its new size, so
    /// this goes on until what it has shown is still true.
    fn show_config(&self, device: &dyn VirtioDevice) -> bool {
        let mut changed = false;
        loop {
            let space = device.config();
            changed |= self.registers.show_config(&space);
            if device.config() == space {
                return changed;
            }
        }
    }

    fn features_are_ok(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }

    /// Checks the queues and hands them to the device; if one is bad, sets DEVICE_NEEDS_RESET.
    fn activate(&mut self) {
        let bad = |queue: &&Queue| queue.ready() && !queue.is_valid(&*self.memory);
        if self.queues.iter().find(bad).is_some() {
            self.interrupt.needs_reset();
            return;
        }
        let event_idx = self.accepted & F_EVENT_IDX != 0;
        let rings = self.hand_over_queues().into_iter().map(|mut queue| {
            queue.set_event_idx(event_idx);
            Ring::new(queue, Arc::clone(&self.interrupt))
        });
        self.start_device(rings.collect());
    }

    /// Lets the device serve these rings.
    fn start_device(&self, rings: Vec<Ring>) {
        let active = Active {
            memory: Arc::clone(&self.memory),
            rings,
            features: self.accepted,
            interrupt: Arc::clone(&self.interrupt),
        };
        let mut device = lock(&self.device);
        device.activate(active);
        if self.show_config(&*device) {
            self.interrupt.config_changed(&device.config());
        }
        drop(device);
        // Chains may be available already, and the driver does not have to notify the device again.
        for notifier in self.notifiers.iter() {
            let _ = notifier.write(1);
        }
    }

    /// Takes the queues for the device. The copies that stay hold what the registers show from now on.
    fn hand_over_queues(&mut self) -> Vec<Queue> {
        let shown = self.queues.iter().filter_map(|queue| {
            let mut shown = Queue::new(queue.max_size()).ok()?;
            shown.set_ready(queue.ready());
            Some(shown)
        });
        let shown = shown.collect();
        std::mem::replace(&mut self.queues, shown)
    }

    /// The state of this transport's device, which the caller has locked between two of its turns. Call it while no vCPU
    /// runs.
    pub fn save(
        &self,
        device: &dyn VirtioDevice,
        purpose: Purpose,
    ) -> Result<TransportState, Busy> {
        let at_work = device.save(purpose)?;
        let of_transport = |queue| QueueState::of(queue, 0, 0);
        let is_active = at_work.is_some();
        let mut config = vec![0; device.config().len()];
        self.registers.read(CONFIG_SPACE, &mut config);
        Ok(TransportState {
            status: self.register(DEVICE_STATUS),
            interrupt_status: self.register(INTERRUPT_STATUS),
            generation: self.register(CONFIG_GENERATION),
            offered_half: self.offered_half,
            accepted_half: self.accepted_half,
            selected: self.selected,
            accepted: self.accepted,
            is_active,
            queues: at_work.unwrap_or_else(|| self.queues.iter().map(of_transport).collect()),
            config,
        })
    }

    fn register(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Lets the driver of another VM's device go on with this one, which no driver has touched. Everything that the driver
    /// may have done or missed in between it is told once more: its queues are served, it is interrupted, and it hears of
    /// a configuration space that is not the one that it knows.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), TransportRefused> {
        let queues = self.restored_queues(state)?;
        self.accepted = state.accepted;
        self.status = state.status & status::KNOWN;
        self.offered_half = state.offered_half;
        self.accepted_half = state.accepted_half;
        self.selected = state.selected;
        self.queues = queues;
        self.registers.show(DEVICE_STATUS, state.status);
        self.registers
            .show(INTERRUPT_STATUS, state.interrupt_status | USED_RING);
        self.registers.show(CONFIG_GENERATION, state.generation);
        self.registers.show_config(&state.config);
        self.show();
        lock(&self.device).restore_config(&state.config);
        if !state.is_active {
            return Ok(());
        }
        let rings = self.hand_over_queues().into_iter().zip(&state.queues);
        let rings =
            rings.map(|(queue, state)| Ring::restored(queue, state, Arc::clone(&self.interrupt)));
        self.start_device(rings.collect());
        self.interrupt.used_ring();
        Ok(())
    }

    /// The queues of a state, if a driver can have set them up here.
    fn restored_queues(&self, state: &TransportState) -> Result<Vec<Queue>, TransportRefused> {
        if state.accepted & !self.offered != 0 {
            return Err(TransportRefused::Features {
                found: state.accepted,
                offered: self.offered,
            });
        }
        let (found, here) = (state.queues.len(), self.queues.len());
        if found != here {
            return Err(TransportRefused::Queues { found, here });
        }
        let both = state.queues.iter().zip(&self.queues).enumerate();
        both.map(|(number, (state, own))| {
            let queue = state.queue(own.max_size());
            let is_good = |queue: &Queue| !queue.ready() || queue.is_valid(&*self.memory);
            queue.filter(is_good).ok_or(TransportRefused::Queue(number))
        })
        .collect()
    }

    /// The driver's reset: everything is as after the start.
    fn reset(&mut self) {
        lock(&self.device).deactivate();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.interrupt.reset();
        self.accepted = 0;
        self.status = 0;
        self.offered_half = 0;
        self.accepted_half = 0;
        self.selected = 0;
    }
}

fn half(features: u64, which: u32) -> u32 {
    let shifted = match which {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & 0xffff_ffff).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests;
