// SPDX-License-Identifier: Apache-2.0
//! Port-forward over SPDY (`portforward.k8s.io`), directly or inside a WebSocket. Each forwarded connection to the
//! pod's loopback interface is a pair of SPDY streams, one for data and one for errors.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use bulkhead_guest::streams::shrunk;
use bulkhead_text::chain;
use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::spdy::{Connection, Gone, Stream, StreamReader, StreamWriter};
use crate::pod::Pods;

pub const PROTOCOL: &str = "portforward.k8s.io";
/// How much is read at a time from a connection into the guest.
pub const READ_BYTES: usize = 64 << 10;

/// How long the second stream of a pair may take to be opened. Other runtimes use the same time.
const PAIR_TIME: Duration = Duration::from_secs(30);
/// How long a client may still send after the server has closed its side. socat and other runtimes use the same time.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// The most connections of one client at a time, including those whose second stream is missing.
const MAX_CONNECTIONS: usize = 128;

/// Serves a client until it has left. If one forwarded connection fails, its error stream tells why.
pub async fn serve(mut connection: Connection, pods: Pods, pod: String) {
    let mut waiting: HashMap<String, Half> = HashMap::new();
    let mut connections = JoinSet::new();
    let mut clean = tokio::time::interval(PAIR_TIME);
    loop {
        let stream = tokio::select! {
            stream = connection.next() => stream,
            Some(_ended) = connections.join_next() => continue,
            _ = clean.tick() => {
                waiting.retain(|_, half| half.since.elapsed() < PAIR_TIME);
                continue;
            }
        };
        let Some(stream) = stream else { return };
        let is_full = waiting.len().saturating_add(connections.len()) >= MAX_CONNECTIONS;
        let Some(half) = Half::of(stream, is_full).await else {
            continue;
        };
        match waiting.remove(&half.request) {
            Some(other) if other.kind != half.kind => {
                let (data, error) = match half.kind {
                    Kind::Data => (half, other),
                    Kind::Error => (other, half),
                };
                connections.spawn(forward(pods.clone(), pod.clone(), data, error));
            }
            // The first stream of a pair, or another one of the same kind, which replaces the earlier one.
            Some(_) | None => drop(waiting.insert(half.request.clone(), half)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Error,
}

/// A stream that waits for its partner.
#[derive(Debug)]
struct Half {
    kind: Kind,
    /// The id that both streams of a pair have.
    request: String,
    port: u16,
    reader: StreamReader,
    writer: StreamWriter,
    since: Instant,
}

impl Half {
    /// Accepts a stream. `None` if it was refused, because its headers are not valid or because `is_full`.
    async fn of(stream: Stream, is_full: bool) -> Option<Self> {
        let Some((kind, request, port)) = describe(&stream).filter(|_| !is_full) else {
            stream.refuse().await;
            return None;
        };
        let (reader, writer) = stream.accept().await.ok()?;
        Some(Self {
            kind,
            request,
            port,
            reader,
            writer,
            since: Instant::now(),
        })
    }
}

fn describe(stream: &Stream) -> Option<(Kind, String, u16)> {
    let kind = match stream.headers.get("streamtype")?.as_str() {
        "data" => Kind::Data,
        "error" => Kind::Error,
        _ => return None,
    };
    let port = stream.headers.get("port")?.parse().ok();
    let port = port.filter(|port| *port > 0)?;
    let request = match stream.headers.get("requestid") {
        Some(request) => request.clone(),
        // Clients that send no request id open the error stream directly before the data stream.
        None => match kind {
            Kind::Error => format!("stream {}", stream.id),
            Kind::Data => format!("stream {}", stream.id.checked_sub(2)?),
        },
    };
    Some((kind, request, port))
}

/// Serves one forwarded connection until it ends.
async fn forward(pods: Pods, pod: String, data: Half, error: Half) {
    let port = data.port;
    let failure = match pods.port_forward(&pod, port).await {
        Ok(server) => {
            let (from_server, to_server) = server.into_split();
            let sending = to_pod(data.reader, to_server);
            let receiving = to_client(from_server, data.writer);
            tokio::pin!(sending, receiving);
            let received = tokio::select! {
                received = &mut receiving => {
                    // Few servers still read after they have closed their side, and some clients never close theirs.
                    let _ = timeout(LAST_WORDS, sending).await;
                    received
                }
                () = &mut sending => receiving.await,
            };
            received.err()
        }
        Err(why) => Some(chain(&why)),
    };
    let mut writer = error.writer;
    if let Some(why) = failure {
        let text = format!("error forwarding port {port} to pod {pod}: {why}");
        // An error means that the client has left, and nobody is there to read the text.
        let _ = writer.send(text.into()).await;
    }
    let _ = writer.finish().await;
}

/// Copies from the client to the pod. If the client resets the stream or leaves, that counts as the end of its data.
async fn to_pod(mut client: StreamReader, mut server: OwnedWriteHalf) {
    while let Ok(Some(bytes)) = client.next().await {
        if server.write_all(&bytes).await.is_err() {
            // The server accepts no more data. What the client still sends is discarded.
            return;
        }
    }
    // This fails if the server is gone. The other direction notices that.
    let _ = server.shutdown().await;
}

async fn to_client(mut server: OwnedReadHalf, mut client: StreamWriter) -> Result<(), String> {
    loop {
        match read(&mut server).await {
            Ok(None) => break,
            Ok(Some(bytes)) => {
                if let Err(Gone) = client.send(bytes).await {
                    return Ok(());
                }
            }
            Err(e) => return Err(e.to_string()),
        }
    }
    // An error means that the client has left, so nobody needs to be told.
    let _ = client.finish().await;
    Ok(())
}

/// Reads the bytes that are there, at least one. `None` at the end.
pub async fn read(server: &mut OwnedReadHalf) -> io::Result<Option<Bytes>> {
    loop {
        // A connection that is silent needs no buffer.
        server.readable().await?;
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        match server.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(shrunk(buffer))),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}
