// SPDX-License-Identifier: Apache-2.0
//! The output of a container that an attached client has not read yet.
//!
//! A tap never makes the container wait. When it is full, it counts further output without keeping it, until the
//! client has read everything that was kept. Then the client is told how much it missed.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::record::MAX_PAYLOAD_BYTES;
use tokio::sync::Notify;

use super::buffer::Source;

const CAPACITY_BYTES: usize = 1 << 20;
/// What a chunk takes in addition to its bytes.
const CHUNK_OVERHEAD_BYTES: usize = 64;

/// Which output the client wants.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub stdout: bool,
    pub stderr: bool,
}

/// The output for one attached client.
#[derive(Debug)]
pub struct Tap {
    wanted: Wanted,
    state: Mutex<Kept>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    chunks: VecDeque<(Source, Vec<u8>)>,
    bytes: usize,
    skipped: u64,
    ended: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Output(Source, Vec<u8>),
    /// This many bytes are missing here.
    Skipped(u64),
}

impl Tap {
    pub fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Adds output of the container.
    pub fn offer(&self, source: Source, bytes: &[u8]) {
        let wanted = match source {
            Source::Stdout => self.wanted.stdout,
            Source::Stderr => self.wanted.stderr,
        };
        if !wanted {
            return;
        }
        let mut state = self.lock();
        if state.skipped > 0 || state.bytes + bytes.len() > CAPACITY_BYTES {
            state.skipped += bytes.len() as u64;
            return;
        }
        state.bytes += bytes.len();
        match state.chunks.back_mut() {
            Some((last, chunk))
                if *last == source && chunk.len() + bytes.len() <= MAX_PAYLOAD_BYTES =>
            {
                chunk.extend_from_slice(bytes);
            }
            _ => {
                state.bytes += CHUNK_OVERHEAD_BYTES;
                state.chunks.push_back((source, bytes.to_vec()));
            }
        }
        self.changed.notify_one();
    }

    /// Marks the end: the container writes no more.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_one();
    }

    /// Waits for the next output. `None` at the end. Only one caller at a time.
    pub async fn next(&self) -> Option<Next> {
        loop {
            {
                let mut state = self.lock();
                if state.skipped > 0 && state.chunks.is_empty() {
                    return Some(Next::Skipped(std::mem::take(&mut state.skipped)));
                }
                if let Some((source, chunk)) = state.chunks.pop_front() {
                    state.bytes -= chunk.len() + CHUNK_OVERHEAD_BYTES;
                    return Some(Next::Output(source, chunk));
                }
                if state.ended {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{CAPACITY_BYTES, Next, Tap, Wanted};
    use crate::streams::buffer::Source::{Stderr, Stdout};

    const BOTH: Wanted = Wanted {
        stdout: true,
        stderr: true,
    };

    #[tokio::test]
    async fn output_comes_in_order_then_the_end() {
        let tap = Tap::new(BOTH);
        tap.offer(Stdout, b"a");
        tap.offer(Stdout, b"b");
        tap.offer(Stderr, b"c");
        tap.end();
        assert_eq!(tap.next().await, Some(Next::Output(Stdout, b"ab".to_vec())));
        assert_eq!(tap.next().await, Some(Next::Output(Stderr, b"c".to_vec())));
        assert_eq!(tap.next().await, None);
    }

    #[tokio::test]
    async fn what_is_not_wanted_is_not_kept() {
        let tap = Tap::new(Wanted {
            stdout: false,
            stderr: true,
        });
        tap.offer(Stdout, b"a");
        tap.end();
        assert_eq!(tap.next().await, None);
    }

    #[tokio::test]
    async fn a_host_that_does_not_read_misses_output_and_is_told_how_much() {
        let tap = Tap::new(BOTH);
        let chunk = [0; 1000];
        for _ in 0..3000 {
            tap.offer(Stdout, &chunk);
        }
        assert!(tap.lock().bytes <= CAPACITY_BYTES);
        let mut kept = 0;
        let skipped = loop {
            match tap.next().await.unwrap() {
                Next::Output(_, bytes) => kept += bytes.len() as u64,
                Next::Skipped(bytes) => break bytes,
            }
        };
        assert_eq!(kept + skipped, 3_000_000);
        assert!(kept > 900_000);
        tap.offer(Stderr, b"again");
        assert_eq!(
            tap.next().await,
            Some(Next::Output(Stderr, b"again".to_vec()))
        );
    }
}
