// SPDX-License-Identifier: Apache-2.0
//! The driver's side of a device's queues, for tests and fuzz targets: rust-vmm's mock queues in guest memory of their
//! own, without KVM.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::new_without_default,
    clippy::unwrap_used
)]

use std::cell::RefCell;
use std::sync::Arc;

use virtio_queue::Queue;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};

use super::mmio::MmioTransport;
use super::registers::RegisterPage;
use super::ring::{Interrupt, Ring};
use super::{Active, VirtioDevice};
use crate::memory::Memory;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const QUEUE_SIZE: u16 = 16;
/// Distance between the starts of two queues.
const QUEUE_BYTES: u64 = 0x1000;
/// How much memory a driver has.
pub const MEMORY_BYTES: u64 = 32 << 20;

/// Brings a device with one queue of 16 entries up, by the registers of its transport. The queue's table, available ring and
/// used ring are at these addresses.
pub fn bring_up(transport: &mut MmioTransport, [table, available, used]: [u32; 3]) {
    for (offset, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x38, 16),
        (0x80, table),
        (0x90, available),
        (0xa0, used),
        (0x44, 1),
        (0x70, 15),
    ] {
        transport.write(offset, &value.to_le_bytes());
    }
}

/// A descriptor: address, length, flags, next.
pub type Piece = (u64, u32, u16, u16);

/// A driver with as many queues as its device has.
#[derive(Debug)]
pub struct Driver {
    pub memory: Arc<Memory>,
    /// The registers that the driver reads.
    pub registers: RegisterPage,
    interrupt: Arc<Interrupt>,
    queues: RefCell<Vec<Progress>>,
}

/// Where a queue is in memory, and how many chains went out and came back.
#[derive(Debug)]
struct Progress {
    table: u64,
    avail: u64,
    used: u64,
    offered: u16,
    taken_back: u16,
}

impl Driver {
    pub fn new() -> Self {
        let memory = crate::memory::create(MEMORY_BYTES).unwrap();
        Self::over(Arc::new(memory), RegisterPage::alone())
    }

    /// A driver in memory that is there already, [`MEMORY_BYTES`] of zeroes. Memory stays mapped for ever, so a process
    /// cannot make it for thousands of drivers.
    pub fn over(memory: Arc<Memory>, registers: RegisterPage) -> Self {
        Self {
            memory,
            interrupt: Arc::new(Interrupt::new(registers.clone()).unwrap()),
            registers,
            queues: RefCell::default(),
        }
    }

    pub fn interrupt_status(&self) -> u32 {
        self.registers.word_at(0x60)
    }

    /// Gives the device its queues, as the transport does at DRIVER_OK.
    pub fn activate(&self, device: &mut dyn VirtioDevice, features: u64) {
        let mut rings = Vec::new();
        self.queues.borrow_mut().clear();
        for index in 0..device.queue_sizes().len() {
            let start = GuestAddress(index as u64 * QUEUE_BYTES);
            let mock = MockSplitQueue::create(&*self.memory, start, QUEUE_SIZE);
            let queue: Queue = mock.create_queue().unwrap();
            rings.push(Ring::new(queue, Arc::clone(&self.interrupt)));
            self.queues.borrow_mut().push(Progress {
                table: mock.desc_table_addr().0,
                avail: mock.avail_addr().0,
                used: mock.used_addr().0,
                offered: 0,
                taken_back: 0,
            });
        }
        device.activate(Active {
            memory: Arc::clone(&self.memory),
            rings,
            features,
            interrupt: Arc::clone(&self.interrupt),
        });
    }

    /// Writes `chain` into the descriptor table from index `first` on and puts it on the available ring.
    pub fn offer(&self, queue: usize, first: u16, chain: &[Piece]) {
        let progress = &mut self.queues.borrow_mut()[queue];
        for (index, &(address, len, flags, next)) in (u64::from(first)..).zip(chain) {
            let descriptor = Descriptor::new(address, len, flags, next);
            let at = GuestAddress(progress.table + index * 16);
            self.memory.write_obj(descriptor, at).unwrap();
        }
        let slot = u64::from(progress.offered % QUEUE_SIZE);
        self.write(progress.avail + 4 + slot * 2, &first.to_le_bytes());
        progress.offered = progress.offered.wrapping_add(1);
        self.write(progress.avail + 2, &progress.offered.to_le_bytes());
    }

    /// Writes an indirect table of `count` descriptors, all for the same buffer.
    pub fn indirect(&self, at: u64, count: u16, (address, len, flags): (u64, u32, u16)) {
        let descriptor = |number: u16| {
            let flags = if number == count { flags } else { flags | NEXT };
            Descriptor::new(address, len, flags, number)
        };
        for (number, place) in (1..=count).zip((at..).step_by(16)) {
            let at = GuestAddress(place);
            self.memory.write_obj(descriptor(number), at).unwrap();
        }
    }

    /// Sets the available ring's index to `count`, whether that is true or not.
    pub fn claim(&self, queue: usize, count: u16) {
        let avail = self.queues.borrow()[queue].avail;
        self.write(avail + 2, &count.to_le_bytes());
    }

    /// The chains that the device put on the used ring since the last call: heads and lengths.
    pub fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let progress = &mut self.queues.borrow_mut()[queue];
        let at = progress.used;
        let index: u16 = self.memory.read_obj(GuestAddress(at + 2)).unwrap();
        let entry = |number: u16| {
            let at = at + 4 + u64::from(number % QUEUE_SIZE) * 8;
            let head = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            (head, len)
        };
        let used = (progress.taken_back..index).map(entry).collect();
        progress.taken_back = index;
        used
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}
