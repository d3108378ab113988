// SPDX-License-Identifier: Apache-2.0
//! One SPDY connection. One task reads frames and passes them to streams, another one writes.
//!
//! Memory is bounded: a stream holds at most its window, a connection has at most [`MAX_STREAMS`] streams, and at most
//! [`outbox::QUEUED_FRAMES`] frames wait to be written.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, BufReader};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::frame::{self, Control, FrameError, GoAway, HEAD_BYTES, Head, Reset};
use super::headers::{Decoder, HeaderError};
use super::outbox::{self, Gone, Out, Outbox};
use super::stream::{Chunk, Stream, Window};
use crate::streaming::peer::Peer;

/// The most streams of one connection at a time.
const MAX_STREAMS: usize = 256;
/// How many new streams may wait for [`Connection::next`].
const NEW_STREAMS: usize = 16;
/// The largest chunk that a stream gets at a time. It is what Kubernetes' clients send in one frame.
const CHUNK_BYTES: usize = 32 << 10;
/// How much is read from the client at a time: two such frames.
const READ_BYTES: usize = 2 * (HEAD_BYTES + CHUNK_BYTES);
/// How long the last frames may take to be written.
const FLUSH_TIME: Duration = Duration::from_secs(30);
/// How long the last frame may take to be written when the server ends the connection because of an error.
pub const GOODBYE_TIME: Duration = Duration::from_secs(2);
/// How long the client may take to hang up after the last frames.
const LINGER_TIME: Duration = Duration::from_secs(3);

/// Why a connection broke.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("stream {0}, but a new stream must have an odd number that is higher than all before")]
    StreamId(u32),
    #[error("connection")]
    Io(#[from] io::Error),
    #[error("the client has left")]
    Left,
}

impl ConnectionError {
    fn is_protocol(&self) -> bool {
        !matches!(self, Self::Io(_) | Self::Left)
    }
}

/// A client's connection. Dropping it ends the connection at once.
#[derive(Debug)]
pub struct Connection {
    incoming: mpsc::Receiver<Stream>,
    outbox: Outbox,
    reading: JoinHandle<()>,
    writing: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reading.abort();
        // The writer is not aborted, because it may be writing the last frame. It ends by itself.
        self.outbox.close();
    }
}

impl Connection {
    pub fn new<R, W>(reader: R, writer: W, peer: Arc<Peer>) -> Self
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (outbox, queue) = Outbox::new();
        let (new, incoming) = mpsc::channel(NEW_STREAMS);
        let closed = outbox.closed();
        let mut reader = Reader {
            reader: BufReader::with_capacity(READ_BYTES, reader),
            decoder: Decoder::default(),
            streams: HashMap::new(),
            last: 0,
            discarded: 0,
            new,
            outbox: outbox.clone(),
            peer,
        };
        let reading = tokio::spawn(async move {
            let error = reader.run().await;
            reader.streams.clear();
            if error.is_protocol() {
                tracing::info!("a streaming client is cut off: it sent {error}");
                let away = frame::go_away(reader.last, GoAway::ProtocolError);
                reader.outbox.try_send(Out::control(away));
            }
            reader.outbox.close();
        });
        let writing = tokio::spawn(async move {
            let late = async {
                closed.cancelled().await;
                tokio::time::sleep(GOODBYE_TIME).await;
            };
            tokio::select! {
                // An error means that the client has left. The reader notices that too.
                _ = outbox::write(queue, writer) => {}
                () = late => {}
            }
            closed.cancel();
        });
        Self {
            incoming,
            outbox,
            reading,
            writing,
        }
    }

    /// Waits for the next stream that the client opens. `None` when the client has left.
    pub async fn next(&mut self) -> Option<Stream> {
        let closed = self.outbox.closed();
        tokio::select! {
            stream = self.incoming.recv() => stream,
            () = closed.cancelled() => None,
        }
    }

    /// Refuses all streams that the client opens from now on.
    pub fn refuse_more(&mut self) {
        self.incoming.close();
    }

    /// A token that is cancelled when the connection has ended.
    pub fn closed(&self) -> CancellationToken {
        self.outbox.closed()
    }

    /// Writes all queued frames and a last one, and closes the connection. Streams should be finished before.
    pub async fn finish(mut self) {
        self.incoming.close();
        let end = self.outbox.send(Out::End).await;
        if end.is_ok() && timeout(FLUSH_TIME, &mut self.writing).await.is_ok() {
            // Closing a socket with unread input resets the connection, and the client might miss the last frames.
            let _ = timeout(LINGER_TIME, &mut self.reading).await;
        }
    }
}

/// What the reading task knows of a stream.
#[derive(Debug)]
struct Entry {
    chunks: mpsc::UnboundedSender<Chunk>,
    window: Arc<Window>,
}

