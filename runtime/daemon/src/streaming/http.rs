// SPDX-License-Identifier: Apache-2.0
//! The HTTP request that starts a stream: checks its token, agrees on a protocol, and upgrades the connection.

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request as HttpRequest, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::spdy::Connection;
use super::tokens::{Request, Streams};
use super::websocket::{self, Protocol};
use super::{Clients, MAX_STREAMS, forward, forward_websocket, session, spdy_process};
use crate::descriptors::{self, TooFew};

/// A stream's connections: one to the client, one to the guest or some for forwarded ports.
const STREAM_DESCRIPTORS: usize = 8;
const SPDY: &str = "SPDY/3.1";
const WEBSOCKET: &str = "websocket";
/// The protocol for exec and attach over SPDY. kubelet and crictl both offer it.
const PROCESS_PROTOCOL: &str = "v4.channel.k8s.io";
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");

type Answer = Response<Full<Bytes>>;

/// The protocol that both sides will speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speech {
    SpdyProcess,
    SpdyForward,
    Process(Protocol),
    Tunnel,
    Channels(Protocol),
}

/// Why a request does not become a stream.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("use GET or POST")]
    Method,
    #[error("this token is unknown, was used already, or has expired: ask for a new URL")]
    Token,
    #[error("{MAX_STREAMS} streams are open: try again later")]
    Full,
    #[error("{0}")]
    Descriptors(#[from] TooFew),
    #[error("this URL is for streams: upgrade the connection to {SPDY} or {WEBSOCKET}")]
    NoUpgrade,
    #[error("the WebSocket handshake lacks {0}")]
    Handshake(&'static str),
    #[error("no protocol in common: the client speaks [{offered}], the server [{spoken}]")]
    Protocol { offered: String, spoken: String },
}

impl Refusal {
    fn code(&self) -> StatusCode {
        match self {
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Token => StatusCode::NOT_FOUND,
            Self::Full | Self::Descriptors(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoUpgrade | Self::Handshake(_) => StatusCode::BAD_REQUEST,
            Self::Protocol { .. } => StatusCode::FORBIDDEN,
        }
    }
}

/// Answers a request. If it becomes a stream, a new task serves that.
pub fn answer(clients: &Clients, mut request: HttpRequest<Incoming>) -> Answer {
    let taken = take(clients, request.method(), request.uri().path());
    let agreed = taken.and_then(|wanted| {
        let agreed = negotiate(&wanted, request.headers())?;
        Ok((wanted, agreed))
    });
    match agreed {
        Ok((wanted, (speech, answer))) => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(serve(clients.clone(), wanted, speech, upgrade));
            answer
        }
        Err(refusal) => refuse(&refusal),
    }
}

fn refuse(refusal: &Refusal) -> Answer {
    let mut answer = Response::new(Full::from(format!("{refusal}\n")));
    *answer.status_mut() = refusal.code();
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, text);
    let close = HeaderValue::from_static("close");
    answer.headers_mut().insert(CONNECTION, close);
    answer
}

fn take(clients: &Clients, method: &Method, path: &str) -> Result<Request, Refusal> {
    if method != Method::GET && method != Method::POST {
        return Err(Refusal::Method);
    }
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let (kind, token) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    let wanted = clients.tokens.take(kind, token).ok_or(Refusal::Token)?;
    let slots = std::sync::Arc::clone(&clients.slots);
    let slot = slots.try_acquire_owned().map_err(|_| Refusal::Full)?;
    descriptors::check(STREAM_DESCRIPTORS)?;
    clients.peer.is_known(slot);
    Ok(wanted)
}

/// Chooses the protocol. Returns it and the answer that names it.
fn negotiate(wanted: &Request, headers: &HeaderMap) -> Result<(Speech, Answer), Refusal> {
    let upgrades = || values(headers, &UPGRADE);
    if !values(headers, &CONNECTION).any(|value| value.eq_ignore_ascii_case("upgrade")) {
        return Err(Refusal::NoUpgrade);
    }
    if upgrades().any(|value| value.eq_ignore_ascii_case(WEBSOCKET)) {
        return negotiate_websocket(wanted, headers);
    }
    if !upgrades().any(|value| value.eq_ignore_ascii_case(SPDY)) {
        return Err(Refusal::NoUpgrade);
    }
    let (name, speech) = match wanted {
        Request::PortForward { .. } => (forward::PROTOCOL, Speech::SpdyForward),
        Request::Exec { .. } | Request::Attach { .. } => (PROCESS_PROTOCOL, Speech::SpdyProcess),
    };
    let (name, speech) = agree(headers, &STREAM_PROTOCOL, &[(name, speech)])?;
    let answer = switching(SPDY, &[(STREAM_PROTOCOL, name)]);
    Ok((speech, answer))
}

