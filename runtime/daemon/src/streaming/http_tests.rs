// SPDX-License-Identifier: Apache-2.0
//! What is agreed upon, and the words of refusals.

use super::*;

fn headers(lines: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines {
        let name: HeaderName = name.parse().unwrap();
        map.append(name, value.parse().unwrap());
    }
    map
}

fn attach() -> Request {
    Request::Attach {
        container: "c".into(),
        streams: Streams::default(),
    }
}

fn port_forward() -> Request {
    Request::PortForward {
        pod: "p".into(),
        ports: Vec::new(),
    }
}

fn agreed(wanted: &Request, lines: &[(&str, &str)]) -> (Speech, Answer) {
    negotiate(wanted, &headers(lines)).unwrap()
}

fn refused(wanted: &Request, lines: &[(&str, &str)]) -> (StatusCode, String) {
    let refusal = negotiate(wanted, &headers(lines)).unwrap_err();
    (refusal.code(), refusal.to_string())
}

const SPDY_UPGRADE: [(&str, &str); 2] = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
const WEBSOCKET_UPGRADE: [(&str, &str); 4] = [
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

#[test]
fn spdy_clients_get_one_protocol_of_those_they_offer() {
    let offers = [
        ("X-Stream-Protocol-Version", "v5.channel.k8s.io"),
        ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
        ("X-Stream-Protocol-Version", "channel.k8s.io"),
    ];
    let lines = [&SPDY_UPGRADE[..], &offers].concat();
    let (speech, answer) = agreed(&attach(), &lines);
    assert_eq!(speech, Speech::SpdyProcess);
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    let chosen: Vec<_> = answer.headers().get_all(STREAM_PROTOCOL).iter().collect();
    assert_eq!(chosen, ["v4.channel.k8s.io"]);
    let offer = [("X-Stream-Protocol-Version", "portforward.k8s.io")];
    let lines = [&SPDY_UPGRADE[..], &offer].concat();
    assert_eq!(agreed(&port_forward(), &lines).0, Speech::SpdyForward);
}

#[test]
fn websocket_clients_get_the_best_that_they_offer() {
    let table = [
        (
            attach(),
            "v4.channel.k8s.io, v5.channel.k8s.io",
            Speech::Process(Protocol::V5),
        ),
        (attach(), "v4.channel.k8s.io", Speech::Process(Protocol::V4)),
        (
            port_forward(),
            "SPDY/3.1+portforward.k8s.io",
            Speech::Tunnel,
        ),
        (
            port_forward(),
            "v4.channel.k8s.io",
            Speech::Channels(Protocol::V4),
        ),
    ];
    for (wanted, offer, expected) in table {
        let offer = [("Sec-WebSocket-Protocol", offer)];
        let lines = [&WEBSOCKET_UPGRADE[..], &offer].concat();
        let (speech, answer) = agreed(&wanted, &lines);
        assert_eq!(speech, expected);
        // The key and its answer in RFC 6455, 1.3.
        let accept = answer.headers().get(SEC_WEBSOCKET_ACCEPT).unwrap();
        assert_eq!(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let (code, text) = refused(&attach(), &[]);
    assert_eq!(code, StatusCode::BAD_REQUEST);
    assert!(text.contains("upgrade"), "{text}");
    let (code, text) = refused(&attach(), &SPDY_UPGRADE);
    assert_eq!(code, StatusCode::FORBIDDEN);
    assert!(text.contains("v4.channel.k8s.io"), "{text}");
    let offer = [("Sec-WebSocket-Protocol", "v9.channel.k8s.io")];
    let lines = [&WEBSOCKET_UPGRADE[..], &offer].concat();
    let (_, text) = refused(&attach(), &lines);
    assert!(text.contains("v9.channel.k8s.io"), "{text}");
    let (_, text) = refused(&attach(), &WEBSOCKET_UPGRADE[..3]);
    assert!(text.contains("Sec-WebSocket-Key"), "{text}");
}
