// SPDX-License-Identifier: Apache-2.0
//! Tests of a connection. The test plays the client.

use super::super::frame::MAX_CONTROL_BYTES;
use super::super::stream::WINDOW_BYTES;
use super::*;
use flate2::{Compress, Compression, FlushCompress};
use tokio::io::{AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

struct Client {
    reader: ReadHalf<DuplexStream>,
    writer: WriteHalf<DuplexStream>,
    compress: Compress,
}

fn pair() -> (Client, Connection) {
    let (theirs, ours) = tokio::io::duplex(16 << 10);
    let (reader, writer) = tokio::io::split(ours);
    let connection = Connection::new(reader, writer, Peer::fixture());
    let (reader, writer) = tokio::io::split(theirs);
    let mut compress = Compress::new(Compression::fast(), true);
    compress
        .set_dictionary(&super::super::headers::dictionary())
        .unwrap();
    let client = Client {
        reader,
        writer,
        compress,
    };
    (client, connection)
}

impl Client {
    async fn open(&mut self, stream: u32, kind: &str) {
        let mut plain = 1u32.to_be_bytes().to_vec();
        for text in ["streamtype", kind] {
            plain.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            plain.extend(text.as_bytes());
        }
        let mut block = Vec::with_capacity(1024);
        self.compress
            .compress_vec(&plain, &mut block, FlushCompress::Sync)
            .unwrap();
        let length = u8::try_from(10 + block.len()).unwrap();
        let mut frame = vec![0x80, 3, 0, 1, 0, 0, 0, length];
        frame.extend(stream.to_be_bytes());
        frame.extend([0; 6]);
        frame.extend(block);
        self.send(&frame).await;
    }

    async fn data(&mut self, stream: u32, fin: bool, payload: &[u8]) {
        let mut frame = frame::data(stream, fin, payload.len()).to_vec();
        frame.extend(payload);
        self.send(&frame).await;
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.writer.write_all(bytes).await.unwrap();
    }

    /// A frame's first eight bytes and its payload; `None` once the server has hung up.
    async fn receive(&mut self) -> Option<([u8; 8], Vec<u8>)> {
        let mut head = [0; 8];
        self.reader.read_exact(&mut head).await.ok()?;
        let [.., a, b, c] = head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let mut payload = vec![0; length];
        self.reader.read_exact(&mut payload).await.unwrap();
        Some((head, payload))
    }
}

#[tokio::test]
async fn streams_are_opened_answered_and_close_by_halves() {
    let (mut client, mut connection) = pair();
    client.open(1, "stdin").await;
    let stream = connection.next().await.unwrap();
    assert_eq!(stream.headers["streamtype"], "stdin");
    let (mut reader, mut writer) = stream.accept().await.unwrap();
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[3], &payload[..4]), (2, &[0, 0, 0, 1][..]));
    client.data(1, false, b"hello").await;
    client.data(1, true, b"").await;
    assert_eq!(reader.next().await.unwrap().unwrap(), "hello");
    assert_eq!(reader.next().await.unwrap(), None);
    writer.send(Bytes::from_static(b"answer")).await.unwrap();
    writer.finish().await.unwrap();
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[4], &payload[..]), (0, &b"answer"[..]));
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[4], payload.len()), (1, 0));
    let finishing = tokio::spawn(connection.finish());
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[3], payload[7]), (7, 0), "goodbye without an error");
    assert!(client.receive().await.is_none());
    drop(client);
    finishing.await.unwrap();
}

#[tokio::test]
async fn pings_are_echoed_and_refused_streams_reset() {
    let (mut client, mut connection) = pair();
    client.send(&frame::ping(7)).await;
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[3], &payload[..]), (6, &[0, 0, 0, 7][..]));
    client.open(1, "what").await;
    connection.next().await.unwrap().refuse().await;
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[3], payload[7]), (3, Reset::RefusedStream as u8));
}

#[tokio::test]
async fn a_window_is_opened_again_as_its_bytes_are_read() {
    let (mut client, mut connection) = pair();
    client.open(1, "stdin").await;
    let (mut reader, _writer) = connection.next().await.unwrap().accept().await.unwrap();
    client.receive().await.unwrap();
    for _ in 0..2 {
        client.data(1, false, &[0; WINDOW_BYTES]).await;
        let mut read = 0;
        while read < WINDOW_BYTES {
            read += reader.next().await.unwrap().unwrap().len();
        }
        // The window update is sent by the next call of `next`.
        assert!(
            timeout(Duration::from_millis(10), reader.next())
                .await
                .is_err()
        );
        let mut opened = [0; 2];
        while opened != [WINDOW_BYTES; 2] {
            let (head, payload) = client.receive().await.unwrap();
            let [.., stream, a, b, c, d] = payload[..] else {
                panic!("{payload:?}")
            };
            assert_eq!((head[3], stream < 2), (9, true));
            opened[usize::from(stream)] += u32::from_be_bytes([a, b, c, d]) as usize;
        }
    }
}

