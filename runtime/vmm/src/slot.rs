// SPDX-License-Identifier: Apache-2.0
//! The devices of a VM in their order, which is part of the interface to the guest: where a device's registers are,
//! which interrupt it has, which thread serves it, what it is called. Every VM has all of them, used or not. Pure.

use crate::devices::registers::SLOT_BYTES;

/// The first device's registers; those of the others follow in order.
pub const MMIO_BASE: u64 = 0xd000_0000;

/// A virtio device, by its place.
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
    /// Alone, because a volume may be slow or hang.
    Volumes,
}

impl Slot {
    /// All devices in their order.
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

    /// The guest-physical address of its registers.
    #[must_use]
    pub fn address(self) -> u64 {
        MMIO_BASE + self as u64 * SLOT_BYTES
    }

    /// Its interrupt line. 4 is the serial port's; 8 and 12 are left to the drivers of a PC's clock and mouse, which a
    /// kernel may have.
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

    /// What the device is, in errors; a disk also tells the guest (virtio 1.2, 5.2.6.1, GET_ID).
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

    /// How Linux names a disk in `/dev`: by its place among the disks. None for what is no disk.
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

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disks => "disks",
            Self::Io => "io",
            Self::Files => "files",
            Self::Volumes => "volumes",
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
