// SPDX-License-Identifier: Apache-2.0
//! Input from the host that the process has not read yet.
//!
//! The session adds bytes as they arrive, at most one window full. [`Input::feed`] writes them to the process as fast
//! as that reads, and reports to the host how many are gone. So the session never has to stop reading from the host.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::record::INPUT_WINDOW_BYTES;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc};

use super::records::ToHost;

/// After this many consumed bytes the host is told. It is less than the window, so the window need not run empty.
const REPORT_BYTES: usize = INPUT_WINDOW_BYTES / 4;

/// The input of one session.
#[derive(Debug, Default)]
pub struct Input {
    state: Mutex<Waiting>,
    changed: Notify,
    drained: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    chunks: VecDeque<Vec<u8>>,
    /// The size of all chunks that have not been reported as consumed.
    bytes: usize,
    ended: bool,
}

impl Input {
    /// Adds input. Fails if the host sends more than its window.
    pub fn push(&self, chunk: Vec<u8>) -> io::Result<()> {
        let mut state = self.lock();
        if state.ended || state.bytes + chunk.len() > INPUT_WINDOW_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        state.bytes += chunk.len();
        state.chunks.push_back(chunk);
        self.changed.notify_one();
        Ok(())
    }

    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_one();
    }

    /// Writes input to `sink` until the input has ended. Input that the sink does not take is dropped, and so is all
    /// input if there is no sink. The sink is dropped at the end of the input, or earlier if the process closed it.
    pub async fn feed<S: AsRef<AsyncFd<OwnedFd>>>(
        &self,
        mut sink: Option<S>,
        host: &mpsc::Sender<ToHost>,
    ) {
        let (mut total, mut unreported) = (0u64, 0);
        while let Some(chunk) = self.next().await {
            if let Some(open) = &sink
                && write_all(open.as_ref(), &chunk).await.is_err()
            {
                // The process closed its input. Drop all further input.
                sink = None;
            }
            total += chunk.len() as u64;
            unreported += chunk.len();
            if unreported >= REPORT_BYTES {
                self.lock().bytes -= unreported;
                unreported = 0;
                // Fails if the host has left. Its last input still has to be written.
                let _ = host.send(ToHost::input_gone(total)).await;
            }
        }
        drop(sink);
        self.drained.notify_one();
    }

    /// Waits until all input up to its end has been written or dropped.
    pub async fn drained(&self) {
        self.drained.notified().await;
    }

    async fn next(&self) -> Option<Vec<u8>> {
        loop {
            {
                let mut state = self.lock();
                if let Some(chunk) = state.chunks.pop_front() {
                    return Some(chunk);
                }
                if state.ended {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await?;
        match rustix::io::write(fd.get_ref(), bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{INPUT_WINDOW_BYTES, Input};
    use crate::sys;
    use std::io::Read;
    use std::sync::Arc;
    use tokio::sync::mpsc;

    #[tokio::test]
    async fn a_host_that_ignores_its_window_is_refused() {
        let input = Input::default();
        input.push(vec![0; INPUT_WINDOW_BYTES]).unwrap();
        assert!(input.push(vec![0]).is_err());
    }

    #[tokio::test]
    async fn the_process_gets_everything_and_the_host_is_told() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let sink = Arc::new(sys::watch(writer).unwrap());
        let input = Input::default();
        const CHUNK: usize = 50_000;
        for _ in 0..4 {
            input.push(vec![b'x'; CHUNK]).unwrap();
        }
        input.end();
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            std::fs::File::from(reader).read_to_end(&mut all).unwrap();
            all.len()
        });
        let (host, mut told) = mpsc::channel(8);
        input.feed(Some(sink), &host).await;
        assert_eq!(reading.join().unwrap(), 4 * CHUNK);
        drop(host);
        let mut last = Vec::new();
        while let Some(record) = told.recv().await {
            last = record.0;
        }
        assert_eq!(last[5..], (4 * CHUNK as u64).to_be_bytes());
        assert_eq!(input.lock().bytes, 0);
    }

    #[tokio::test]
    async fn the_host_is_not_told_of_every_key() {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let input = Input::default();
        for _ in 0..100 {
            input.push(vec![b'x']).unwrap();
        }
        input.end();
        let (host, mut told) = mpsc::channel(8);
        input
            .feed(Some(Arc::new(sys::watch(writer).unwrap())), &host)
            .await;
        assert!(told.try_recv().is_err());
    }

    #[tokio::test]
    async fn input_that_nobody_reads_is_dropped_and_makes_room() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let sink = Arc::new(sys::watch(writer).unwrap());
        let input = Input::default();
        input.push(vec![0; INPUT_WINDOW_BYTES]).unwrap();
        input.end();
        let (host, _told) = mpsc::channel(8);
        input.feed(Some(sink), &host).await;
        assert_eq!(input.lock().bytes, 0);
    }
}
