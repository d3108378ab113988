// SPDX-License-Identifier: Apache-2.0
//! Tests of the protocol's choice and of the texts of refusals.

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
    let (process, channels) = (Speech::Process, Speech::Channels);
    let (v4, base64) = ("v4.channel.k8s.io", "v4.base64.channel.k8s.io");
    let (v5, first) = ("v5.channel.k8s.io", "channel.k8s.io");
    let first_base64 = "base64.channel.k8s.io";
    let tunnel = "SPDY/3.1+portforward.k8s.io";
    let table = [
        (
            attach(),
            "v4.channel.k8s.io, v5.channel.k8s.io",
            v5,
            process(Protocol::V5),
        ),
        (
            attach(),
            "channel.k8s.io,v4.channel.k8s.io",
            v4,
            process(Protocol::V4),
        ),
        (attach(), v4, v4, process(Protocol::V4)),
        (attach(), base64, base64, process(Protocol::V4Base64)),
        (attach(), first, first, process(Protocol::V1)),
        (
            attach(),
            first_base64,
            first_base64,
            process(Protocol::V1Base64),
        ),
        (port_forward(), tunnel, tunnel, Speech::Tunnel),
        (port_forward(), v4, v4, channels(Protocol::V4)),
        (port_forward(), base64, base64, channels(Protocol::V4Base64)),
        (port_forward(), first, first, channels(Protocol::V1)),
        (
            port_forward(),
            first_base64,
            first_base64,
            channels(Protocol::V1Base64),
        ),
    ];
    for (wanted, offer, named, expected) in table {
        let offer = [("Sec-WebSocket-Protocol", offer)];
        let lines = [&WEBSOCKET_UPGRADE[..], &offer].concat();
        let (speech, answer) = agreed(&wanted, &lines);
        assert_eq!(speech, expected);
        let answered = answer.headers().get(SEC_WEBSOCKET_PROTOCOL).unwrap();
        assert_eq!(answered, named);
        // The key and its answer in RFC 6455, 1.3.
        let accept = answer.headers().get(SEC_WEBSOCKET_ACCEPT).unwrap();
        assert_eq!(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}

#[test]
fn websocket_clients_that_name_no_protocol_speak_the_first_and_are_told_none() {
    let empty = [("Sec-WebSocket-Protocol", " ")];
    for lines in [
        WEBSOCKET_UPGRADE.to_vec(),
        [&WEBSOCKET_UPGRADE[..], &empty].concat(),
    ] {
        for (wanted, expected) in [
            (attach(), Speech::Process(Protocol::V1)),
            (port_forward(), Speech::Channels(Protocol::V1)),
        ] {
            let (speech, answer) = agreed(&wanted, &lines);
            assert_eq!(speech, expected);
            // RFC 6455, 4.2.2: a client fails the connection if it is told what it did not offer.
            assert!(!answer.headers().contains_key(SEC_WEBSOCKET_PROTOCOL));
            assert!(answer.headers().contains_key(SEC_WEBSOCKET_ACCEPT));
        }
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
