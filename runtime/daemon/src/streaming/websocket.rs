// SPDX-License-Identifier: Apache-2.0
//! Exec and attach over WebSocket: `v5.channel.k8s.io`, `v4.channel.k8s.io`, the first version `channel.k8s.io`, and
//! the base64 variants of the older two. Also functions that port-forward over WebSocket uses.
//!
//! Each message begins with the number of its channel. In v5, the message `[255, channel]` closes the client's half of
//! a channel; in older versions a client can do that only by leaving. The first version ends with a plain text instead
//! of a JSON status, and with nothing after a success.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_util::sync::CancellationToken;

use super::peer::Peer;
use super::session::{Client, FromClient, Left, Output, Size, SizeParser, Source};
use super::status::Ended;

/// This is large because some clients send a whole file in one message.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
const BUFFER_BYTES: usize = 32 << 10;
const QUEUED_INPUTS: usize = 2;
/// How long the last messages may take to be sent, and then how long the client may take to close the connection.
const FLUSH_TIME: Duration = Duration::from_secs(30);
const LINGER_TIME: Duration = Duration::from_secs(3);
/// The longest reason that fits into a close frame.
const REASON_BYTES: usize = 123;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// In v5: closes the channel whose number follows.
const CLOSE: u8 = 255;

/// A WebSocket over any connection.
pub type Socket<T> = WebSocketStream<T>;
pub type Receiver<T> = SplitStream<Socket<T>>;
pub type Sender<T> = SplitSink<Socket<T>, Message>;

/// The protocols for exec and attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    V5,
    V4,
    V4Base64,
    /// Also used if the client names no protocol.
    V1,
    V1Base64,
}

impl Protocol {
    /// All protocols, the best first.
    pub const ALL: [(&'static str, Self); 5] = [
        ("v5.channel.k8s.io", Self::V5),
        ("v4.channel.k8s.io", Self::V4),
        ("v4.base64.channel.k8s.io", Self::V4Base64),
        ("channel.k8s.io", Self::V1),
        ("base64.channel.k8s.io", Self::V1Base64),
    ];

    /// Splits a message into channel and payload. `None` for an empty message.
    pub fn decode(self, mut message: Bytes) -> Result<Option<(u8, Bytes)>, String> {
        let Some(&first) = message.first() else {
            // Some clients send empty messages to keep the connection alive.
            return Ok(None);
        };
        let payload = message.split_off(1);
        match self {
            Self::V5 | Self::V4 | Self::V1 => Ok(Some((first, payload))),
            Self::V4Base64 | Self::V1Base64 => {
                let decoded = STANDARD.decode(&payload);
                let decoded = decoded.map_err(|e| format!("a message is not base64: {e}"))?;
                Ok(Some((first.wrapping_sub(b'0'), decoded.into())))
            }
        }
    }

    pub fn encode(self, channel: u8, payload: &[u8]) -> Message {
        match self {
            Self::V5 | Self::V4 | Self::V1 => {
                let mut message = BytesMut::with_capacity(payload.len().saturating_add(1));
                message.put_u8(channel);
                message.put_slice(payload);
                Message::Binary(message.freeze())
            }
            Self::V4Base64 | Self::V1Base64 => {
                let mut text = char::from(b'0'.saturating_add(channel)).to_string();
                STANDARD.encode_string(payload, &mut text);
                Message::Text(text.into())
            }
        }
    }

    /// The message on the error channel that tells how the process ended.
    fn last_word(self, ended: &Ended) -> Option<Message> {
        let text = match self {
            Self::V5 | Self::V4 | Self::V4Base64 => Some(ended.status()),
            Self::V1 | Self::V1Base64 => ended.text(),
        };
        text.map(|text| self.encode(ERROR, text.as_bytes()))
    }
}

/// Makes the server's side of a WebSocket from an upgraded connection.
pub async fn accept<T: AsyncRead + AsyncWrite + Unpin>(connection: T) -> Socket<T> {
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER_BYTES)
        .write_buffer_size(BUFFER_BYTES)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    WebSocketStream::from_raw_socket(connection, Role::Server, Some(config)).await
}

/// The bytes of the next message. Text messages are accepted too, because some clients send them. `None` when the
/// client has left. The error is a text that says how the client broke the protocol.
pub async fn next<T: AsyncRead + AsyncWrite + Unpin>(
    receiver: &mut Receiver<T>,
) -> Result<Option<Bytes>, String> {
    while let Some(message) = receiver.next().await {
        match message {
            Ok(Message::Binary(bytes)) => return Ok(Some(bytes)),
            Ok(Message::Text(text)) => return Ok(Some(text.into())),
            Ok(Message::Close(_)) => return Ok(None),
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            // An end of the connection without a close frame also means that the client has left.
            Err(e) => return complaint(e).map(|()| None),
        }
    }
    Ok(None)
}

/// The server's half of a client's connection.
#[derive(Debug)]
pub struct WebSocketOutput<T> {
    protocol: Protocol,
    sender: Sender<T>,
    listening: tokio::task::JoinHandle<()>,
    complaint: Complaint,
}

/// How the client broke the protocol. It is the reason in the server's close frame.
type Complaint = Arc<Mutex<Option<String>>>;

