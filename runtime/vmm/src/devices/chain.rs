// SPDX-License-Identifier: Apache-2.0
//! The buffers of one descriptor chain, checked once: all are inside guest memory, device-readable ones
//! come before device-writable ones, and there are not too many.
//!
//! How a driver splits its message into descriptors is up to the driver (virtio 1.2, 2.7.4), so no code
//! here depends on it.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::budget::Budget;
use crate::memory::Memory;

/// Why a chain cannot be served. It goes back to the driver with nothing written.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    #[error("buffer of {len} bytes at {address:#x} is not guest memory")]
    OutsideMemory { address: u64, len: u32 },
    #[error("chain has more than {0} buffers")]
    TooLong(usize),
    #[error("chain has a readable buffer after a writable one")]
    Order,
    #[error("chain ends early or loops")]
    Truncated,
    #[error("chain is {missing} bytes too short")]
    TooShort { missing: usize },
}

/// A range of guest memory that was checked when its chain was taken.
pub type Place = (GuestAddress, usize);

/// Slices of guest memory that together form one sequence of bytes.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

/// A descriptor chain whose buffers have been checked and resolved.
#[derive(Debug)]
pub struct Chain<'m> {
    pub readable: Buffers<'m>,
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Resolves a chain of at most `most` buffers.
    pub fn resolve(
        mut chain: DescriptorChain<&'m Memory>,
        memory: &'m Memory,
        most: usize,
        budget: &mut Budget,
    ) -> Result<Self, ChainError> {
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let mut complete = false;
        for (count, descriptor) in chain.by_ref().enumerate() {
            if count >= most {
                return Err(ChainError::TooLong(most));
            }
            budget.spend_buffers(1);
            complete = !descriptor.has_next();
            let len = descriptor.len();
            let outside = ChainError::OutsideMemory {
                address: descriptor.addr().0,
                len,
            };
            let Ok(size) = usize::try_from(len) else {
                return Err(outside);
            };
            let slice = memory.get_slice(descriptor.addr(), size);
            let slice = slice.map_err(|_| outside)?;
            if descriptor.is_write_only() {
                writable.append(slice);
            } else if writable.slices.is_empty() {
                readable.append(slice);
            } else {
                return Err(ChainError::Order);
            }
        }
        if !complete {
            return Err(ChainError::Truncated);
        }
        Ok(Self { readable, writable })
    }
}

/// The device-writable buffers of a chain of at most `most` buffers, for a device that fills them later.
/// [`Buffers::at`] finds their memory then.
pub fn writable_places(
    chain: DescriptorChain<&Memory>,
    memory: &Memory,
    most: usize,
    budget: &mut Budget,
) -> Result<Vec<Place>, ChainError> {
    let mut places = Vec::new();
    for (count, descriptor) in chain.enumerate() {
        if count >= most {
            return Err(ChainError::TooLong(most));
        }
        budget.spend_buffers(1);
        if !descriptor.is_write_only() {
            continue;
        }
        let (address, len) = (descriptor.addr(), descriptor.len());
        let size = usize::try_from(len).ok();
        let size = size.filter(|&size| memory.get_slice(address, size).is_ok());
        let size = size.ok_or(ChainError::OutsideMemory {
            address: address.0,
            len,
        })?;
        places.push((address, size));
    }
    Ok(places)
}

impl<'m> Buffers<'m> {
    /// The memory of places that [`writable_places`] returned.
    #[must_use]
    pub fn at(memory: &'m Memory, places: &[Place]) -> Self {
        let mut buffers = Self::default();
        for &(address, len) in places {
            // Cannot fail: the range was valid when the chain was taken, and the memory layout never changes.
            if let Ok(slice) = memory.get_slice(address, len) {
                buffers.append(slice);
            }
        }
        buffers
    }

