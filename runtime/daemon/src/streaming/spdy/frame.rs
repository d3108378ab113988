// SPDX-License-Identifier: Apache-2.0
//! Encodes and parses frames (SPDY/3.1, 2.2 and 2.6). Pure. Lengths are checked before anything is allocated.

/// The length of every frame's head.
pub const HEAD_BYTES: usize = 8;
/// The longest control frame that is accepted. Those of Kubernetes have a few hundred bytes.
pub const MAX_CONTROL_BYTES: usize = 16 << 10;

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;
const FLAG_FIN: u8 = 1;
const ID_MASK: u32 = 0x7fff_ffff;

/// Why a stream is reset (2.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    InvalidStream = 2,
    RefusedStream = 3,
}

/// Why a connection ends (2.6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoAway {
    Ok = 0,
    ProtocolError = 1,
}

/// A frame that breaks the protocol. The connection must end.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("a control frame of SPDY version {0} instead of {VERSION}")]
    Version(u16),
    #[error("a control frame of type {kind} with {length} bytes")]
    Length { kind: u16, length: usize },
    #[error("data on stream 0")]
    StreamZero,
}

/// The first eight bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    Data {
        stream: u32,
        fin: bool,
        length: usize,
    },
    Control {
        kind: u16,
        fin: bool,
        length: usize,
    },
}

