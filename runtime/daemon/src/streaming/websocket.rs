// SPDX-License-Identifier: Apache-2.0
//! Exec and attach over WebSocket: `v5.channel.k8s.io`, `v4.channel.k8s.io`, the first `channel.k8s.io`, and the
//! base64 variants of the older two.
//!
//! Every message begins with the number of its channel. With v5, a message `[255, channel]` closes the
//! client's half of a channel; before it only leaving does. The first version's last word is text and no status:
//! nothing after a success. Also what the port-forward protocols share.

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

/// A client may send a whole file in one message, and some do.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
const BUFFER_BYTES: usize = 32 << 10;
const QUEUED_INPUTS: usize = 2;
/// How long the last messages may take, and how long the client may take to close after them.
const FLUSH_TIME: Duration = Duration::from_secs(30);
const LINGER_TIME: Duration = Duration::from_secs(3);
/// The longest reason that a close frame has room for.
const REASON_BYTES: usize = 123;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// With v5: closes the channel that follows.
const CLOSE: u8 = 255;

/// A WebSocket over any connection.
pub type Socket<T> = WebSocketStream<T>;
pub type Receiver<T> = SplitStream<Socket<T>>;
pub type Sender<T> = SplitSink<Socket<T>, Message>;

/// What a client can speak for exec and attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    V5,
    V4,
    V4Base64,
    /// Also what a client speaks that names no protocol.
    V1,
    V1Base64,
}

impl Protocol {
    /// Best first.
    pub const ALL: [(&'static str, Self); 5] = [
        ("v5.channel.k8s.io", Self::V5),
        ("v4.channel.k8s.io", Self::V4),
        ("v4.base64.channel.k8s.io", Self::V4Base64),
        ("channel.k8s.io", Self::V1),
        ("base64.channel.k8s.io", Self::V1Base64),
    ];

    /// The channel of a message and its payload.
    pub fn decode(self, mut message: Bytes) -> Result<Option<(u8, Bytes)>, String> {
        let Some(&first) = message.first() else {
            // Some clients send these to keep a connection alive.
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

    /// How a process ended, on the error channel.
    fn last_word(self, ended: &Ended) -> Option<Message> {
        let text = match self {
            Self::V5 | Self::V4 | Self::V4Base64 => Some(ended.status()),
            Self::V1 | Self::V1Base64 => ended.text(),
        };
        text.map(|text| self.encode(ERROR, text.as_bytes()))
    }
}

/// The server's end of a connection that has been upgraded.
pub async fn accept<T: AsyncRead + AsyncWrite + Unpin>(connection: T) -> Socket<T> {
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER_BYTES)
        .write_buffer_size(BUFFER_BYTES)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    WebSocketStream::from_raw_socket(connection, Role::Server, Some(config)).await
}

/// The bytes of the next message; text counts as bytes, as some clients send that. `None` when the client has left;
/// an error is what it did wrong.
pub async fn next<T: AsyncRead + AsyncWrite + Unpin>(
    receiver: &mut Receiver<T>,
) -> Result<Option<Bytes>, String> {
    while let Some(message) = receiver.next().await {
        match message {
            Ok(Message::Binary(bytes)) => return Ok(Some(bytes)),
            Ok(Message::Text(text)) => return Ok(Some(text.into())),
            Ok(Message::Close(_)) => return Ok(None),
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            // The end of the connection without a close frame is a client's leaving too.
            Err(e) => return complaint(e).map(|()| None),
        }
    }
    Ok(None)
}

/// Our half of a client's connection.
#[derive(Debug)]
pub struct WebSocketOutput<T> {
    protocol: Protocol,
    sender: Sender<T>,
    listening: tokio::task::JoinHandle<()>,
    complaint: Complaint,
}

/// What the client did wrong, to be said when the connection is closed.
type Complaint = Arc<Mutex<Option<String>>>;

/// Makes a client of a connection.
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
    // Browsers' clients wait for it before they show a terminal; a client that has left shows soon.
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
            tracing::info!("a streaming client is cut off: {wrong}");
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
    /// Until the client has left; an error is what it did wrong.
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

    /// False when the client has left.
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
            // They are ours to write; what a client sends there is for nobody.
            STDOUT..=ERROR => return Ok(true),
            other => return Err(out_of_range(other)),
        };
        let sending = self.says.send(said);
        tokio::select! {
            biased;
            // If nobody listens any more, the rest is read for the sake of the close frame in it.
            _ = sending => Ok(true),
            () = self.peer.left() => Ok(false),
        }
    }
}

fn out_of_range(channel: u8) -> String {
    format!("channel {channel} is not one of {STDIN} to {RESIZE}")
}

/// What the client did wrong, if that is what broke the connection.
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
        // The client's own close frame, so that it has read ours.
        let _ = timeout(LINGER_TIME, &mut self.listening).await;
        self.listening.abort();
    }
}

/// Says a last word, if there is one, and closes the connection: normally, or because of what was wrong.
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
    // A client that has left is told nothing.
    let _ = timeout(FLUSH_TIME, closing).await;
}

#[cfg(test)]
#[path = "websocket_tests.rs"]
mod tests;