struct Reader<R> {
    reader: BufReader<R>,
    decoder: Decoder,
    /// The streams whose client's half is still open.
    streams: HashMap<u32, Entry>,
    last: u32,
    /// Discarded bytes that were not yet added to the connection's window again.
    discarded: usize,
    new: mpsc::Sender<Stream>,
    outbox: Outbox,
    peer: Arc<Peer>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    async fn run(&mut self) -> ConnectionError {
        loop {
            if let Err(error) = self.read_frame().await {
                return error;
            }
        }
    }

    async fn read_frame(&mut self) -> Result<(), ConnectionError> {
        let mut head = [0; HEAD_BYTES];
        self.reader.read_exact(&mut head).await?;
        match Head::parse(head)? {
            Head::Data {
                stream,
                fin,
                length,
            } => self.read_data(stream, fin, length).await,
            Head::Control { kind, fin, length } => {
                let mut payload = vec![0; length];
                self.reader.read_exact(&mut payload).await?;
                self.control(Control::parse(kind, &payload)?, fin).await
            }
        }
    }

    async fn read_data(
        &mut self,
        stream: u32,
        fin: bool,
        length: usize,
    ) -> Result<(), ConnectionError> {
        if stream > self.last {
            // The stream was never opened. Data for a stream that has ended already is ignored.
            let reset = frame::rst_stream(stream, Reset::InvalidStream);
            self.send(reset).await?;
        }
        let mut left = length;
        while left > 0 {
            let size = left.min(CHUNK_BYTES);
            let mut chunk = BytesMut::zeroed(size);
            self.reader.read_exact(&mut chunk).await?;
            left = left.saturating_sub(size);
            self.deliver(stream, chunk.freeze()).await?;
        }
        if fin && let Some(entry) = self.streams.remove(&stream) {
            // An error means that the stream's reader was dropped.
            let _ = entry.chunks.send(Chunk::Fin);
        }
        Ok(())
    }

    async fn deliver(&mut self, stream: u32, chunk: Bytes) -> Result<(), ConnectionError> {
        let length = chunk.len();
        if let Some(entry) = self.streams.get(&stream) {
            let room = tokio::select! {
                biased;
                room = entry.window.room(length) => room,
                () = self.peer.left() => return Err(ConnectionError::Left),
            };
            if let Some(room) = room
                && entry.chunks.send(Chunk::Data(chunk, room)).is_ok()
            {
                return Ok(());
            }
        }
        self.discarded = self.discarded.saturating_add(length);
        if self.discarded >= CHUNK_BYTES {
            let bytes = u32::try_from(self.discarded).unwrap_or(u32::MAX);
            self.discarded = 0;
            self.send(frame::window_update(0, bytes)).await?;
        }
        Ok(())
    }

    async fn control(&mut self, control: Control<'_>, fin: bool) -> Result<(), ConnectionError> {
        match control {
            Control::SynStream { stream, block } => {
                let headers = self.decoder.decode(block)?;
                if stream % 2 == 0 || stream <= self.last {
                    return Err(ConnectionError::StreamId(stream));
                }
                self.last = stream;
                self.open(stream, headers, fin).await
            }
            Control::Headers { block } => self.decoder.decode(block).map(drop).map_err(Into::into),
            Control::RstStream { stream } => {
                self.streams.remove(&stream);
                Ok(())
            }
            Control::Ping { id } if id % 2 == 1 => self.send(frame::ping(id)).await,
            Control::GoAway => Ok(()),
            // A ping with an even id answers one of ours, but the server sends none.
            Control::Ping { .. } | Control::Ignored => Ok(()),
        }
    }

    async fn open(
        &mut self,
        id: u32,
        headers: super::headers::Headers,
        fin: bool,
    ) -> Result<(), ConnectionError> {
        // Make room: an entry is of no use if its stream's reader was dropped.
        if self.streams.len() >= MAX_STREAMS {
            self.streams.retain(|_, entry| !entry.chunks.is_closed());
        }
        if self.streams.len() >= MAX_STREAMS {
            return self.send(frame::rst_stream(id, Reset::RefusedStream)).await;
        }
        let (chunks, received) = mpsc::unbounded_channel();
        let window = Arc::new(Window::new());
        if fin {
            let _ = chunks.send(Chunk::Fin);
        } else {
            let window = Arc::clone(&window);
            self.streams.insert(id, Entry { chunks, window });
        }
        let stream = Stream {
            id,
            headers,
            chunks: received,
            window,
            outbox: self.outbox.clone(),
        };
        if let Err(refused) = self.new.send(stream).await {
            self.streams.remove(&id);
            refused.0.refuse().await;
        }
        Ok(())
    }

    async fn send(&mut self, frame: Vec<u8>) -> Result<(), ConnectionError> {
        let sent = self.outbox.send(Out::control(frame)).await;
        sent.map_err(|Gone| ConnectionError::Left)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