impl Head {
    pub fn parse(bytes: [u8; HEAD_BYTES]) -> Result<Self, FrameError> {
        let [a, b, c, d, flags, l1, l2, l3] = bytes;
        let length = u32::from_be_bytes([0, l1, l2, l3]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let fin = flags & FLAG_FIN != 0;
        if a & 0x80 == 0 {
            let stream = u32::from_be_bytes([a, b, c, d]);
            if stream == 0 {
                return Err(FrameError::StreamZero);
            }
            return Ok(Self::Data {
                stream,
                fin,
                length,
            });
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = u16::from_be_bytes([c, d]);
        if length > MAX_CONTROL_BYTES {
            return Err(FrameError::Length { kind, length });
        }
        Ok(Self::Control { kind, fin, length })
    }
}

/// A control frame from the client. Its header block is still compressed.
#[derive(Debug, PartialEq, Eq)]
pub enum Control<'a> {
    SynStream {
        stream: u32,
        block: &'a [u8],
    },
    /// More headers of an existing stream. They are not used, but they must be decoded to keep the compression's state.
    Headers {
        block: &'a [u8],
    },
    RstStream {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// Settings, window updates and unknown frames.
    Ignored,
}

impl<'a> Control<'a> {
    pub fn parse(kind: u16, payload: &'a [u8]) -> Result<Self, FrameError> {
        let wrong = FrameError::Length {
            kind,
            length: payload.len(),
        };
        let number = |at: usize| {
            let bytes = payload.get(at..)?.first_chunk::<4>()?;
            Some(u32::from_be_bytes(*bytes))
        };
        let parsed = match kind {
            SYN_STREAM => number(0).zip(payload.get(10..)).map(|(stream, block)| {
                let stream = stream & ID_MASK;
                Self::SynStream { stream, block }
            }),
            SYN_REPLY | HEADERS => payload.get(4..).map(|block| Self::Headers { block }),
            RST_STREAM => number(0).zip(number(4)).map(|(stream, _status)| {
                let stream = stream & ID_MASK;
                Self::RstStream { stream }
            }),
            PING => number(0).map(|id| Self::Ping { id }),
            GOAWAY => Some(Self::GoAway),
            _ => Some(Self::Ignored),
        };
        parsed.ok_or(wrong)
    }
}

/// The head of a data frame. `length` must be below 2^24.
pub fn data(stream: u32, fin: bool, length: usize) -> [u8; HEAD_BYTES] {
    let [a, b, c, d] = (stream & ID_MASK).to_be_bytes();
    let [_, l1, l2, l3] = u32::try_from(length).unwrap_or(0).to_be_bytes();
    [a, b, c, d, u8::from(fin) * FLAG_FIN, l1, l2, l3]
}

fn control(kind: u16, payload: &[&[u8]]) -> Vec<u8> {
    let length = payload.iter().map(|part| part.len()).sum::<usize>();
    let [_, l1, l2, l3] = u32::try_from(length).unwrap_or(0).to_be_bytes();
    let [k1, k2] = kind.to_be_bytes();
    let [v1, v2] = (0x8000 | VERSION).to_be_bytes();
    let mut bytes = vec![v1, v2, k1, k2, 0, l1, l2, l3];
    payload
        .iter()
        .for_each(|part| bytes.extend_from_slice(part));
    bytes
}

pub fn syn_reply(stream: u32, block: &[u8]) -> Vec<u8> {
    control(SYN_REPLY, &[&stream.to_be_bytes(), block])
}

pub fn rst_stream(stream: u32, reset: Reset) -> Vec<u8> {
    let status = reset as u32;
    control(RST_STREAM, &[&stream.to_be_bytes(), &status.to_be_bytes()])
}

pub fn ping(id: u32) -> Vec<u8> {
    control(PING, &[&id.to_be_bytes()])
}

pub fn go_away(last_stream: u32, why: GoAway) -> Vec<u8> {
    let status = why as u32;
    control(GOAWAY, &[&last_stream.to_be_bytes(), &status.to_be_bytes()])
}

/// Lets the client send so many bytes more. Stream 0 stands for the whole connection.
pub fn window_update(stream: u32, bytes: u32) -> Vec<u8> {
    control(
        WINDOW_UPDATE,
        &[&stream.to_be_bytes(), &bytes.to_be_bytes()],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heads_that_break_the_protocol_are_refused_before_anything_is_read() {
        let table = [
            ([0x80, 2, 0, 1, 0, 0, 0, 0], FrameError::Version(2)),
            ([0, 0, 0, 0, 0, 0, 0, 1], FrameError::StreamZero),
            (
                [0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
                FrameError::Length {
                    kind: 1,
                    length: 0xff_ffff,
                },
            ),
        ];
        for (bytes, error) in table {
            assert_eq!(Head::parse(bytes), Err(error));
        }
    }

    #[test]
    fn control_frames_that_are_too_short_are_refused() {
        for (kind, least) in [(1, 10), (2, 4), (3, 8), (6, 4), (8, 4)] {
            let payload = vec![0; least];
            assert!(Control::parse(kind, &payload).is_ok(), "{kind}");
            let short = payload.get(1..).unwrap();
            assert!(Control::parse(kind, short).is_err(), "{kind}");
        }
    }

    #[test]
    fn what_is_written_has_the_form_of_the_specification() {
        assert_eq!(data(7, true, 258), [0, 0, 0, 7, 1, 0, 1, 2]);
        assert_eq!(ping(9), [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9]);
        let reset = rst_stream(5, Reset::RefusedStream);
        assert_eq!(reset, [0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 3]);
        let away = go_away(3, GoAway::ProtocolError);
        assert_eq!(away, [0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 1]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_fail_otherwise_than_by_an_error(
            head in any::<[u8; HEAD_BYTES]>(),
            kind in 0u16..12,
            payload in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            if let Ok(Head::Control { length, .. }) = Head::parse(head) {
                prop_assert!(length <= MAX_CONTROL_BYTES);
            }
            let _ = Control::parse(kind, &payload);
        }

        #[test]
        fn data_heads_come_back_as_they_were(
            stream in 1u32..=ID_MASK,
            fin in any::<bool>(),
            length in 0usize..1 << 24,
        ) {
            let head = Head::parse(data(stream, fin, length)).unwrap();
            prop_assert_eq!(head, Head::Data { stream, fin, length });
        }
    }
}
