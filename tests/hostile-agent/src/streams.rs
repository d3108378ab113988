// SPDX-License-Identifier: Apache-2.0
//! Byte streams: logs, execs, attachments and forwarded ports. The first word of a command, or the port, says how each
//! behaves; all others are silent for ever.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent::{OpenStream, StreamOpened, log_record, open_stream::Kind, record};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::sleep;
use tokio_vsock::{VsockListener, VsockStream};

use crate::lock;
use crate::orders::Orders;

const HEADER_BYTES: usize = 1 << 20;
const DRIP: Duration = Duration::from_millis(100);

/// Takes connections of the daemon to the port of streams.
pub async fn serve(listener: VsockListener, orders: Arc<Orders>) {
    loop {
        while *lock(&orders.deaf) {
            sleep(DRIP).await;
        }
        let Ok((stream, _)) = listener.accept().await else {
            sleep(DRIP).await;
            continue;
        };
        let orders = Arc::clone(&orders);
        tokio::spawn(async move {
            // The daemon closes most of them.
            let _ = behave(stream, &orders).await;
        });
    }
}

pub async fn write_message(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &impl Message,
) -> io::Result<()> {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes()[..], &body].concat())
        .await
}

async fn behave(mut stream: VsockStream, orders: &Orders) -> io::Result<()> {
    let length = usize::try_from(stream.read_u32().await?).unwrap_or(usize::MAX);
    let mut body = vec![0; length.min(HEADER_BYTES)];
    stream.read_exact(&mut body).await?;
    let open = OpenStream::decode(body.as_slice()).map_err(io::Error::other)?;
    let word = |args: &[String]| args.first().cloned().unwrap_or_default();
    let of = |id: &str| {
        let container = orders.containers.get(id);
        container.map(|one| word(&one.args)).unwrap_or_default()
    };
    match open.kind {
        Some(Kind::Log(log)) => {
            let kind = of(&log.container_id);
            answer(&mut stream, &kind).await?;
            write_log(&mut stream, &kind).await?;
        }
        Some(Kind::Exec(exec)) => {
            let kind = word(&exec.args);
            answer(&mut stream, &kind).await?;
            write_output(&mut stream, &kind).await?;
        }
        Some(Kind::Attach(attach)) => {
            let kind = of(&attach.container_id);
            answer(&mut stream, &kind).await?;
            write_output(&mut stream, &kind).await?;
        }
        Some(Kind::PortForward(forward)) => {
            answer(&mut stream, "").await?;
            forwarded(&mut stream, forward.port).await?;
        }
        _ => answer(&mut stream, "refuse").await?,
    }
    std::future::pending().await
}

/// Answers the request for a stream.
async fn answer(stream: &mut VsockStream, kind: &str) -> io::Result<()> {
    match kind {
        // More than four gibibytes, says the length.
        "claim" => stream.write_all(&[0xff; 4]).await,
        "silent" => std::future::pending().await,
        "refuse" => {
            let error = "\x1b[2J".repeat(15_000);
            let refusal = StreamOpened {
                error,
                log_offset: 0,
            };
            write_message(stream, &refusal).await
        }
        "drip-answer" => {
            stream.write_all(&[0, 0, 0x10, 0]).await?;
            loop {
                stream.write_all(&[0]).await?;
                sleep(DRIP).await;
            }
        }
        _ => {
            let log_offset = if kind == "offset" { u64::MAX } else { 0 };
            let opened = StreamOpened {
                error: String::new(),
                log_offset,
            };
            write_message(stream, &opened).await
        }
    }
}

fn encode(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    [&[kind][..], &length.to_be_bytes(), payload].concat()
}

/// Repeats `bytes` until the daemon closes the stream. Nothing is read.
async fn repeat(stream: &mut VsockStream, bytes: &[u8]) -> io::Result<()> {
    loop {
        stream.write_all(bytes).await?;
    }
}

/// Writes on a connection on which nothing is expected, until it is closed.
pub async fn flood(mut stream: VsockStream) {
    let _ = repeat(&mut stream, &[b'x'; 64 << 10]).await;
}

async fn write_log(stream: &mut VsockStream, kind: &str) -> io::Result<()> {
    let most = log_record::MAX_PAYLOAD_BYTES;
    let lines = b"a line of some length, as a program may print it again and again\n";
    match kind {
        "flood" => {
            let text: Vec<u8> = lines.iter().copied().cycle().take(most).collect();
            repeat(stream, &encode(log_record::STDOUT, &text)).await
        }
        "line" => repeat(stream, &encode(log_record::STDOUT, &vec![b'x'; most])).await,
        "feeds" => repeat(stream, &encode(log_record::STDERR, &vec![b'\n'; most])).await,
        "bytes" => repeat(stream, &encode(log_record::STDOUT, b"x").repeat(1000)).await,
        "empty" => repeat(stream, &encode(log_record::STDOUT, b"").repeat(1000)).await,
        "offset" => repeat(stream, &encode(log_record::STDOUT, lines)).await,
        "long" => {
            stream
                .write_all(&[log_record::STDOUT, 0xff, 0xff, 0xff, 0xff])
                .await
        }
        "kinds" => repeat(stream, &encode(9, b"what is this")).await,
        "reset" => {
            // In the middle of a record.
            stream
                .write_all(&[log_record::STDOUT, 0, 0, 0x40, 0, b'x'])
                .await?;
            VsockStream::shutdown(stream, Shutdown::Both)
        }
        "drip" => {
            stream
                .write_all(&[log_record::STDOUT, 0, 0, 0x40, 0])
                .await?;
            loop {
                stream.write_all(b"x").await?;
                sleep(DRIP).await;
            }
        }
        _ => Ok(()),
    }
}

async fn write_output(stream: &mut VsockStream, kind: &str) -> io::Result<()> {
    let most = record::MAX_PAYLOAD_BYTES;
    match kind {
        "flood" => repeat(stream, &encode(record::STDOUT, &vec![b'x'; most])).await,
        "bytes" => repeat(stream, &encode(record::STDERR, b"x").repeat(1000)).await,
        "empty" => repeat(stream, &encode(record::STDOUT, b"").repeat(1000)).await,
        "input" => repeat(stream, &encode(record::INPUT, &[0xff; 8]).repeat(1000)).await,
        "long" => {
            stream
                .write_all(&[record::END, 0xff, 0xff, 0xff, 0xff])
                .await
        }
        "kinds" => repeat(stream, &encode(9, b"what is this")).await,
        "end" => stream.write_all(&encode(record::END, &[0xff; 100])).await,
        "half" => VsockStream::shutdown(stream, Shutdown::Write),
        "drip" => {
            stream.write_all(&[record::STDOUT, 0, 0, 0x40, 0]).await?;
            loop {
                stream.write_all(b"x").await?;
                sleep(DRIP).await;
            }
        }
        _ => Ok(()),
    }
}

async fn forwarded(stream: &mut VsockStream, port: u32) -> io::Result<()> {
    match port {
        1 => repeat(stream, &[b'x'; 64 << 10]).await,
        2 => VsockStream::shutdown(stream, Shutdown::Write),
        3 => VsockStream::shutdown(stream, Shutdown::Both),
        _ => Ok(()),
    }
}
