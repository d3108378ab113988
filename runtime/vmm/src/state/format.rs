// SPDX-License-Identifier: Apache-2.0
//! How a state is written and read: a header of our own, then what postcard makes of [`State`]. Pure, apart from the read.
//!
//! ```text
//! 0   magic "BULKHEAD"   8   version, u32   12   bytes of the rest, u64   20   SHA-256 of all other bytes   52   the rest
//! ```
//! Numbers are little-endian. Nothing is decoded before version, length and sum are right. Each state has one spelling: what
//! is decoded and written again must be the same bytes, because KVM's structures would also be decoded from fewer or more.

use std::io::Read;

use sha2::{Digest, Sha256};

use super::State;
use super::refusal::Refusal;

/// Changes with every change of a section.
const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"BULKHEAD";
const HEADER_BYTES: usize = 52;
/// The most bytes that a state has. 64 vCPUs with all that the other bounds allow take half of it.
pub const MOST_BYTES: usize = 4 << 20;

impl State {
    /// The state as bytes.
    pub fn write(&self) -> Result<Vec<u8>, Refusal> {
        let payload = postcard::to_allocvec(self).map_err(|e| Refusal::Foreign(Some(e)))?;
        let bytes = seal(&payload);
        match bytes.len() {
            ..=MOST_BYTES => Ok(bytes),
            _ => Err(Refusal::TooLarge { most: MOST_BYTES }),
        }
    }

    /// Reads a state to the end of `source`.
    pub fn read(source: impl Read) -> Result<Self, Refusal> {
        let mut bytes = Vec::new();
        let most = u64::try_from(MOST_BYTES).unwrap_or(u64::MAX);
        let mut source = source.take(most.saturating_add(1));
        source.read_to_end(&mut bytes).map_err(Refusal::Read)?;
        if bytes.len() > MOST_BYTES {
            return Err(Refusal::TooLarge { most: MOST_BYTES });
        }
        let payload = open(&bytes)?;
        let state: Self = postcard::from_bytes(payload).map_err(|e| Refusal::Foreign(Some(e)))?;
        if state.write()? != bytes {
            return Err(Refusal::Foreign(None));
        }
        Ok(state)
    }
}

/// Puts the header before `payload`.
#[must_use]
pub fn seal(payload: &[u8]) -> Vec<u8> {
    let length = u64::try_from(payload.len()).unwrap_or(u64::MAX);
    let mut bytes = Vec::with_capacity(HEADER_BYTES.saturating_add(payload.len()));
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&sum(&bytes, payload));
    bytes.extend_from_slice(payload);
    bytes
}

/// What is behind the header, if all of it is there and as it was written.
fn open(bytes: &[u8]) -> Result<&[u8], Refusal> {
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(Refusal::NotAState)?;
    if magic != MAGIC {
        return Err(Refusal::NotAState);
    }
    let cut = || Refusal::Length {
        said: HEADER_BYTES as u64,
        found: bytes.len() as u64,
    };
    let (version, rest) = rest.split_first_chunk().ok_or_else(cut)?;
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(Refusal::Format {
            found: version,
            here: VERSION,
        });
    }
    let (length, rest) = rest.split_first_chunk().ok_or_else(cut)?;
    let (expected, payload) = rest.split_first_chunk::<32>().ok_or_else(cut)?;
    let length = u64::from_le_bytes(*length);
    if length != payload.len() as u64 {
        return Err(Refusal::Length {
            said: length.saturating_add(HEADER_BYTES as u64),
            found: bytes.len() as u64,
        });
    }
    let head = bytes.get(..20).ok_or_else(cut)?;
    if sum(head, payload) != *expected {
        return Err(Refusal::Damaged);
    }
    Ok(payload)
}

fn sum(head: &[u8], payload: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::samples::{Shape, largest, sample};

    fn written() -> Vec<u8> {
        sample(1, Shape::SMALL).write().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn for_all_states_what_is_written_is_read_as_the_same(
            seed in any::<u64>(),
            vcpus in 1usize..5,
            words in 0usize..2000,
            leaves in 0usize..100,
            msrs in 0usize..100,
            devices in 0usize..9,
        ) {
            let bytes = sample(seed, Shape { vcpus, words, leaves, msrs, devices }).write().unwrap();
            let state = State::read(bytes.as_slice()).unwrap();
            prop_assert_eq!(state.write().unwrap(), bytes);
        }

        #[test]
        fn for_all_bytes_nothing_is_read_and_nothing_panics(bytes in any::<Vec<u8>>(), sealed in any::<bool>()) {
            let bytes = if sealed { seal(&bytes) } else { bytes };
            prop_assert!(State::read(bytes.as_slice()).is_err());
        }

        #[test]
        fn for_all_changes_of_what_a_right_sum_covers_one_spelling_is_read(
            at in any::<prop::sample::Index>(),
            value in any::<u8>(),
        ) {
            let mut payload = written().split_off(HEADER_BYTES);
            let at = at.index(payload.len());
            payload[at] = value;
            let bytes = seal(&payload);
            if let Ok(state) = State::read(bytes.as_slice()) {
                prop_assert_eq!(state.write().unwrap(), bytes);
            }
        }
    }

    #[test]
    fn for_all_bytes_of_a_state_a_change_is_refused() {
        let good = written();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= u8::try_from(at % 255).unwrap() + 1;
            assert!(State::read(bytes.as_slice()).is_err(), "{at}");
        }
    }

    #[test]
    fn for_all_lengths_a_cut_state_is_refused_and_one_that_has_grown() {
        let good = written();
        for length in 0..good.len() {
            let refusal = State::read(&good[..length]).err();
            let is_named = matches!(refusal, Some(Refusal::Length { .. } | Refusal::NotAState));
            assert!(is_named, "{length}: {refusal:?}");
        }
        for more in [1, 4096] {
            let mut bytes = good.clone();
            bytes.resize(good.len() + more, 0);
            let refusal = State::read(bytes.as_slice()).err();
            assert!(matches!(refusal, Some(Refusal::Length { .. })));
            let mut payload = good[HEADER_BYTES..].to_vec();
            payload.resize(payload.len() + more, 0);
            let refusal = State::read(seal(&payload).as_slice()).err();
            assert!(matches!(refusal, Some(Refusal::Foreign(None))));
        }
    }

    #[test]
    fn a_refusal_says_what_differs() {
        let good = written();
        let changed = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            State::read(bytes.as_slice()).err().unwrap().to_string()
        };
        for (said, expected) in [
            (changed(0, b'b'), "does not begin as one"),
            (changed(8, 2), "format 2, this VMM reads format 1 only"),
            (changed(12, good[12] ^ 1), "not complete"),
            (changed(20, good[20] ^ 1), "checksum is wrong"),
            (changed(1000, good[1000] ^ 1), "checksum is wrong"),
        ] {
            assert!(said.contains(expected), "{said}");
        }
        let endless = State::read(std::io::repeat(0)).err();
        assert!(matches!(endless, Some(Refusal::TooLarge { .. })));
    }

    #[test]
    fn the_largest_state_fits_its_bound_and_a_larger_list_is_refused() {
        let bytes = largest(0).write().unwrap();
        assert!(bytes.len() < MOST_BYTES, "{}", bytes.len());
        State::read(bytes.as_slice()).unwrap();
        let bytes = largest(1).write().unwrap();
        let refusal = State::read(bytes.as_slice()).err();
        assert!(matches!(refusal, Some(Refusal::Foreign(Some(_)))));
    }
}