/// Makes a [`Client`] of a connection.
pub async fn client<T>(
    socket: Socket<T>,
    protocol: Protocol,
    peer: Arc<Peer>,
) -> Client<WebSocketOutput<T>>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, receiver) = socket.split();
    let (says, input) = mpsc::channel(QUEUED_INPUTS);
    let (resizes, sizes) = watch::channel(Size::default());
    let left = CancellationToken::new();
    let complaint = Complaint::default();
    // Clients in browsers show a terminal only after this message. An error is ignored: that the client has left is
    // noticed soon.
    let _ = sender.send(protocol.encode(STDOUT, &[])).await;
    let listener = Listener {
        protocol,
        receiver,
        says,
        resizes,
        parser: SizeParser::default(),
        peer,
    };
    let (told, done) = (Arc::clone(&complaint), left.clone());
    let listening = tokio::spawn(async move {
        if let Err(wrong) = listener.run().await {
            tracing::info!("closing the connection of a streaming client: {wrong}");
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(wrong);
        }
        done.cancel();
    });
    Client {
        input,
        sizes,
        output: WebSocketOutput {
            protocol,
            sender,
            listening,
            complaint,
        },
        left,
    }
}

struct Listener<T> {
    protocol: Protocol,
    receiver: Receiver<T>,
    says: mpsc::Sender<FromClient>,
    resizes: watch::Sender<Size>,
    parser: SizeParser,
    peer: Arc<Peer>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Listener<T> {
    /// Receives messages until the client has left. The error says how it broke the protocol.
    async fn run(mut self) -> Result<(), String> {
        while let Some(bytes) = next(&mut self.receiver).await? {
            if let Some((channel, payload)) = self.protocol.decode(bytes)?
                && !self.take(channel, payload).await?
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Handles one message. Returns false when the client has left.
    async fn take(&mut self, channel: u8, payload: Bytes) -> Result<bool, String> {
        let said = match channel {
            STDIN if payload.is_empty() => return Ok(true),
            STDIN => FromClient::Input(payload),
            RESIZE => {
                if let Some(size) = self.parser.push(&payload) {
                    self.resizes.send_replace(size);
                }
                return Ok(true);
            }
            CLOSE if self.protocol == Protocol::V5 => match payload.first() {
                Some(&STDIN) => FromClient::EndOfInput,
                Some(&(STDOUT..=RESIZE)) => return Ok(true),
                Some(other) => return Err(out_of_range(*other)),
                None => return Err("a close message without a channel".to_owned()),
            },
            // Only the server writes to these channels. What a client sends there is discarded.
            STDOUT..=ERROR => return Ok(true),
            other => return Err(out_of_range(other)),
        };
        let sending = self.says.send(said);
        tokio::select! {
            biased;
            // Go on reading even if the receiver was dropped, to get the client's close frame.
            _ = sending => Ok(true),
            () = self.peer.left() => Ok(false),
        }
    }
}

fn out_of_range(channel: u8) -> String {
    format!("channel {channel} is not one of {STDIN} to {RESIZE}")
}

/// How the client broke the protocol, if that is the cause of the error.
fn complaint(error: tokio_tungstenite::tungstenite::Error) -> Result<(), String> {
    use tokio_tungstenite::tungstenite::Error;
    use tokio_tungstenite::tungstenite::error::ProtocolError;
    match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Ok(()),
        Error::Protocol(_) | Error::Capacity(_) | Error::Utf8(_) => Err(error.to_string()),
        _ => Ok(()),
    }
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Output for WebSocketOutput<T> {
    async fn write(&mut self, source: Source, bytes: Bytes) -> Result<(), Left> {
        let channel = match source {
            Source::Stdout => STDOUT,
            Source::Stderr => STDERR,
        };
        let message = self.protocol.encode(channel, &bytes);
        self.sender.send(message).await.map_err(|_| Left)
    }

    async fn finish(mut self, ended: Option<Ended>) {
        let wrong = {
            let mut complaint = self
                .complaint
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            complaint.take()
        };
        let last = ended.and_then(|ended| self.protocol.last_word(&ended));
        close(&mut self.sender, last, wrong).await;
        // Wait for the client's close frame, which shows that it has read ours.
        let _ = timeout(LINGER_TIME, &mut self.listening).await;
        self.listening.abort();
    }
}

/// Sends a last message, if there is one, and closes the connection. `wrong` is the reason if the client broke the
/// protocol.
pub async fn close<T: AsyncRead + AsyncWrite + Unpin>(
    sender: &mut Sender<T>,
    last: Option<Message>,
    wrong: Option<String>,
) {
    let (code, mut reason) = match wrong {
        None => (CloseCode::Normal, String::new()),
        Some(wrong) => (CloseCode::Protocol, wrong),
    };
    reason.truncate(reason.floor_char_boundary(REASON_BYTES));
    let frame = CloseFrame {
        code,
        reason: reason.into(),
    };
    let closing = async {
        if let Some(last) = last {
            sender.feed(last).await?;
        }
        sender.send(Message::Close(Some(frame))).await
    };
    // An error means that the client has left.
    let _ = timeout(FLUSH_TIME, closing).await;
}

#[cfg(test)]
#[path = "websocket_tests.rs"]
mod tests;
