// SPDX-License-Identifier: Apache-2.0
//! The registers that a driver reads: a page that KVM maps read-only into the guest, so that reading
//! causes no exit. Linux reads a virtio-mmio device's interrupt status at every interrupt.
//!
//! Only writes reach the transport, which then updates the page. Registers that the device changes by
//! itself ([`super::ring::Interrupt`]) are changed by atomic bit operations.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{
    Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

use crate::memory;

/// The registers of a device take one page.
pub const SLOT_BYTES: u64 = 0x1000;
/// The configuration space extends from this offset to the end of the page.
pub const CONFIG_SPACE: u64 = 0x100;

/// The register pages of all devices, in one memory region.
pub type RegisterMemory = Arc<GuestRegionMmap<()>>;

/// Creates the pages of `devices` devices. The first one is at guest address `base`.
pub fn create(base: u64, devices: usize) -> io::Result<RegisterMemory> {
    let bytes = (devices as u64).saturating_mul(SLOT_BYTES);
    let memory = memory::create_at(base, bytes).map_err(io::Error::other)?;
    Ok(Arc::new(memory))
}

/// The register page of one device.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    memory: RegisterMemory,
    start: u64,
}

impl RegisterPage {
    /// The page of device number `device`. Fails if there is no such device.
    pub fn new(memory: &RegisterMemory, device: usize) -> io::Result<Self> {
        let start = (device as u64).saturating_mul(SLOT_BYTES);
        if start.saturating_add(SLOT_BYTES) > memory.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let memory = Arc::clone(memory);
        Ok(Self { memory, start })
    }

    /// Sets the register at `offset`, which is a multiple of four.
    pub fn show(&self, offset: u64, value: u32) {
        self.word(offset, |word| word.store(value, Ordering::SeqCst));
    }

    /// Sets the configuration space. True if it changed.
    pub fn show_config(&self, space: &[u8]) -> bool {
        let mut shown = vec![0; space.len()];
        self.read(CONFIG_SPACE, &mut shown);
        if shown == space {
            return false;
        }
        if let Some(slice) = self.slice(CONFIG_SPACE, space.len()) {
            slice.copy_from(space);
        }
        true
    }

    /// Reads what the driver sees. Beyond the page there are zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(slice) = self.slice(offset, data.len()) {
            // Cannot fail: both have the same length.
            let _ = slice.read_slice(data, 0);
        }
    }

    pub fn set_bits(&self, offset: u64, bits: u32) {
        self.word(offset, |word| {
            word.fetch_or(bits, Ordering::SeqCst);
        });
    }

    pub fn clear_bits(&self, offset: u64, bits: u32) {
        self.word(offset, |word| {
            word.fetch_and(!bits, Ordering::SeqCst);
        });
    }

    pub fn increment(&self, offset: u64) {
        self.word(offset, |word| {
            word.fetch_add(1, Ordering::SeqCst);
        });
    }

    fn word(&self, offset: u64, act: impl FnOnce(&AtomicU32)) {
        let slice = self.slice(offset, size_of::<u32>());
        // Never `None`: callers name registers, which are aligned and inside the page.
        if let Some(Ok(word)) = slice.as_ref().map(|slice| slice.get_atomic_ref(0)) {
            act(word);
        }
    }

    fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(len as u64)?;
        if end > SLOT_BYTES {
            return None;
        }
        let at = MemoryRegionAddress(self.start.checked_add(offset)?);
        self.memory.get_slice(at, len).ok()
    }
}

#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
#[allow(clippy::unwrap_used)]
impl RegisterPage {
    /// A page in memory of its own.
    pub fn alone() -> Self {
        Self::new(&create(0, 1).unwrap(), 0).unwrap()
    }

    pub fn word_at(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_apart_from_its_neighbours_and_bounded() {
        let memory = create(0xd000_0000, 2).unwrap();
        let pages = [0, 1].map(|device| RegisterPage::new(&memory, device).unwrap());
        assert!(RegisterPage::new(&memory, 2).is_err());
        let [first, second] = &pages;
        first.show(0xf0, 7);
        second.show(0xf0, 8);
        assert_eq!((first.word_at(0xf0), second.word_at(0xf0)), (7, 8));
        let last = SLOT_BYTES - 4;
        first.show(last, 9);
        first.show(SLOT_BYTES, 10);
        assert_eq!((first.word_at(last), second.word_at(0)), (9, 0));
        assert_eq!(first.word_at(last + 1), 0, "not the neighbour's");
        assert_eq!(first.word_at(u64::MAX), 0);
    }

    #[test]
    fn a_configuration_space_is_shown_once() {
        let page = RegisterPage::alone();
        assert!(page.show_config(&[1, 2, 3]));
        assert!(!page.show_config(&[1, 2, 3]));
        assert!(page.show_config(&[1, 2, 4]));
        assert_eq!(page.word_at(CONFIG_SPACE), 0x0004_0201);
        assert!(!page.show_config(&[]));
    }

    #[test]
    #[allow(clippy::arithmetic_side_effects)]
    fn for_all_offsets_and_lengths_nothing_beyond_the_page_is_read_or_written() {
        let memory = create(0, 3).unwrap();
        let [before, page, after] =
            [0, 1, 2].map(|device| RegisterPage::new(&memory, device).unwrap());
        for neighbour in [&before, &after] {
            (0..SLOT_BYTES)
                .step_by(4)
                .for_each(|offset| neighbour.show(offset, u32::MAX));
        }
        let far = [u64::MAX - 8, u64::MAX, 1 << 32];
        for offset in (0..SLOT_BYTES + 16).chain(far) {
            for len in 0..=8usize {
                let mut bytes = vec![1; len];
                page.read(offset, &mut bytes);
                assert_eq!(bytes, vec![0; len], "{offset} {len}");
            }
            // Registers are aligned.
            page.show(offset / 4 * 4, 0);
        }
        for neighbour in [&before, &after] {
            let mut offsets = (0..SLOT_BYTES).step_by(4);
            assert!(offsets.all(|offset| neighbour.word_at(offset) == u32::MAX));
        }
    }
}