    pub fn append(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            self.len = self.len.saturating_add(slice.len());
            self.slices.push(slice);
        }
    }

    /// Adds all of `other` at the end.
    pub fn extend(&mut self, other: &Self) {
        self.len = self.len.saturating_add(other.len);
        self.slices.extend_from_slice(&other.slices);
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[must_use]
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// The part from `start` on, of `len` bytes, or fewer if there are fewer.
    #[must_use]
    pub fn part(&self, start: usize, len: usize) -> Self {
        let mut skip = start;
        let mut want = len;
        let mut part = Self::default();
        for slice in &self.slices {
            if want == 0 {
                break;
            }
            let Some(left) = slice.len().checked_sub(skip).filter(|&left| left > 0) else {
                skip = skip.saturating_sub(slice.len());
                continue;
            };
            let take = left.min(want);
            // Cannot fail: `skip + take` is at most the slice's length.
            if let Ok(piece) = slice.subslice(skip, take) {
                part.append(piece);
            }
            want = want.saturating_sub(take);
            skip = 0;
        }
        part
    }

    /// Splits in two after `at` bytes.
    pub fn split(&self, at: usize) -> Result<(Self, Self), ChainError> {
        match self.len.checked_sub(at) {
            Some(rest) => Ok((self.part(0, at), self.part(at, rest))),
            None => Err(ChainError::TooShort {
                missing: at.saturating_sub(self.len),
            }),
        }
    }

    /// Removes the first `N` bytes and returns a copy, which the guest cannot change any more.
    pub fn take<const N: usize>(&mut self) -> Result<[u8; N], ChainError> {
        let (head, rest) = self.split(N)?;
        let mut bytes = [0; N];
        head.copy_to(&mut bytes);
        *self = rest;
        Ok(bytes)
    }

    /// Copies from the start of the buffers into `bytes`. Returns how many bytes were copied.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            done = done.saturating_add(slice.copy_to(rest));
        }
        done
    }

    /// Copies `bytes` to the start of the buffers. Returns how many bytes were copied.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut done: usize = 0;
        for slice in &self.slices {
            let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            slice.copy_from(rest);
            done = done.saturating_add(slice.len().min(rest.len()));
        }
        done
    }

    /// Fills the buffers with zeroes.
    pub fn fill_zero(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for slice in &self.slices {
            let mut rest = *slice;
            while !rest.is_empty() {
                rest.copy_from(&ZEROES);
                match rest.offset(rest.len().min(ZEROES.len())) {
                    Ok(next) => rest = next,
                    Err(_) => break,
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn bytes_of(buffers: &Buffers<'_>) -> Vec<u8> {
        let mut bytes = vec![0; buffers.len()];
        assert_eq!(buffers.copy_to(&mut bytes), bytes.len());
        bytes
    }

    proptest! {
        #[test]
        fn for_all_cuts_a_part_has_the_bytes_that_it_has_in_the_whole(
            lens in proptest::collection::vec(0usize..40, 0..8),
            start in prop_oneof![0usize..200, any::<usize>()],
            len in prop_oneof![0usize..200, any::<usize>()],
        ) {
            let memory = crate::memory::create(1 << 16).unwrap();
            let (mut buffers, mut whole) = (Buffers::default(), Vec::new());
            for (number, len) in (0u8..).zip(lens) {
                let at = GuestAddress(u64::from(number) * 0x100);
                let bytes: Vec<u8> = (0u8..).take(len).map(|byte| byte ^ number << 5).collect();
                memory.write_slice(&bytes, at).unwrap();
                buffers.append(memory.get_slice(at, len).unwrap());
                whole.extend(bytes);
            }
            prop_assert_eq!(bytes_of(&buffers), whole.clone());
            let from = start.min(whole.len());
            let to = from.saturating_add(len).min(whole.len());
            let part = buffers.part(start, len);
            prop_assert_eq!(bytes_of(&part), &whole[from..to]);
            match buffers.split(start) {
                Ok((head, rest)) => {
                    prop_assert_eq!([bytes_of(&head), bytes_of(&rest)].concat(), whole.clone());
                    prop_assert_eq!(head.len(), start);
                }
                Err(error) => prop_assert_eq!(error, ChainError::TooShort { missing: start - whole.len() }),
            }
            // What is written to a part is written there, and nowhere else.
            part.copy_from(&[0xff; 200]);
            let count = (to - from).min(200);
            whole[from..from + count].fill(0xff);
            prop_assert_eq!(bytes_of(&buffers), whole);
        }
    }
}
