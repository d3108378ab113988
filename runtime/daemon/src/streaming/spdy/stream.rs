// SPDX-License-Identifier: Apache-2.0
//! One stream of a connection. Its two halves are closed independently.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::frame::{self, Reset};
use super::headers::Headers;
use super::outbox::{Gone, Out, Outbox};

/// How much of a stream may wait to be read. It is SPDY's default for the client's window.
pub const WINDOW_BYTES: usize = 64 << 10;
/// The client's window is opened again after so much was read.
const UPDATE_BYTES: usize = WINDOW_BYTES / 2;
/// A chunk takes at least this part of the window, because each chunk needs memory besides its bytes.
const LEAST_CHUNK_BYTES: usize = 256;

/// What the connection hands to a stream's reader.
#[derive(Debug)]
pub enum Chunk {
    /// Bytes, and the part of the window that they take.
    Data(Bytes, OwnedSemaphorePermit),
    Fin,
}

/// How much of a stream may wait to be read. It limits the client whether or not the client obeys flow control.
#[derive(Debug)]
pub struct Window {
    room: Arc<Semaphore>,
    /// How many bytes the client may still send according to the window updates that it got.
    left: AtomicI64,
    /// Whether the client obeys window updates. False once it has sent more than allowed: then it gets no more updates,
    /// because each would only cost a system call.
    is_heeded: AtomicBool,
}

impl Window {
    pub fn new() -> Self {
        Self {
            room: Arc::new(Semaphore::new(WINDOW_BYTES)),
            left: AtomicI64::new(WINDOW_BYTES as i64),
            is_heeded: AtomicBool::new(true),
        }
    }

    /// Waits until there is room for a received chunk. `None` if the stream's reader was dropped.
    pub async fn room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let length = i64::try_from(bytes).unwrap_or(i64::MAX);
        if self.left.fetch_sub(length, Ordering::Relaxed) < length {
            self.is_heeded.store(false, Ordering::Relaxed);
        }
        let cost = u32::try_from(bytes.max(LEAST_CHUNK_BYTES)).unwrap_or(u32::MAX);
        Arc::clone(&self.room).acquire_many_owned(cost).await.ok()
    }

    /// Counts bytes that were read. Returns whether to send the client a window update.
    fn open(&self, bytes: usize) -> bool {
        // Count before the update is sent, so that data that the update allows is not taken for disobedience.
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.left.fetch_add(bytes, Ordering::Relaxed);
        self.is_heeded.load(Ordering::Relaxed)
    }
}

/// A stream that the client has opened and that was not answered yet.
#[derive(Debug)]
pub struct Stream {
    pub id: u32,
    pub headers: Headers,
    pub(super) chunks: mpsc::UnboundedReceiver<Chunk>,
    pub(super) window: Arc<Window>,
    pub(super) outbox: Outbox,
}

impl Stream {
    pub async fn accept(self) -> Result<(StreamReader, StreamWriter), Gone> {
        self.outbox.reply(self.id).await?;
        let reader = StreamReader {
            id: self.id,
            chunks: self.chunks,
            window: self.window,
            outbox: self.outbox.clone(),
            unreported: 0,
            ended: false,
        };
        let writer = StreamWriter {
            id: self.id,
            outbox: self.outbox,
            finished: false,
        };
        Ok((reader, writer))
    }

    pub async fn refuse(self) {
        let reset = frame::rst_stream(self.id, Reset::RefusedStream);
        // An error means that the client has left.
        let _ = self.outbox.send(Out::control(reset)).await;
    }
}

/// The client's half of a stream. If it is dropped early, the rest of the data is discarded.
#[derive(Debug)]
pub struct StreamReader {
    id: u32,
    chunks: mpsc::UnboundedReceiver<Chunk>,
    window: Arc<Window>,
    outbox: Outbox,
    unreported: usize,
    ended: bool,
}

impl StreamReader {
    /// Waits for the next bytes. `None` when the client has finished its half. The future can be dropped without loss.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Gone> {
        if self.ended {
            return Ok(None);
        }
        if self.unreported >= UPDATE_BYTES {
            if self.window.open(self.unreported) {
                self.outbox.open_window(self.id, self.unreported).await?;
            }
            self.unreported = 0;
        }
        match self.chunks.recv().await {
            Some(Chunk::Data(bytes, _window)) => {
                self.unreported = self.unreported.saturating_add(bytes.len());
                Ok(Some(bytes))
            }
            Some(Chunk::Fin) => {
                self.ended = true;
                Ok(None)
            }
            None => Err(Gone),
        }
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        // Otherwise the connection would wait for room in this stream for ever.
        self.window.room.close();
    }
}

/// The server's half of a stream. Dropping it finishes it, unless the connection's queue is full.
#[derive(Debug)]
pub struct StreamWriter {
    id: u32,
    outbox: Outbox,
    finished: bool,
}

impl StreamWriter {
    /// Sends bytes, at most 16 MiB at a time. Waits while the client does not read.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), Gone> {
        self.outbox.send(Out::data(self.id, false, bytes)).await
    }

    /// Finishes this half.
    pub async fn finish(mut self) -> Result<(), Gone> {
        self.finished = true;
        let fin = Out::data(self.id, true, Bytes::new());
        self.outbox.send(fin).await
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.outbox.try_send(Out::data(self.id, true, Bytes::new()));
        }
    }
}
