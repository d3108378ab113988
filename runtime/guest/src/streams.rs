// SPDX-License-Identifier: Apache-2.0
//! The byte streams of exec, attach and port-forward. Each is a connection into the guest.
//!
//! What the guest sends is limited and checked here. agent.proto describes the protocol.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_proto::agent::record::{
    END, HEADER_BYTES, INPUT, MAX_PAYLOAD_BYTES, STDERR, STDOUT, WINDOW_SIZE,
};
use bulkhead_proto::agent::{
    AttachStream, ExecStream, PortForwardStream, StreamEnd, open_stream::Kind,
};
use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::connect::{ConnectError, open};
use crate::text::bounded;

/// The most that is read at a time. A few records fit into it.
const READ_BYTES: usize = 128 << 10;

/// The guest broke the protocol, or is gone.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("the pod's VM or its agent is gone")]
    Gone,
    #[error("connection into the guest")]
    Io(#[from] io::Error),
    #[error("the guest sent a record of kind {kind} with {length} bytes")]
    Record { kind: u8, length: usize },
    /// An honest agent reports input again only when more is gone. So there are never more reports than bytes of input.
    #[error("the guest reported {said} bytes of input as gone, after {before}; {sent} were sent")]
    Input { said: u64, before: u64, sent: u64 },
    #[error("the guest ended a stream with a message that cannot be decoded")]
    End(#[from] prost::DecodeError),
}

/// What comes from a process.
#[derive(Debug, PartialEq, Eq)]
pub enum FromProcess {
    /// How many bytes of input the agent has passed on or discarded, counted from the start.
    InputGone(u64),
    Stdout(Bytes),
    Stderr(Bytes),
    Exited(i32),
    /// It could not run; the text says why.
    Failed(String),
}

/// The standard streams of a process in a guest.
#[derive(Debug)]
pub struct ProcessStreams {
    pub output: ProcessOutput,
    pub input: ProcessInput,
}

impl ProcessStreams {
    pub async fn exec(vsock: &Path, request: ExecStream) -> Result<Self, ConnectError> {
        Ok(Self::new(open(vsock, Kind::Exec(request)).await?))
    }

    pub async fn attach(vsock: &Path, request: AttachStream) -> Result<Self, ConnectError> {
        Ok(Self::new(open(vsock, Kind::Attach(request)).await?))
    }

    pub fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        let sent = Arc::new(AtomicU64::new(0));
        Self {
            output: ProcessOutput {
                reader,
                buffer: BytesMut::new(),
                gone: 0,
                sent: Arc::clone(&sent),
            },
            input: ProcessInput { writer, sent },
        }
    }
}

/// Connects to a port on the loopback interface of a pod. The stream carries the bytes of that connection, without
/// records. Its two halves can be closed independently.
pub async fn port_forward(vsock: &Path, port: u16) -> Result<UnixStream, ConnectError> {
    let request = PortForwardStream { port: port.into() };
    open(vsock, Kind::PortForward(request)).await
}

#[derive(Debug)]
pub struct ProcessOutput {
    reader: OwnedReadHalf,
    buffer: BytesMut,
    /// How many bytes of input the agent has reported as gone, of those that were sent.
    gone: u64,
    sent: Arc<AtomicU64>,
}

