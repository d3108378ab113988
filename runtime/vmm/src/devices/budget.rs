// SPDX-License-Identifier: Apache-2.0
//! How much a device does in one turn. Pure.
//!
//! A guest chooses how many chains it offers, how many buffers each of them has (65,535 in an indirect table), and how
//! many bytes each asks for. A device works under its lock and shares its thread with others. So a turn ends when its
//! budget is used up. The device goes on at its next turn, when the others have had theirs.

/// Buffers of chains. To check one takes less than 100 ns, so all of a turn take less than half a millisecond.
const BUFFERS: usize = 4096;
/// Bytes that are moved. It takes some milliseconds at most, unless a disk of the host is slow. More than any request
/// or packet of Linux has: of a disk 1.25 MiB, of a file system 1 MiB, of a network 64 KiB.
pub const BYTES: usize = 4 << 20;

/// What is left of a turn.
///
/// The last chain of a turn may take more than is left, because its buffers are counted while they are checked, and
/// its bytes when they are moved. What one chain can take in one turn is bounded as well.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    chains: usize,
    buffers: usize,
    bytes: usize,
}

impl Budget {
    /// A turn with at most `chains` chains.
    #[must_use]
    pub const fn of_chains(chains: usize) -> Self {
        Self {
            chains,
            buffers: BUFFERS,
            bytes: BYTES,
        }
    }

    /// The same with another number of bytes.
    #[must_use]
    pub const fn with_bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// Whether another chain may begin. Counts it.
    pub fn begin(&mut self) -> bool {
        let may_begin = !self.is_spent();
        self.chains = self.chains.saturating_sub(1);
        may_begin
    }

    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.chains == 0 || self.buffers == 0 || self.bytes == 0
    }

    pub fn spend_buffers(&mut self, count: usize) {
        self.buffers = self.buffers.saturating_sub(count);
    }

    pub fn spend_bytes(&mut self, count: usize) {
        self.bytes = self.bytes.saturating_sub(count);
    }

    #[must_use]
    pub fn buffers_left(&self) -> usize {
        self.buffers
    }

    #[must_use]
    pub fn bytes_left(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_ends_when_chains_or_buffers_or_bytes_are_used_up() {
        let mut chains = Budget::of_chains(2);
        assert!(chains.begin() && chains.begin() && !chains.begin());
        let mut buffers = Budget::of_chains(9);
        buffers.spend_buffers(BUFFERS - 1);
        assert!(buffers.begin());
        buffers.spend_buffers(70_000);
        assert!(!buffers.begin());
        let mut bytes = Budget::of_chains(9).with_bytes(10);
        bytes.spend_bytes(9);
        assert_eq!((bytes.begin(), bytes.bytes_left()), (true, 1));
        bytes.spend_bytes(1);
        assert!(!bytes.begin() && bytes.is_spent());
    }
}
