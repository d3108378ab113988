// SPDX-License-Identifier: Apache-2.0
//! How much output of commands (`ExecSync`) may be in the daemon's memory at once. A guest sends all output in one
//! answer, and nobody knows before how much that is. So room is taken beforehand: a lot for the first commands, little
//! for those beyond them, and what does not fit is cut.

use tokio::sync::{Semaphore, SemaphorePermit};

/// The most bytes of standard output, and also of standard error, that CRI allows.
const FULL_BYTES: u64 = 16 << 20;
/// How many commands at once have that room: 96 MiB in all, and while an answer is passed on it is there twice.
const FULL: usize = 3;
/// The same for the next ones. Probes print a few kilobytes.
const PART_BYTES: u64 = 1 << 20;
const PART: usize = 32;
/// What any further command has. Of a probe's output, kubelet shows 10 KiB.
const LEAST_BYTES: u64 = 64 << 10;

/// The room of all commands.
#[derive(Debug)]
pub struct Outputs {
    full: Semaphore,
    part: Semaphore,
}

/// The room of one command, as long as it runs.
#[derive(Debug)]
pub struct Room<'a> {
    /// For each of the two streams.
    pub bytes: u64,
    _taken: Option<SemaphorePermit<'a>>,
}

impl Default for Outputs {
    fn default() -> Self {
        Self {
            full: Semaphore::new(FULL),
            part: Semaphore::new(PART),
        }
    }
}

impl Outputs {
    /// Takes room for a command. Never waits.
    pub fn take(&self) -> Room<'_> {
        let sizes = [(&self.full, FULL_BYTES), (&self.part, PART_BYTES)];
        let mut sizes = sizes.into_iter();
        let taken = sizes.find_map(|(free, bytes)| Some((free.try_acquire().ok()?, bytes)));
        match taken {
            Some((permit, bytes)) => Room {
                bytes,
                _taken: Some(permit),
            },
            None => Room {
                bytes: LEAST_BYTES,
                _taken: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_commands_have_much_room_and_any_number_have_little() {
        let outputs = Outputs::default();
        let rooms: Vec<_> = (0..1000).map(|_| outputs.take()).collect();
        let count = |bytes| rooms.iter().filter(|room| room.bytes == bytes).count();
        assert_eq!(count(FULL_BYTES), 3);
        assert_eq!(count(PART_BYTES), 32);
        assert_eq!(count(LEAST_BYTES), 965);
        let all: u64 = rooms.iter().map(|room| 2 * room.bytes).sum();
        assert!(all < 300 << 20, "{all}");
        drop(rooms);
        assert_eq!(outputs.take().bytes, FULL_BYTES);
    }
}