#[tokio::test]
async fn a_client_that_ignores_its_window_is_told_of_it_no_more() {
    let (mut client, mut connection) = pair();
    client.open(1, "stdin").await;
    let (mut reader, mut writer) = connection.next().await.unwrap().accept().await.unwrap();
    client.receive().await.unwrap();
    let writing = tokio::spawn(async move {
        client.data(1, false, &[0; 4 * WINDOW_BYTES]).await;
        client.data(1, true, &[]).await;
        client
    });
    // Wait until more than the window has arrived before anything is read.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut read = 0;
    while let Some(bytes) = reader.next().await.unwrap() {
        read += bytes.len();
    }
    assert_eq!(read, 4 * WINDOW_BYTES);
    let mut client = writing.await.unwrap();
    writer.send(Bytes::from_static(b"answer")).await.unwrap();
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[3], &payload[..]), (1, &b"answer"[..]));
}

#[tokio::test]
async fn what_nobody_reads_is_bounded_and_what_nobody_wants_is_dropped() {
    let (mut client, mut connection) = pair();
    client.open(1, "stdin").await;
    let (mut reader, _writer) = connection.next().await.unwrap().accept().await.unwrap();
    client.receive().await.unwrap();
    let writing = tokio::spawn(async move {
        client.data(1, false, &[0; 10 * WINDOW_BYTES]).await;
        client
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!writing.is_finished(), "TCP holds the client back");
    reader.next().await.unwrap().unwrap();
    drop(reader);
    writing.await.unwrap();
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_told_and_cut_off() {
    let too_long = {
        let [_, a, b, c] = u32::try_from(MAX_CONTROL_BYTES + 1).unwrap().to_be_bytes();
        vec![0x80, 3, 0, 1, 0, a, b, c]
    };
    let table: [(&str, Vec<u8>); 5] = [
        ("version", vec![0x80, 9, 0, 1, 0, 0, 0, 0]),
        ("length", too_long),
        ("stream zero", vec![0, 0, 0, 0, 0, 0, 0, 1]),
        ("short", vec![0x80, 3, 0, 6, 0, 0, 0, 1, 0]),
        (
            "no zlib",
            vec![
                0x80, 3, 0, 1, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1,
            ],
        ),
    ];
    for (case, bytes) in table {
        let (mut client, mut connection) = pair();
        client.send(&bytes).await;
        assert!(connection.next().await.is_none(), "{case}");
        // The server drops such a connection. The client must get the last frame all the same.
        drop(connection);
        let (head, payload) = client.receive().await.unwrap();
        assert_eq!((head[3], payload[7]), (7, 1), "{case}");
    }
    let (mut client, mut connection) = pair();
    client.open(2, "even").await;
    assert_eq!(client.receive().await.unwrap().0[3], 7);
    assert!(connection.next().await.is_none());
}

#[tokio::test]
async fn there_are_only_so_many_streams() {
    let (mut client, mut connection) = pair();
    let mut kept = Vec::new();
    for number in 0..u32::try_from(MAX_STREAMS).unwrap() {
        client.open(2 * number + 1, "data").await;
        kept.push(connection.next().await.unwrap());
    }
    client
        .open(2 * u32::try_from(MAX_STREAMS).unwrap() + 1, "data")
        .await;
    let (head, payload) = client.receive().await.unwrap();
    assert_eq!((head[3], payload[7]), (3, Reset::RefusedStream as u8));
    kept.clear();
    client.open(9001, "data").await;
    assert_eq!(connection.next().await.unwrap().id, 9001);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_streams() {
    let (mut client, mut connection) = pair();
    client.open(1, "stdin").await;
    let (mut reader, _writer) = connection.next().await.unwrap().accept().await.unwrap();
    client.data(1, false, b"last words").await;
    drop(client);
    connection.closed().cancelled().await;
    assert_eq!(reader.next().await.unwrap().unwrap(), "last words");
    assert!(reader.next().await.is_err());
    assert!(connection.next().await.is_none());
}
