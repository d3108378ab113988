// SPDX-License-Identifier: Apache-2.0
//! The records of `ExecStream` and `AttachStream`: kind (one byte), length (four bytes), payload.

use std::io;

use bulkhead_proto::agent::StreamEnd;
use bulkhead_proto::agent::record::{
    END, HEADER_BYTES, INPUT, MAX_PAYLOAD_BYTES, STDERR, STDOUT, WINDOW_SIZE,
};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::buffer::Source;

/// A record from the host.
#[derive(Debug, PartialEq, Eq)]
pub enum FromHost {
    Input(Vec<u8>),
    EndOfInput,
    WindowSize { columns: u16, rows: u16 },
}

/// Reads the next record. `None` if the host has closed the stream.
pub async fn read(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<FromHost>> {
    let kind = match reader.read_u8().await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        kind => kind?,
    };
    let length = usize::try_from(reader.read_u32().await?).unwrap_or(usize::MAX);
    match (kind, length) {
        (INPUT, 0) => Ok(Some(FromHost::EndOfInput)),
        (INPUT, 1..=MAX_PAYLOAD_BYTES) => {
            let mut bytes = vec![0; length];
            reader.read_exact(&mut bytes).await?;
            Ok(Some(FromHost::Input(bytes)))
        }
        (WINDOW_SIZE, 4) => Ok(Some(FromHost::WindowSize {
            columns: reader.read_u16().await?,
            rows: reader.read_u16().await?,
        })),
        _ => {
            let text = format!("unexpected record of kind {kind} with {length} bytes");
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
    }
}

/// A record for the host, encoded.
#[derive(Debug)]
pub struct ToHost(pub Vec<u8>);

impl ToHost {
    /// A record with output. A payload that is too long is cut; callers make sure that this does not happen.
    pub fn output(source: Source, payload: &[u8]) -> Self {
        let kind = match source {
            Source::Stdout => STDOUT,
            Source::Stderr => STDERR,
        };
        Self::new(kind, payload)
    }

    /// Reports how much input since the start of the stream has been written to the process or dropped.
    pub fn input_gone(total: u64) -> Self {
        Self::new(INPUT, &total.to_be_bytes())
    }

    pub fn end(end: &StreamEnd) -> Self {
        Self::new(END, &end.encode_to_vec())
    }

    fn new(kind: u8, payload: &[u8]) -> Self {
        let payload = &payload[..payload.len().min(MAX_PAYLOAD_BYTES)];
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&header(kind, payload.len()));
        bytes.extend_from_slice(payload);
        Self(bytes)
    }
}

/// The header of a record, here or in a log. A payload of `length` bytes follows.
pub fn header(kind: u8, length: usize) -> [u8; HEADER_BYTES] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(0).to_be_bytes();
    [kind, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::{FromHost, INPUT, MAX_PAYLOAD_BYTES, ToHost, WINDOW_SIZE, header, read};
    use crate::streams::buffer::Source;

    #[tokio::test]
    async fn what_the_host_says_is_read_until_it_leaves() {
        let mut bytes: &[u8] = b"\0\0\0\0\x02hi\x04\0\0\0\x04\0\x50\0\x18\0\0\0\0\0";
        let input = FromHost::Input(b"hi".to_vec());
        assert_eq!(read(&mut bytes).await.unwrap(), Some(input));
        let size = FromHost::WindowSize {
            columns: 80,
            rows: 24,
        };
        assert_eq!(read(&mut bytes).await.unwrap(), Some(size));
        assert_eq!(read(&mut bytes).await.unwrap(), Some(FromHost::EndOfInput));
        assert_eq!(read(&mut bytes).await.unwrap(), None);
    }

    #[tokio::test]
    async fn records_that_make_no_sense_are_refused_before_their_payload() {
        for (kind, length) in [(0, 65_532), (4, 3), (1, 4), (9, 0), (0, usize::MAX >> 33)] {
            let bytes = header(kind, length);
            assert!(read(&mut &bytes[..]).await.is_err(), "{kind} {length}");
        }
    }

    #[test]
    fn output_carries_its_source_and_length() {
        let ToHost(bytes) = ToHost::output(Source::Stderr, b"no");
        assert_eq!(bytes, b"\x02\0\0\0\x02no");
    }

    #[tokio::test]
    async fn for_all_kinds_and_lengths_only_what_the_protocol_has_is_read() {
        let lengths = [
            0,
            1,
            3,
            4,
            5,
            MAX_PAYLOAD_BYTES,
            MAX_PAYLOAD_BYTES + 1,
            u32::MAX as usize,
        ];
        for (kind, length) in (0..=u8::MAX).flat_map(|kind| lengths.map(|length| (kind, length))) {
            let payload = vec![7; length.min(MAX_PAYLOAD_BYTES + 1)];
            let bytes = [&header(kind, length)[..], &payload].concat();
            let mut rest = &bytes[..];
            let read = read(&mut rest).await;
            let is_good = match kind {
                INPUT => length <= MAX_PAYLOAD_BYTES,
                WINDOW_SIZE => length == 4,
                _ => false,
            };
            assert_eq!(read.is_ok(), is_good, "{kind} {length}");
            if is_good {
                assert!(rest.is_empty(), "{kind} {length}");
            }
        }
    }
}
