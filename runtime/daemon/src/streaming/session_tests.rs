// SPDX-License-Identifier: Apache-2.0
//! Tests of sessions. The test plays both the client and the agent.

use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

#[derive(Debug, Default)]
struct Recorder {
    written: Vec<(Source, Bytes)>,
}

impl Output for Recorder {
    async fn write(&mut self, source: Source, bytes: Bytes) -> Result<(), Left> {
        self.written.push((source, bytes));
        Ok(())
    }

    async fn finish(self, _ended: Option<Ended>) {}
}

struct Fixture {
    client: Client<Recorder>,
    says: mpsc::Sender<FromClient>,
    resizes: watch::Sender<Size>,
    agent: UnixStream,
    process: ProcessStreams,
}

fn fixture() -> Fixture {
    let (ours, agent) = UnixStream::pair().unwrap();
    let (says, input) = mpsc::channel(16);
    let (resizes, sizes) = watch::channel(Size::default());
    let client = Client {
        input,
        sizes,
        output: Recorder::default(),
        left: CancellationToken::new(),
    };
    Fixture {
        client,
        says,
        resizes,
        agent,
        process: ProcessStreams::new(ours),
    }
}

#[tokio::test]
async fn output_comes_to_the_client_and_the_exit_code_ends_the_session() {
    let mut fixture = fixture();
    let records = b"\x01\0\0\0\x02hi\x02\0\0\0\x01!\x03\0\0\0\x02\x08\x05";
    fixture.agent.write_all(records).await.unwrap();
    let ended = run(fixture.process, &mut fixture.client).await;
    assert_eq!(ended, Some(Ended::Exited(5)));
    let written = [
        (Source::Stdout, Bytes::from_static(b"hi")),
        (Source::Stderr, Bytes::from_static(b"!")),
    ];
    assert_eq!(fixture.client.output.written, written);
}

#[tokio::test]
async fn a_guest_that_goes_away_is_a_failure_with_words() {
    let mut fixture = fixture();
    drop(fixture.agent);
    let ended = run(fixture.process, &mut fixture.client).await;
    assert!(matches!(ended, Some(Ended::Failed(why)) if why.contains("gone")));
}

#[tokio::test]
async fn what_a_client_said_before_it_left_reaches_the_process() {
    let mut fixture = fixture();
    let bytes = Bytes::from_static(b"last");
    fixture.says.send(FromClient::Input(bytes)).await.unwrap();
    fixture.says.send(FromClient::EndOfInput).await.unwrap();
    drop(fixture.says);
    assert_eq!(run(fixture.process, &mut fixture.client).await, None);
    let mut heard = Vec::new();
    fixture.agent.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"\0\0\0\0\x04last\0\0\0\0\0");
}

#[tokio::test]
async fn input_waits_for_the_process_and_a_window_size_does_not() {
    let mut fixture = fixture();
    let total = INPUT_WINDOW_BYTES + 1000;
    let bytes = Bytes::from(vec![b'x'; total]);
    fixture.says.send(FromClient::Input(bytes)).await.unwrap();
    let mut client = fixture.client;
    let session = tokio::spawn(async move { run(fixture.process, &mut client).await });
    let mut got = 0;
    while got < INPUT_WINDOW_BYTES {
        assert_eq!(fixture.agent.read_u8().await.unwrap(), 0);
        let length = fixture.agent.read_u32().await.unwrap() as usize;
        let mut payload = vec![0; length];
        fixture.agent.read_exact(&mut payload).await.unwrap();
        got += length;
    }
    assert_eq!(got, INPUT_WINDOW_BYTES);
    let size = Size {
        columns: 80,
        rows: 24,
    };
    fixture.resizes.send_replace(size);
    let mut record = [0; 9];
    fixture.agent.read_exact(&mut record).await.unwrap();
    assert_eq!(&record, b"\x04\0\0\0\x04\0\x50\0\x18");
    let mut gone = b"\0\0\0\0\x08".to_vec();
    gone.extend((got as u64).to_be_bytes());
    fixture.agent.write_all(&gone).await.unwrap();
    assert_eq!(fixture.agent.read_u8().await.unwrap(), 0);
    assert_eq!(fixture.agent.read_u32().await.unwrap(), 1000);
    drop(fixture.agent);
    assert!(matches!(session.await.unwrap(), Some(Ended::Failed(_))));
}

#[test]
fn window_sizes_come_whole_or_in_pieces_and_the_last_one_counts() {
    let mut parser = SizeParser::default();
    let size = |columns, rows| Some(Size { columns, rows });
    assert_eq!(parser.push(b"{\"Width\":80,\"Height\":24}\n"), size(80, 24));
    assert_eq!(parser.push(b"{\"Width\":1,"), None);
    let rest = b"\"Height\":2}{\"Width\":3,\"Height\":4}";
    assert_eq!(parser.push(rest), size(3, 4));
    for nonsense in ["}", "{\"Width\":-1,\"Height\":1}", &" ".repeat(5000)] {
        assert_eq!(parser.push(nonsense.as_bytes()), None);
        assert!(parser.buffer.len() <= SIZE_BYTES, "{nonsense:?}");
    }
    assert_eq!(parser.push(b"{\"Width\":5,\"Height\":6}"), size(5, 6));
}
