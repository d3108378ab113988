// SPDX-License-Identifier: Apache-2.0
//! Tests of WebSocket connections. The test plays the client.

use super::*;
use tokio::io::DuplexStream;

type Other = WebSocketStream<DuplexStream>;

async fn pair(protocol: Protocol) -> (Other, Client<WebSocketOutput<DuplexStream>>) {
    let (theirs, ours) = tokio::io::duplex(1 << 20);
    let other = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
    let client = client(accept(ours).await, protocol, Peer::fixture()).await;
    (other, client)
}

async fn say(other: &mut Other, bytes: &'static [u8]) {
    let message = Message::Binary(Bytes::from_static(bytes));
    other.send(message).await.unwrap();
}

#[tokio::test]
async fn input_its_end_and_window_sizes_come_by_their_channels() {
    let (mut other, mut client) = pair(Protocol::V5).await;
    say(&mut other, b"\0hello").await;
    say(&mut other, b"").await;
    say(&mut other, b"\x04{\"Width\":80,\"Height\":24}").await;
    say(&mut other, b"\x01for nobody").await;
    other.send(Message::Text("\0text".into())).await.unwrap();
    say(&mut other, b"\xff\0").await;
    for expected in [
        FromClient::Input(Bytes::from_static(b"hello")),
        FromClient::Input(Bytes::from_static(b"text")),
        FromClient::EndOfInput,
    ] {
        assert_eq!(client.input.recv().await, Some(expected));
    }
    assert_eq!(client.sizes.borrow().columns, 80);
    drop(other);
    assert_eq!(client.input.recv().await, None);
    client.left.cancelled().await;
}

#[tokio::test]
async fn output_and_the_last_word_come_by_theirs_and_the_close_is_normal() {
    let success = b"\x03{\"metadata\":{},\"status\":\"Success\"}";
    let failure = b"\x03command terminated with non-zero exit code: exit status 3";
    let base64 = b"3Y29tbWFuZCB0ZXJtaW5hdGVkIHdpdGggbm9uLXplcm8gZXhpdCBjb2RlOiBleGl0IHN0YXR1cyAz";
    let (first, oh) = (&b"\x01"[..], &b"\x02oh"[..]);
    for (protocol, code, expected) in [
        (Protocol::V5, 0, vec![first, oh, success]),
        (Protocol::V4, 0, vec![first, oh, success]),
        (Protocol::V1, 0, vec![first, oh]),
        (Protocol::V1, 3, vec![first, oh, failure]),
        (Protocol::V1Base64, 0, vec![b"1", b"2b2g="]),
        (Protocol::V1Base64, 3, vec![b"1", b"2b2g=", base64]),
    ] {
        let (mut other, mut client) = pair(protocol).await;
        let bytes = Bytes::from_static(b"oh");
        client.output.write(Source::Stderr, bytes).await.unwrap();
        drop(client.input);
        let finishing = tokio::spawn(client.output.finish(Some(Ended::Exited(code))));
        let mut seen = Vec::new();
        let closed = loop {
            match other.next().await.unwrap().unwrap() {
                Message::Binary(bytes) => seen.push(bytes),
                Message::Text(text) => seen.push(text.into()),
                Message::Close(frame) => break frame.unwrap(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(seen, expected, "{protocol:?}, {code}");
        assert_eq!(closed.code, CloseCode::Normal);
        drop(other);
        finishing.await.unwrap();
    }
}

#[tokio::test]
async fn channels_out_of_range_are_refused_by_name() {
    for (protocol, message) in [
        (Protocol::V5, &b"\x05x"[..]),
        (Protocol::V5, b"\xff\x09"),
        (Protocol::V4, b"\xff\0"),
        (Protocol::V4Base64, b"9eA=="),
        (Protocol::V1, b"\xff\0"),
    ] {
        let (mut other, mut client) = pair(protocol).await;
        say(&mut other, message).await;
        assert_eq!(client.input.recv().await, None, "{message:?}");
        let finishing = tokio::spawn(client.output.finish(None));
        let closed = loop {
            if let Message::Close(frame) = other.next().await.unwrap().unwrap() {
                break frame.unwrap();
            }
        };
        assert_eq!(closed.code, CloseCode::Protocol, "{message:?}");
        assert!(closed.reason.contains("is not one of 0 to 4"), "{closed:?}");
        drop(other);
        finishing.await.unwrap();
    }
}

#[test]
fn the_base64_variants_are_text_both_ways() {
    for protocol in [Protocol::V4Base64, Protocol::V1Base64] {
        let message = protocol.encode(1, b"hi");
        assert_eq!(message, Message::Text("1aGk=".into()));
        let (channel, bytes) = protocol.decode(message.into_data()).unwrap().unwrap();
        assert_eq!((channel, &bytes[..]), (1, &b"hi"[..]));
        assert!(protocol.decode(Bytes::from_static(b"0!")).is_err());
    }
}
