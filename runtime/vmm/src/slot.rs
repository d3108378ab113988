// SPDX-License-Identifier: Apache-2.0
//! The devices of a VM in a fixed order, which is part of the interface to the guest. A device's place in it decides
//! where its registers are, which interrupt it has, which thread serves it, and its name. Every VM has all devices,
//! used or not. Pure.

use bulkhead_jail::syscalls::List;

use crate::devices::registers::SLOT_BYTES;
use crate::syscalls;

/// The registers of the first device. Those of the others follow in order.
pub const MMIO_BASE: u64 = 0xd000_0000;

/// A virtio device, named by its place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    Vsock,
    Net,
    ImageDisk,
    ScratchDisk,
    Rng,
    Balloon,
    Files,
    VolumeDisk,
}

/// A thread that serves devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    Disks,
    Io,
    Files,
    /// The volume disk has a thread of its own, because a volume may be slow or hang.
    Volumes,
}

impl Slot {
    /// All devices, in order.
    pub const ALL: [Self; 8] = [
        Self::Vsock,
        Self::Net,
        Self::ImageDisk,
        Self::ScratchDisk,
        Self::Rng,
        Self::Balloon,
        Self::Files,
        Self::VolumeDisk,
    ];

    #[must_use]
    pub fn number(self) -> usize {
        self as usize
    }

    /// The guest-physical address of the registers.
    #[must_use]
    pub fn address(self) -> u64 {
        MMIO_BASE + self as u64 * SLOT_BYTES
    }

    /// The interrupt line. The serial port has 4. 8 and 12 stay free for a PC's clock and mouse, whose drivers the
    /// guest's kernel may contain.
    #[must_use]
    pub fn interrupt(self) -> u32 {
        match self {
            Self::Vsock => 5,
            Self::Net => 6,
            Self::ImageDisk => 7,
            Self::ScratchDisk => 9,
            Self::Rng => 10,
            Self::Balloon => 11,
            Self::Files => 14,
            Self::VolumeDisk => 15,
        }
    }

    #[must_use]
    pub fn thread(self) -> Thread {
        match self {
            Self::ImageDisk | Self::ScratchDisk => Thread::Disks,
            Self::Vsock | Self::Net | Self::Rng | Self::Balloon => Thread::Io,
            Self::Files => Thread::Files,
            Self::VolumeDisk => Thread::Volumes,
        }
    }

    /// The name in error messages. A disk also gives it to the guest (GET_ID; virtio 1.2, 5.2.6.1).
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vsock => "vsock",
            Self::Net => "net",
            Self::ImageDisk => "image",
            Self::ScratchDisk => "scratch",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Files => "shared directories",
            Self::VolumeDisk => "volumes",
        }
    }

    /// The name of a disk in the guest's `/dev`, which Linux gives by the order of disks. `None` for other devices.
    #[must_use]
    pub fn disk(self) -> Option<&'static str> {
        match self {
            Self::ImageDisk => Some("vda"),
            Self::ScratchDisk => Some("vdb"),
            Self::VolumeDisk => Some("vdc"),
            _ => None,
        }
    }
}

impl Thread {
    pub const ALL: [Self; 4] = [Self::Disks, Self::Io, Self::Files, Self::Volumes];

    /// What it may call. The list has the thread's name.
    #[must_use]
    pub fn syscalls(self) -> &'static List {
        match self {
            Self::Disks => &syscalls::DISKS,
            Self::Io => &syscalls::IO,
            Self::Files => &syscalls::FILES,
            Self::Volumes => &syscalls::VOLUMES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::SERIAL_IRQ;

    #[test]
    fn every_device_has_a_place_an_interrupt_and_a_thread_of_its_own() {
        let mut interrupts = vec![SERIAL_IRQ];
        for (number, slot) in Slot::ALL.into_iter().enumerate() {
            assert_eq!(slot.number(), number, "{slot:?}");
            assert!(!interrupts.contains(&slot.interrupt()), "{slot:?}");
            interrupts.push(slot.interrupt());
            assert!(Thread::ALL.contains(&slot.thread()), "{slot:?}");
        }
        assert_eq!(Slot::Net.address(), MMIO_BASE + SLOT_BYTES);
    }

    #[test]
    fn linux_names_disks_by_their_order() {
        let disks = Slot::ALL.into_iter().filter_map(Slot::disk);
        for (letter, name) in ('a'..).zip(disks) {
            assert_eq!(name, format!("vd{letter}"));
        }
    }
}
