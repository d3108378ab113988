// SPDX-License-Identifier: Apache-2.0
//! Port-forward over WebSocket. There are two protocols: a tunnel, which carries an SPDY connection in binary messages,
//! and the older protocol with two channels for each port.
//!
//! The older protocol has several names (`v4.channel.k8s.io`, `channel.k8s.io`, their base64 variants, or none), which
//! differ only in base64. Its ports are in the CRI request.

use std::sync::Arc;

use bulkhead_guest::streams::shrunk;
use bulkhead_text::chain;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use super::forward::{self, READ_BYTES};
use super::peer::Peer;
use super::spdy::{Connection, GOODBYE_TIME};
use super::websocket::{Protocol, Receiver, Sender, Socket, close, next};
use crate::pod::Pods;

/// The name of the tunnel's protocol.
pub const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// The size of the buffer between WebSocket and SPDY, in each direction.
const PIPE_BYTES: usize = 64 << 10;
/// How many messages may wait for the client, from all ports together.
const QUEUED_MESSAGES: usize = 4;

/// Serves a tunnel until the client has left.
pub async fn tunnel<T>(socket: Socket<T>, pods: Pods, pod: String, peer: Arc<Peer>)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (spdy, ours) = tokio::io::duplex(PIPE_BYTES);
    let (reader, writer) = tokio::io::split(spdy);
    let connection = Connection::new(reader, writer, Arc::clone(&peer));
    let serving = forward::serve(connection, pods, pod);
    let (mut sender, receiver) = socket.split();
    let (mut from_spdy, to_spdy) = tokio::io::split(ours);
    let served = async {
        let mut wrapping = std::pin::pin!(wrap(&mut from_spdy, &mut sender));
        tokio::select! {
            // SPDY's last frame, which tells a client that it broke the protocol, must still be sent.
            () = serving => drop(timeout(GOODBYE_TIME, wrapping).await),
            () = &mut wrapping => {}
        }
    };
    let wrong = tokio::select! {
        () = served => None,
        wrong = unwrap(receiver, to_spdy, &peer) => wrong.err(),
    };
    close(&mut sender, None, wrong).await;
}

/// Passes the content of messages on to SPDY until the client has left.
async fn unwrap<T: AsyncRead + AsyncWrite + Unpin>(
    mut receiver: Receiver<T>,
    mut spdy: impl AsyncWrite + Unpin,
    peer: &Peer,
) -> Result<(), String> {
    while let Some(bytes) = next(&mut receiver).await? {
        tokio::select! {
            biased;
            written = spdy.write_all(&bytes) => if written.is_err() { break },
            () = peer.left() => break,
        }
    }
    Ok(())
}

async fn wrap<T: AsyncRead + AsyncWrite + Unpin>(
    spdy: &mut (impl AsyncRead + Unpin),
    sender: &mut Sender<T>,
) {
    loop {
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        match spdy.read_buf(&mut buffer).await {
            Ok(length) if length > 0 => {}
            _ => return,
        }
        let message = Message::Binary(shrunk(buffer));
        if sender.send(message).await.is_err() {
            return;
        }
    }
}

/// Serves the older protocol. Each port has one connection, which is made at the start. Port number n in the list has
/// channel 2n for data and channel 2n+1 for errors. Both begin with the port as two bytes, little-endian.
pub async fn channels<T>(
    socket: Socket<T>,
    protocol: Protocol,
    pods: Pods,
    pod: String,
    ports: Vec<u16>,
) where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, receiver) = socket.split();
    let (messages, mut queue) = mpsc::channel(QUEUED_MESSAGES);
    let mut connections = JoinSet::new();
    let mut inputs = Vec::new();
    for (number, port) in (0u8..).zip(ports) {
        let lines = Lines {
            protocol,
            data: number.saturating_mul(2),
            messages: messages.clone(),
        };
        let (says, input) = mpsc::channel(1);
        inputs.push(says);
        connections.spawn(connection(lines, pods.clone(), pod.clone(), port, input));
    }
    drop(messages);
    let sending = async {
        while let Some(message) = queue.recv().await {
            if sender.send(message).await.is_err() {
                return;
            }
        }
    };
    let wrong = tokio::select! {
        wrong = receive(receiver, protocol, &inputs) => wrong.err(),
        // All connections have ended.
        () = sending => None,
    };
    close(&mut sender, None, wrong).await;
}

async fn receive<T: AsyncRead + AsyncWrite + Unpin>(
    mut receiver: Receiver<T>,
    protocol: Protocol,
    inputs: &[mpsc::Sender<Bytes>],
) -> Result<(), String> {
    while let Some(bytes) = next(&mut receiver).await? {
        let Some((channel, bytes)) = protocol.decode(bytes)? else {
            continue;
        };
        let input = inputs.get(usize::from(channel / 2));
        let last = inputs.len().saturating_mul(2).saturating_sub(1);
        let input = input.ok_or_else(|| format!("channel {channel} is not one of 0 to {last}"))?;
        if channel % 2 == 0 && bytes.has_remaining() {
            // An error means that this connection has ended, so its data is discarded.
            let _ = input.send(bytes).await;
        }
    }
    Ok(())
}

/// The two channels of a connection.
struct Lines {
    protocol: Protocol,
    data: u8,
    messages: mpsc::Sender<Message>,
}

impl Lines {
    async fn data(&self, bytes: &[u8]) -> bool {
        self.send(self.data, bytes).await
    }

    async fn error(&self, bytes: &[u8]) -> bool {
        self.send(self.data.saturating_add(1), bytes).await
    }

    async fn send(&self, channel: u8, bytes: &[u8]) -> bool {
        let message = self.protocol.encode(channel, bytes);
        self.messages.send(message).await.is_ok()
    }
}

/// Serves one port: connects to it, and copies in both directions until the server or the client ends.
async fn connection(
    lines: Lines,
    pods: Pods,
    pod: String,
    port: u16,
    mut input: mpsc::Receiver<Bytes>,
) {
    let name = port.to_le_bytes();
    if !lines.data(&name).await || !lines.error(&name).await {
        return;
    }
    let server = match pods.port_forward(&pod, port).await {
        Ok(server) => server,
        Err(why) => {
            let text = format!("error forwarding port {port} to pod {pod}: {}", chain(&why));
            lines.error(text.as_bytes()).await;
            return;
        }
    };
    let (mut from_server, to_server) = server.into_split();
    let answers = async {
        while let Ok(Some(bytes)) = forward::read(&mut from_server).await {
            if !lines.data(&bytes).await {
                return;
            }
        }
    };
    tokio::select! {
        () = answers => {}
        () = feed(&mut input, to_server) => {}
    }
}

/// Copies from the client to the server. It does not end before the client leaves, because this protocol has no
/// half-close.
async fn feed(input: &mut mpsc::Receiver<Bytes>, mut server: OwnedWriteHalf) {
    while let Some(bytes) = input.recv().await {
        if server.write_all(&bytes).await.is_err() {
            // Keep the connection open, because the server may still send.
            std::future::pending::<()>().await;
        }
    }
}
