// SPDX-License-Identifier: Apache-2.0
//! One stream of a connection: its two halves, which close alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::frame::{self, Reset};
use super::headers::Headers;
use super::outbox::{Gone, Out, Outbox};

/// How much of a stream may wait to be read, as SPDY has it for a client that was told nothing else.
pub const WINDOW_BYTES: usize = 64 << 10;
/// So much was read before the client's window is opened again.
const UPDATE_BYTES: usize = WINDOW_BYTES / 2;
/// What keeping a chunk costs at least, as a part of the window.
const LEAST_CHUNK_BYTES: usize = 256;

/// What the connection hands to a stream's reader.
#[derive(Debug)]
pub enum Chunk {
    /// With the part of the window that it takes.
    Data(Bytes, OwnedSemaphorePermit),
    Fin,
}

/// How much the client may send: held against what waits to be read, whether it heeds it or not.
#[derive(Debug)]
pub struct Window {
    room: Arc<Semaphore>,
    /// Bytes that the client may still send by what it was told.
    left: AtomicI64,
    /// It has sent more than that once, so telling it is a system call for nothing.
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

    /// Room for a chunk that came, once there is some; `None` if nobody reads the stream any more.
    pub async fn room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let length = i64::try_from(bytes).unwrap_or(i64::MAX);
        if self.left.fetch_sub(length, Ordering::Relaxed) < length {
            self.is_heeded.store(false, Ordering::Relaxed);
        }
        let cost = u32::try_from(bytes.max(LEAST_CHUNK_BYTES)).unwrap_or(u32::MAX);
        Arc::clone(&self.room).acquire_many_owned(cost).await.ok()
    }

    /// So many bytes were read. Whether the client should be told.
    fn open(&self, bytes: usize) -> bool {
        // Before the client is told: it must not send by a leave that is not here yet.
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.left.fetch_add(bytes, Ordering::Relaxed);
        self.is_heeded.load(Ordering::Relaxed)
    }
}

/// A stream that the client has opened and nobody has answered yet.
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
        // Who has left needs no refusal.
        let _ = self.outbox.send(Out::control(reset)).await;
    }
}

/// The client's half of a stream. Dropped early, the rest is thrown away.
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
    /// The next bytes, `None` once the client has finished its half. May be cancelled without loss.
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
        // The connection must not wait for a window that nobody opens any more.
        self.window.room.close();
    }
}

/// Our half of a stream. Dropped, it is finished if the connection takes it at once.
#[derive(Debug)]
pub struct StreamWriter {
    id: u32,
    outbox: Outbox,
    finished: bool,
}

impl StreamWriter {
    /// Sends bytes, at most 16 MiB at once. Waits while the client does not read.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), Gone> {
        self.outbox.send(Out::data(self.id, false, bytes)).await
    }

    /// Nothing more comes.
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
