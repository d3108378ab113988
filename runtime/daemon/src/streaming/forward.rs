// SPDX-License-Identifier: Apache-2.0
//! Port-forward: connections to a pod's loopback by pairs of SPDY streams (`portforward.k8s.io`), over a
//! connection of its own or in a WebSocket.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bulkhead_text::chain;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::spdy::{Connection, Gone, Stream, StreamReader, StreamWriter};
use crate::pod::Pods;

pub const PROTOCOL: &str = "portforward.k8s.io";
/// Read from a connection into the guest at once.
pub const READ_BYTES: usize = 64 << 10;

/// How long the second stream of a pair may take, as other runtimes have it.
const PAIR_TIME: Duration = Duration::from_secs(30);
/// How long a client may go on when the server has ended; socat and other runtimes have the same.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Connections of one client at once, with half-made ones.
const MAX_CONNECTIONS: usize = 128;

/// Until the client has left. What is wrong with one connection is said on its error stream.
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
            // A second one of the same kind: the first is given up.
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
    /// What pairs streams.
    request: String,
    port: u16,
    reader: StreamReader,
    writer: StreamWriter,
    since: Instant,
}

impl Half {
    /// `None`: it was refused, because it makes no sense or, if it would be a new pair, `is_full`.
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
        // Clients that do not say open the error stream right before the data stream.
        None => match kind {
            Kind::Error => format!("stream {}", stream.id),
            Kind::Data => format!("stream {}", stream.id.checked_sub(2)?),
        },
    };
    Some((kind, request, port))
}

/// One connection, to its end.
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
                    // What the client still says is wanted by few servers, and some clients never end.
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
        // Who has left does not read it.
        let _ = writer.send(text.into()).await;
    }
    let _ = writer.finish().await;
}

/// The client's half. A client that resets it or leaves is one that sends no more.
async fn to_pod(mut client: StreamReader, mut server: OwnedWriteHalf) {
    while let Ok(Some(bytes)) = client.next().await {
        if server.write_all(&bytes).await.is_err() {
            // The server takes no more; what the client still sends is thrown away.
            return;
        }
    }
    // Fails if the server is gone, which the other half finds out.
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
    // The client has left meanwhile: nobody is told.
    let _ = client.finish().await;
    Ok(())
}

/// What is there, `None` at the end.
pub async fn read(server: &mut OwnedReadHalf) -> std::io::Result<Option<Bytes>> {
    let mut buffer = BytesMut::with_capacity(READ_BYTES);
    let length = server.read_buf(&mut buffer).await?;
    Ok((length > 0).then(|| buffer.freeze()))
}
