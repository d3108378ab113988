// SPDX-License-Identifier: Apache-2.0
//! The part of a container's output that the host has not stored yet. Pure: no I/O, no clock.
//!
//! Positions count payload bytes of both streams since the container's start. A record is dropped when all of it
//! has been acknowledged. Of a record that is acknowledged in part, the rest is kept.

use std::collections::VecDeque;

use bulkhead_proto::agent::log_record::MAX_PAYLOAD_BYTES;

/// When this many bytes are kept, the container's pipes are not read any more.
pub const CAPACITY_BYTES: usize = 1 << 20;
/// What a record takes in addition to its payload. It is counted, because single bytes on alternating streams
/// would otherwise fill the guest's memory long before they fill the buffer.
const RECORD_OVERHEAD_BYTES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub source: Source,
    pub payload: Vec<u8>,
}

#[derive(Debug)]
struct Kept {
    /// The position of the first byte.
    start: u64,
    source: Source,
    payload: Vec<u8>,
}

impl Kept {
    fn end(&self) -> u64 {
        self.start + self.payload.len() as u64
    }
}

/// The log of one container in memory.
#[derive(Debug, Default)]
pub struct LogBuffer {
    records: VecDeque<Kept>,
    /// The position of the first byte that the host may still request.
    acknowledged: u64,
    /// The position after the last byte.
    end: u64,
    kept_bytes: usize,
}

/// The host acknowledged more than there is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("host acknowledged {position} bytes, only {sent} were written")]
pub struct BadAcknowledgement {
    position: u64,
    sent: u64,
}

impl LogBuffer {
    /// How many bytes may be appended now.
    pub fn room(&self) -> usize {
        let overhead = (self.records.len() + 1) * RECORD_OVERHEAD_BYTES;
        CAPACITY_BYTES.saturating_sub(self.kept_bytes + overhead)
    }

    pub fn start(&self) -> u64 {
        self.acknowledged
    }

    /// Whether the host has stored everything.
    pub fn is_stored(&self) -> bool {
        self.acknowledged == self.end
    }

    /// Appends bytes of one stream. Call it with at most [`Self::room`] and [`MAX_PAYLOAD_BYTES`] bytes.
    pub fn append(&mut self, source: Source, payload: &[u8]) {
        self.kept_bytes += payload.len();
        match self.records.back_mut() {
            Some(last)
                if last.source == source
                    && last.payload.len() + payload.len() <= MAX_PAYLOAD_BYTES =>
            {
                last.payload.extend_from_slice(payload);
            }
            _ => self.records.push_back(Kept {
                start: self.end,
                source,
                payload: payload.to_vec(),
            }),
        }
        self.end += payload.len() as u64;
    }

    /// Drops what the host has stored. A number lower than the last one changes nothing.
    pub fn acknowledge(&mut self, position: u64) -> Result<(), BadAcknowledgement> {
        if position > self.end {
            return Err(BadAcknowledgement {
                position,
                sent: self.end,
            });
        }
        self.acknowledged = self.acknowledged.max(position);
        while self
            .records
            .front()
            .is_some_and(|first| first.end() <= self.acknowledged)
        {
            let first = self.records.pop_front();
            self.kept_bytes -= first.map_or(0, |record| record.payload.len());
        }
        Ok(())
    }

    /// The record at `position`, or its rest from there. `None` if there is nothing yet.
    pub fn next(&self, position: u64) -> Option<Record> {
        let position = position.max(self.acknowledged);
        let record = self.records.get(
            self.records
                .partition_point(|record| record.end() <= position),
        )?;
        let skip = usize::try_from(position - record.start).ok()?;
        Some(Record {
            source: record.source,
            payload: record.payload.get(skip..)?.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{BadAcknowledgement, CAPACITY_BYTES, LogBuffer, MAX_PAYLOAD_BYTES, Record, Source};

    fn buffer(parts: &[(Source, &str)]) -> LogBuffer {
        let mut buffer = LogBuffer::default();
        for (source, part) in parts {
            buffer.append(*source, part.as_bytes());
        }
        buffer
    }

    fn record(source: Source, text: &str) -> Option<Record> {
        Some(Record {
            source,
            payload: text.as_bytes().to_vec(),
        })
    }

    const OUT: Source = Source::Stdout;
    const ERR: Source = Source::Stderr;

    #[test]
    fn records_are_kept_until_acknowledged() {
        let mut buffer = buffer(&[(OUT, "hello"), (ERR, "world")]);
        assert_eq!(buffer.next(0), record(OUT, "hello"));
        assert_eq!(buffer.next(5), record(ERR, "world"));
        assert_eq!(buffer.next(10), None);
        buffer.acknowledge(5).unwrap();
        assert_eq!(buffer.next(0), record(ERR, "world"));
        buffer.acknowledge(10).unwrap();
        assert_eq!(buffer.next(10), None);
        assert_eq!((buffer.start(), buffer.records.len()), (10, 0));
    }

    #[test]
    fn a_record_may_be_acknowledged_in_part() {
        let mut buffer = buffer(&[(OUT, "hello"), (ERR, "world")]);
        buffer.acknowledge(7).unwrap();
        assert_eq!(buffer.start(), 7);
        assert_eq!(buffer.next(7), record(ERR, "rld"));
        assert_eq!(buffer.next(8), record(ERR, "ld"));
        buffer.acknowledge(3).unwrap();
        assert_eq!(buffer.start(), 7);
    }

    #[test]
    fn what_was_never_written_cannot_be_acknowledged() {
        let mut buffer = buffer(&[(OUT, "hello")]);
        assert_eq!(
            buffer.acknowledge(6),
            Err(BadAcknowledgement {
                position: 6,
                sent: 5
            })
        );
        assert_eq!(buffer.next(0), record(OUT, "hello"));
    }

    #[test]
    fn small_writes_of_one_stream_share_a_record_and_alternating_ones_count_their_cost() {
        let mut buffer = buffer(&[(OUT, "a"), (OUT, "b"), (ERR, "c")]);
        assert_eq!(buffer.next(0), record(OUT, "ab"));
        assert_eq!(buffer.next(1), record(OUT, "b"));
        while buffer.room() > 0 {
            let source = if buffer.records.len().is_multiple_of(2) {
                OUT
            } else {
                ERR
            };
            buffer.append(source, b"x");
        }
        assert!(buffer.records.len() < 20_000);
    }

    #[test]
    fn room_ends_at_the_capacity_and_comes_back_with_acknowledgements() {
        let mut buffer = LogBuffer::default();
        while buffer.room() > 0 {
            buffer.append(ERR, &vec![0; buffer.room().min(MAX_PAYLOAD_BYTES)]);
        }
        assert!(buffer.end <= CAPACITY_BYTES as u64 && buffer.end > CAPACITY_BYTES as u64 * 9 / 10);
        buffer.acknowledge(MAX_PAYLOAD_BYTES as u64).unwrap();
        assert!(buffer.room() >= MAX_PAYLOAD_BYTES);
    }
}
