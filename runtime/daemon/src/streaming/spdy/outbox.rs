// SPDX-License-Identifier: Apache-2.0
//! Frames to the client: a queue that streams and the reading task fill, and the task that writes the frames.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::frame::{self, GoAway};
use super::headers::Encoder;

/// How many frames of all streams may wait to be written.
pub const QUEUED_FRAMES: usize = 4;

/// The stream was reset or its connection has ended.
#[derive(Debug, thiserror::Error)]
#[error("the client has left the stream")]
pub struct Gone;

/// A frame to be written, or the end of the connection.
#[derive(Debug)]
pub enum Out {
    Frame { head: Bytes, payload: Bytes },
    End,
}

impl Out {
    pub fn control(bytes: Vec<u8>) -> Self {
        Self::Frame {
            head: bytes.into(),
            payload: Bytes::new(),
        }
    }

    pub fn data(stream: u32, fin: bool, payload: Bytes) -> Self {
        let head = frame::data(stream, fin, payload.len());
        Self::Frame {
            head: Bytes::copy_from_slice(&head),
            payload,
        }
    }
}

/// The sender to the writing task.
#[derive(Clone, Debug)]
pub struct Outbox {
    frames: mpsc::Sender<Out>,
    encoder: Arc<Mutex<Option<Encoder>>>,
    closed: CancellationToken,
}

impl Outbox {
    /// Makes the queue: the sender, and the receiver for [`write()`].
    pub fn new() -> (Self, mpsc::Receiver<Out>) {
        let (frames, queue) = mpsc::channel(QUEUED_FRAMES);
        let outbox = Self {
            frames,
            encoder: Arc::new(Mutex::new(Encoder::new().ok())),
            closed: CancellationToken::new(),
        };
        (outbox, queue)
    }

    /// A token that is cancelled when the connection has ended.
    pub fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    pub fn close(&self) {
        self.closed.cancel();
    }

    pub async fn send(&self, frame: Out) -> Result<(), Gone> {
        self.frames.send(frame).await.map_err(|_| Gone)
    }

    pub fn try_send(&self, frame: Out) {
        // The queue is full only if the client does not read, and then it would not read this frame either.
        let _ = self.frames.try_send(frame);
    }

    pub async fn reply(&self, stream: u32) -> Result<(), Gone> {
        // Blocks must be sent in the order in which they are compressed. So the place in the queue is reserved first.
        let permit = self.frames.reserve().await.map_err(|_| Gone)?;
        let mut encoder = self.encoder.lock().unwrap_or_else(PoisonError::into_inner);
        let block = encoder.as_mut().and_then(|encoder| encoder.empty().ok());
        permit.send(Out::control(frame::syn_reply(stream, &block.ok_or(Gone)?)));
        Ok(())
    }

    pub async fn open_window(&self, stream: u32, bytes: usize) -> Result<(), Gone> {
        let bytes = u32::try_from(bytes).unwrap_or(0);
        let mut both = frame::window_update(stream, bytes);
        both.extend(frame::window_update(0, bytes));
        self.send(Out::control(both)).await
    }
}

/// The writing task. It ends after [`Out::End`], or when all senders are gone.
pub async fn write(
    mut queue: mpsc::Receiver<Out>,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    loop {
        let next = match queue.try_recv() {
            Ok(next) => Some(next),
            Err(_) => {
                writer.flush().await?;
                queue.recv().await
            }
        };
        match next {
            Some(Out::Frame { head, payload }) => write_both(&mut writer, head, payload).await?,
            Some(Out::End) => {
                writer.write_all(&frame::go_away(0, GoAway::Ok)).await?;
                return writer.shutdown().await;
            }
            None => return writer.shutdown().await,
        }
    }
}

async fn write_both(
    writer: &mut (impl AsyncWrite + Unpin),
    head: Bytes,
    payload: Bytes,
) -> io::Result<()> {
    let slices = [IoSlice::new(&head), IoSlice::new(&payload)];
    let written = writer.write_vectored(&slices).await?;
    let rest = head.get(written..).unwrap_or_default();
    writer.write_all(rest).await?;
    let of_payload = written.saturating_sub(head.len());
    let rest = payload.get(of_payload..).unwrap_or_default();
    writer.write_all(rest).await
}