fn negotiate_websocket(wanted: &Request, headers: &HeaderMap) -> Result<(Speech, Answer), Refusal> {
    if values(headers, &SEC_WEBSOCKET_VERSION).all(|version| version != "13") {
        return Err(Refusal::Handshake("Sec-WebSocket-Version: 13"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let key = key.ok_or(Refusal::Handshake("Sec-WebSocket-Key"))?;
    let spoken: Vec<(&str, Speech)> = match wanted {
        Request::PortForward { .. } => std::iter::once((forward_websocket::TUNNEL, Speech::Tunnel))
            .chain(
                Protocol::ALL
                    .into_iter()
                    .filter(|(_, protocol)| *protocol != Protocol::V5)
                    .map(|(name, protocol)| (name, Speech::Channels(protocol))),
            )
            .collect(),
        Request::Exec { .. } | Request::Attach { .. } => Protocol::ALL
            .map(|(name, protocol)| (name, Speech::Process(protocol)))
            .to_vec(),
    };
    let accept = derive_accept_key(key.as_bytes());
    let mut answers = vec![(SEC_WEBSOCKET_ACCEPT, accept.as_str())];
    let speech = if values(headers, &SEC_WEBSOCKET_PROTOCOL).all(str::is_empty) {
        // A client that offers no protocol speaks the first version, and the answer must not name one.
        match wanted {
            Request::PortForward { .. } => Speech::Channels(Protocol::V1),
            Request::Exec { .. } | Request::Attach { .. } => Speech::Process(Protocol::V1),
        }
    } else {
        let (name, speech) = agree(headers, &SEC_WEBSOCKET_PROTOCOL, &spoken)?;
        answers.push((SEC_WEBSOCKET_PROTOCOL, name));
        speech
    };
    Ok((speech, switching(WEBSOCKET, &answers)))
}

/// The first of our protocols that the client offers.
fn agree<'a>(
    headers: &HeaderMap,
    header: &HeaderName,
    spoken: &[(&'a str, Speech)],
) -> Result<(&'a str, Speech), Refusal> {
    let found = spoken
        .iter()
        .find(|(name, _)| values(headers, header).any(|offer| offer == *name));
    found.copied().ok_or_else(|| {
        let offered: Vec<_> = values(headers, header).collect();
        let spoken: Vec<_> = spoken.iter().map(|(name, _)| *name).collect();
        Refusal::Protocol {
            offered: offered.join(", "),
            spoken: spoken.join(", "),
        }
    })
}

/// All items of a header. It may occur several times, each time with a list.
fn values<'a>(headers: &'a HeaderMap, name: &'a HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn switching(protocol: &'static str, headers: &[(HeaderName, &str)]) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let map = answer.headers_mut();
    map.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    map.insert(UPGRADE, HeaderValue::from_static(protocol));
    for (name, value) in headers {
        // All values are our own names or base64, so they are always valid.
        if let Ok(value) = HeaderValue::from_str(value) {
            map.insert(name.clone(), value);
        }
    }
    answer
}

async fn serve(clients: Clients, wanted: Request, speech: Speech, upgrade: OnUpgrade) {
    let Ok(upgraded) = upgrade.await else {
        // The client left before it got the answer.
        return;
    };
    let io = TokioIo::new(upgraded);
    match (speech, wanted) {
        (Speech::SpdyForward, Request::PortForward { pod, .. }) => {
            forward::serve(spdy(&clients, io), clients.pods, pod).await;
        }
        (Speech::Tunnel, Request::PortForward { pod, .. }) => {
            let socket = websocket::accept(io).await;
            forward_websocket::tunnel(socket, clients.pods, pod, clients.peer).await;
        }
        (Speech::Channels(protocol), Request::PortForward { pod, ports }) => {
            let socket = websocket::accept(io).await;
            forward_websocket::channels(socket, protocol, clients.pods, pod, ports).await;
        }
        (Speech::Process(protocol), wanted) => {
            let socket = websocket::accept(io).await;
            let client = websocket::client(socket, protocol, clients.peer).await;
            session::serve(&clients.pods, wanted, client).await;
        }
        (_, wanted) => {
            let connection = spdy(&clients, io);
            match spdy_process::client(connection, streams(&wanted)).await {
                Ok(client) => session::serve(&clients.pods, wanted, client).await,
                Err(why) => tracing::info!("closing the connection of a streaming client: {why}"),
            }
        }
    }
}

fn spdy(clients: &Clients, io: TokioIo<Upgraded>) -> Connection {
    let (reader, writer) = tokio::io::split(io);
    Connection::new(reader, writer, std::sync::Arc::clone(&clients.peer))
}

fn streams(wanted: &Request) -> Streams {
    match wanted {
        Request::Exec { streams, .. } | Request::Attach { streams, .. } => *streams,
        Request::PortForward { .. } => Streams::default(),
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