impl ProcessOutput {
    /// Waits for the next record. The future can be dropped without loss.
    pub async fn next(&mut self) -> Result<FromProcess, StreamError> {
        loop {
            if let Some(record) = take_record(&mut self.buffer)? {
                if let FromProcess::InputGone(said) = record {
                    self.check_input(said)?;
                }
                return Ok(record);
            }
            if self.buffer.is_empty() {
                // A process that says nothing for long needs no buffer.
                self.buffer = BytesMut::new();
            }
            self.reader.readable().await?;
            self.buffer.reserve(READ_BYTES);
            match self.reader.try_read_buf(&mut self.buffer) {
                Ok(0) => return Err(StreamError::Gone),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn check_input(&mut self, said: u64) -> Result<(), StreamError> {
        let (before, sent) = (self.gone, self.sent.load(Ordering::Acquire));
        if said <= before || said > sent {
            return Err(StreamError::Input { said, before, sent });
        }
        self.gone = said;
        Ok(())
    }
}

/// The bytes of a buffer, in no more memory than they need: they may wait long for a client.
pub fn shrunk(buffer: BytesMut) -> Bytes {
    match buffer.len() > buffer.capacity() / 2 {
        true => buffer.freeze(),
        false => Bytes::copy_from_slice(&buffer),
    }
}

/// Takes the first record out of the buffer. `None` if it is not complete yet. Its length is checked before it has
/// arrived.
fn take_record(buffer: &mut BytesMut) -> Result<Option<FromProcess>, StreamError> {
    let Some(&[kind, a, b, c, d]) = buffer.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    let valid = match kind {
        STDOUT | STDERR | END => length <= MAX_PAYLOAD_BYTES,
        INPUT => length == 8,
        _ => false,
    };
    if !valid {
        return Err(StreamError::Record { kind, length });
    }
    if buffer.len() < HEADER_BYTES.saturating_add(length) {
        return Ok(None);
    }
    buffer.advance(HEADER_BYTES);
    let payload = buffer.split_to(length);
    // A payload that shares the buffer keeps all of it.
    let mut payload = match length > READ_BYTES / 4 {
        true => payload.freeze(),
        false => Bytes::copy_from_slice(&payload),
    };
    Ok(Some(match kind {
        STDOUT => FromProcess::Stdout(payload),
        STDERR => FromProcess::Stderr(payload),
        INPUT => FromProcess::InputGone(payload.get_u64()),
        _ => end(StreamEnd::decode(payload)?),
    }))
}

fn end(end: StreamEnd) -> FromProcess {
    if end.error.is_empty() {
        // The range of exit codes in wait(2), whatever the guest sends.
        return FromProcess::Exited(end.exit_code.clamp(0, 255));
    }
    FromProcess::Failed(bounded(&end.error))
}

#[derive(Debug)]
pub struct ProcessInput {
    writer: OwnedWriteHalf,
    sent: Arc<AtomicU64>,
}

impl ProcessInput {
    /// Writes at most [`MAX_PAYLOAD_BYTES`] of input. If the future is dropped before its end, the stream cannot be
    /// used any more.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Before they are sent, because the agent may be fast.
        self.sent.fetch_add(bytes.len() as u64, Ordering::Release);
        self.record(INPUT, bytes).await
    }

    pub async fn end(&mut self) -> io::Result<()> {
        self.record(INPUT, &[]).await
    }

    pub async fn window_size(&mut self, columns: u16, rows: u16) -> io::Result<()> {
        let [a, b] = columns.to_be_bytes();
        let [c, d] = rows.to_be_bytes();
        self.record(WINDOW_SIZE, &[a, b, c, d]).await
    }

    async fn record(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let [a, b, c, d] = length.to_be_bytes();
        let mut bytes = Vec::with_capacity(HEADER_BYTES.saturating_add(payload.len()));
        bytes.extend_from_slice(&[kind, a, b, c, d]);
        bytes.extend_from_slice(payload);
        self.writer.write_all(&bytes).await
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    #[test]
    fn for_all_kinds_and_lengths_a_head_is_taken_or_refused_before_its_payload() {
        let lengths = [
            0,
            1,
            7,
            8,
            9,
            MAX_PAYLOAD_BYTES,
            MAX_PAYLOAD_BYTES + 1,
            u32::MAX as usize,
        ];
        for (kind, length) in (0..=u8::MAX).flat_map(|kind| lengths.map(|length| (kind, length))) {
            let is_good = match kind {
                INPUT => length == 8,
                STDOUT | STDERR | END => length <= MAX_PAYLOAD_BYTES,
                _ => false,
            };
            let [a, b, c, d] = u32::try_from(length).unwrap().to_be_bytes();
            let mut buffer = BytesMut::from(&[kind, a, b, c, d][..]);
            let taken = take_record(&mut buffer);
            assert_eq!(taken.is_ok(), is_good, "{kind} {length}");
            if is_good && length > 0 {
                assert!(matches!(taken, Ok(None)), "{kind} {length}");
                assert_eq!(buffer.len(), HEADER_BYTES, "nothing was taken");
            }
        }
    }

    proptest! {
        #[test]
        fn for_all_cuts_the_same_records_are_read(
            payloads in proptest::collection::vec(
                (prop_oneof![Just(STDOUT), Just(STDERR)], proptest::collection::vec(any::<u8>(), 0..50)),
                0..10,
            ),
            cuts in proptest::collection::vec(1usize..30, 1..20),
        ) {
            let (mut bytes, mut expected) = (Vec::new(), Vec::new());
            for (kind, payload) in payloads {
                bytes.push(kind);
                bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
                bytes.extend(&payload);
                let payload = Bytes::from(payload);
                expected.push(match kind {
                    STDOUT => FromProcess::Stdout(payload),
                    _ => FromProcess::Stderr(payload),
                });
            }
            let (mut buffer, mut records) = (BytesMut::new(), Vec::new());
            let mut rest = &bytes[..];
            for cut in cuts.into_iter().cycle() {
                let (piece, later) = rest.split_at(cut.min(rest.len()));
                buffer.extend_from_slice(piece);
                while let Some(record) = take_record(&mut buffer).unwrap() {
                    records.push(record);
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(records, expected);
        }
    }

    fn capacity(bytes: Bytes) -> usize {
        bytes.try_into_mut().unwrap().capacity()
    }

    #[test]
    fn what_waits_for_a_client_holds_no_more_memory_than_it_needs() {
        let read = |bytes: &[u8]| {
            let mut buffer = BytesMut::with_capacity(READ_BYTES);
            buffer.extend_from_slice(bytes);
            buffer
        };
        assert!(capacity(shrunk(read(b"hello"))) < 64);
        assert_eq!(capacity(shrunk(read(&[7; READ_BYTES]))), READ_BYTES);
        let record = take_record(&mut read(b"\x01\0\0\0\x02hi")).unwrap();
        let Some(FromProcess::Stdout(payload)) = record else {
            panic!("{record:?}");
        };
        assert!(capacity(payload) < 64);
    }

    #[tokio::test]
    async fn a_process_that_is_silent_has_no_buffer() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let mut output = ProcessStreams::new(ours).output;
        agent.write_all(b"\x01\0\0\0\x02hi").await.unwrap();
        output.next().await.unwrap();
        let silent = std::time::Duration::from_millis(10);
        tokio::time::timeout(silent, output.next())
            .await
            .unwrap_err();
        assert_eq!(output.buffer.capacity(), 0);
    }

    #[tokio::test]
    async fn records_are_taken_one_by_one_however_they_arrive() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let ProcessStreams {
            mut output,
            mut input,
        } = ProcessStreams::new(ours);
        input.write(b"7 bytes").await.unwrap();
        tokio::spawn(async move {
            let mut heard = [0; HEADER_BYTES + 7];
            agent.read_exact(&mut heard).await.unwrap();
            let mut bytes = b"\x01\0\0\0\x02hi\x02\0\0\0\x01!\0\0\0\0\x08".to_vec();
            bytes.extend(7u64.to_be_bytes());
            bytes.extend(b"\x03\0\0\0\x03\x08\xac\x02");
            for byte in bytes {
                agent.write_all(&[byte]).await.unwrap();
            }
        });
        let expected = [
            FromProcess::Stdout(Bytes::from_static(b"hi")),
            FromProcess::Stderr(Bytes::from_static(b"!")),
            FromProcess::InputGone(7),
            FromProcess::Exited(255),
        ];
        for record in expected {
            assert_eq!(output.next().await.unwrap(), record);
        }
        assert!(matches!(output.next().await, Err(StreamError::Gone)));
    }

    #[tokio::test]
    async fn a_guest_cannot_report_input_that_was_not_sent_nor_the_same_again() {
        for (case, reports, taken) in [
            ("more than was sent", [11, 12], 0),
            ("all that there is", [u64::MAX, 0], 0),
            ("nothing", [0, 1], 0),
            ("the same again", [4, 4], 1),
            ("less than before", [4, 3], 1),
            ("more and more", [4, 10], 2),
        ] {
            let (ours, mut agent) = UnixStream::pair().unwrap();
            let ProcessStreams {
                mut output,
                mut input,
            } = ProcessStreams::new(ours);
            input.write(&[b'x'; 10]).await.unwrap();
            for report in reports {
                let record = [&b"\0\0\0\0\x08"[..], &report.to_be_bytes()].concat();
                agent.write_all(&record).await.unwrap();
            }
            for report in &reports[..taken] {
                let record = output.next().await.unwrap();
                assert_eq!(record, FromProcess::InputGone(*report), "{case}");
            }
            if taken < reports.len() {
                let error = output.next().await.unwrap_err();
                assert!(
                    matches!(error, StreamError::Input { .. }),
                    "{case}: {error}"
                );
            }
        }
    }

    #[test]
    fn a_guest_that_breaks_the_protocol_is_refused_before_its_payload_is_there() {
        for head in [
            [1, 0, 1, 0, 0],
            [0, 0, 0, 0, 9],
            [9, 0, 0, 0, 0],
            [3, 255, 255, 255, 255],
        ] {
            let mut buffer = BytesMut::from(&head[..]);
            assert!(take_record(&mut buffer).is_err(), "{head:?}");
        }
        let mut no_end = BytesMut::from(&b"\x03\0\0\0\x01\xff"[..]);
        assert!(take_record(&mut no_end).is_err());
    }

    #[test]
    fn what_a_guest_says_of_a_failure_is_cut_and_made_printable() {
        let failure = StreamEnd {
            exit_code: 0,
            error: format!("\x1b[2J{}", "x".repeat(10_000)),
        };
        let FromProcess::Failed(text) = end(failure) else {
            panic!("it failed");
        };
        assert!(text.len() < 5000, "{}", text.len());
        assert!(!text.contains('\x1b'));
    }
}
