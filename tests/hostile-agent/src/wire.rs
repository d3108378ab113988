// SPDX-License-Identifier: Apache-2.0
//! What no honest server sends on the control port: HTTP/2 (RFC 9113) and gRPC by hand.
//!
//! Every call gets the same answer, whatever it asks.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::sleep;
use tokio_vsock::{OwnedReadHalf, OwnedWriteHalf, VsockStream};

const PREFACE_BYTES: usize = 24;
const DRIP: Duration = Duration::from_secs(1);
/// The first window of a stream and of a connection, if nobody says another one.
const WINDOW_BYTES: usize = 65_535;

// Types of frames, and flags.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// `:status: 200` and `content-type: application/grpc`, in HPACK (RFC 7541) without a table.
const GOOD_HEADERS: &[u8] = b"\x88\x0f\x10\x10application/grpc";
/// `CaughtUp` as the daemon reads it from a stream of news, and of which other answers make nothing.
const MARK: &[u8] = b"\0\0\0\0\x02\x10\x01";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// A byte of an answer each second.
    Drip,
    /// An answer of four gibibytes, says its length.
    Claim,
    /// Less than its length says.
    Truncated,
    Garbled,
    /// An answer of empty entries, two bytes each: statistics of two million containers.
    Crowd,
    /// News as fast as they are taken, then frames of one byte.
    Grains,
    Pings,
    Settings,
    Continuations,
    /// A header of 16 MiB.
    Header,
    Resets,
    Farewells,
    Noise,
    Silence,
    /// Connections are closed as soon as they are there.
    Closed,
}

impl Wire {
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "drip" => Self::Drip,
            "claim" => Self::Claim,
            "truncated" => Self::Truncated,
            "garbled" => Self::Garbled,
            "crowd" => Self::Crowd,
            "grains" => Self::Grains,
            "pings" => Self::Pings,
            "settings" => Self::Settings,
            "continuations" => Self::Continuations,
            "header" => Self::Header,
            "resets" => Self::Resets,
            "farewells" => Self::Farewells,
            "noise" => Self::Noise,
            "silence" => Self::Silence,
            "closed" => Self::Closed,
            _ => return None,
        })
    }
}

/// Serves a connection until the daemon closes it, or for as long as that was ordered.
pub async fn speak(stream: VsockStream, wire: Wire, until: Instant) {
    let end = rustix::io::dup(&stream).map(VsockStream::from);
    // An error means that the daemon has closed it.
    let _ = tokio::time::timeout_at(until.into(), serve(stream, wire)).await;
    if let Ok(end) = end {
        let _ = end.shutdown(Shutdown::Both);
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let head = [length[1], length[2], length[3], kind, flags];
    [&head[..], &stream.to_be_bytes(), payload].concat()
}

/// The writing half and the credit of a connection.
#[derive(Clone)]
struct Out {
    writer: Arc<Mutex<OwnedWriteHalf>>,
    credit: Arc<Semaphore>,
}

impl Out {
    async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.writer.lock().await.write_all(bytes).await
    }

    /// Sends data as far as there is credit for it.
    async fn data(&self, stream: u32, credit: &Semaphore, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(16 << 10) {
            let needed = u32::try_from(part.len()).unwrap_or(0);
            for credit in [credit, &self.credit] {
                let taken = credit.acquire_many(needed).await;
                taken.map_err(io::Error::other)?.forget();
            }
            self.send(&frame(DATA, 0, stream, part)).await?;
        }
        Ok(())
    }
}

async fn serve(mut stream: VsockStream, wire: Wire) -> io::Result<()> {
    match wire {
        Wire::Closed => return Ok(()),
        Wire::Noise => {
            let noise: Vec<u8> = (0..=u8::MAX).cycle().take(1 << 20).collect();
            return stream.write_all(&noise).await;
        }
        Wire::Silence => std::future::pending().await,
        _ => {}
    }
    let mut preface = [0; PREFACE_BYTES];
    stream.read_exact(&mut preface).await?;
    let (reader, writer) = stream.into_split();
    let out = Out {
        writer: Arc::new(Mutex::new(writer)),
        credit: Arc::new(Semaphore::new(WINDOW_BYTES)),
    };
    out.send(&frame(SETTINGS, 0, 0, &[])).await?;
    let flood = match wire {
        Wire::Pings => frame(PING, 0, 0, &[7; 8]).repeat(1000),
        Wire::Settings => frame(SETTINGS, 0, 0, &[]).repeat(1000),
        _ => Vec::new(),
    };
    if !flood.is_empty() {
        let out = out.clone();
        tokio::spawn(async move { while out.send(&flood).await.is_ok() {} });
    }
    listen(reader, out, wire).await
}

/// Reads frames of the daemon and answers its calls.
async fn listen(mut reader: OwnedReadHalf, out: Out, wire: Wire) -> io::Result<()> {
    let mut streams = std::collections::HashMap::<u32, Arc<Semaphore>>::new();
    let mut first_window = WINDOW_BYTES;
    loop {
        let mut head = [0; 9];
        reader.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, d, e, f, g] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        reader.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([d, e, f, g]);
        match kind {
            SETTINGS if flags & ACK == 0 => {
                for setting in payload.chunks_exact(6) {
                    if setting[1] == 4 {
                        let window = [setting[2], setting[3], setting[4], setting[5]];
                        first_window = u32::from_be_bytes(window) as usize;
                    }
                }
                out.send(&frame(SETTINGS, ACK, 0, &[])).await?;
            }
            PING if flags & ACK == 0 => out.send(&frame(PING, ACK, 0, &payload)).await?,
            WINDOW_UPDATE if payload.len() == 4 => {
                let more = u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]);
                let credit = match stream {
                    0 => Some(&out.credit),
                    stream => streams.get(&stream),
                };
                if let Some(credit) = credit {
                    credit.add_permits(more as usize);
                }
            }
            HEADERS => {
                let credit = Arc::new(Semaphore::new(first_window));
                streams.insert(stream, Arc::clone(&credit));
                let out = out.clone();
                tokio::spawn(async move { answer(out, stream, &credit, wire).await.ok() });
            }
            _ => {}
        }
    }
}

async fn answer(out: Out, stream: u32, credit: &Semaphore, wire: Wire) -> io::Result<()> {
    match wire {
        Wire::Resets => return out.send(&frame(RST_STREAM, 0, stream, &[0, 0, 0, 7])).await,
        Wire::Farewells => {
            let last = [stream.to_be_bytes(), [0; 4]].concat();
            return out.send(&frame(GOAWAY, 0, 0, &last)).await;
        }
        Wire::Continuations => {
            out.send(&frame(HEADERS, 0, stream, GOOD_HEADERS)).await?;
            loop {
                out.send(&frame(CONTINUATION, 0, stream, &[]).repeat(1000))
                    .await?;
            }
        }
        Wire::Header => {
            // A literal without a table: the name `x`, and a value as long as can be.
            let mut block = b"\x88\0\x01x\x7f\x81\xff\xff\x07".to_vec();
            block.resize(16 << 20, b'v');
            out.send(&frame(HEADERS, 0, stream, &block[..16 << 10]))
                .await?;
            for part in block[16 << 10..].chunks(16 << 10) {
                out.send(&frame(CONTINUATION, 0, stream, part)).await?;
            }
            return Ok(());
        }
        _ => {
            out.send(&frame(HEADERS, END_HEADERS, stream, GOOD_HEADERS))
                .await?
        }
    }
    match wire {
        Wire::Drip => {
            out.data(stream, credit, &[0, 0, 0, 0x10, 0]).await?;
            loop {
                out.data(stream, credit, &[0]).await?;
                sleep(DRIP).await;
            }
        }
        Wire::Claim => out.data(stream, credit, b"\0\xff\xff\xff\xff").await,
        Wire::Truncated => {
            out.data(stream, credit, b"\0\0\0\x10\0abc").await?;
            out.send(&frame(DATA, END_STREAM, stream, &[])).await
        }
        Wire::Garbled => {
            let garbage = [&b"\0\0\0\x01\0"[..], &[0xff; 256]].concat();
            out.data(stream, credit, &garbage).await?;
            out.send(&frame(DATA, END_STREAM, stream, &[])).await
        }
        Wire::Crowd => {
            let mut crowd = vec![0, 0, 0x40, 0, 0];
            crowd.extend(b"\x12\0".repeat(2 << 20));
            out.data(stream, credit, &crowd).await
        }
        Wire::Grains => {
            for _ in 0..2000 {
                out.data(stream, credit, MARK).await?;
            }
            loop {
                for byte in MARK {
                    out.data(stream, credit, &[*byte]).await?;
                }
            }
        }
        _ => Ok(()),
    }
}
