// SPDX-License-Identifier: Apache-2.0
//! SPDY frames of a streaming client: streams, data and header blocks in any order, and bytes that are no frames.
//!
//! The server reads all of it, or closes the connection. A stream gets what was sent on it, and nothing else.
#![no_main]

use bulkhead::fuzzing::streaming::{Stream, spdy};
use bulkhead_fuzz::input::Input;
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};

/// More than a run can send, so that nobody waits.
const PIPE_BYTES: usize = 1 << 20;
const MOST_STEPS: usize = 64;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build();
    runtime.expect("a runtime").block_on(async {
        let (theirs, ours) = tokio::io::duplex(PIPE_BYTES);
        let mut connection = spdy(ours).expect("a connection");
        let (mut reader, mut writer) = split(theirs);
        let sent = frames(bytes);
        let total = sent.len();
        writer.write_all(&sent).await.expect("a large pipe");
        writer.shutdown().await.expect("the end");
        let answers = tokio::spawn(async move {
            let mut answers = Vec::new();
            let _ = reader.read_to_end(&mut answers).await;
            answers.len()
        });
        let mut streams = Vec::new();
        while let Some(stream) = connection.next().await {
            assert_eq!(stream.id % 2, 1, "a stream of the server");
            streams.push(tokio::spawn(serve(stream)));
        }
        let mut got = 0;
        for stream in streams {
            got += stream.await.expect("a stream");
        }
        assert!(got <= total, "{got} bytes came of {total}");
        drop(connection);
        answers.await.expect("the answers");
    });
});

async fn serve(stream: Stream) -> usize {
    let mut got = 0;
    if let Ok((mut reader, _writer)) = stream.accept().await {
        while let Ok(Some(bytes)) = reader.next().await {
            got += bytes.len();
        }
    }
    got
}

/// Makes frames of an input. Header blocks are zlib streams with stored blocks, so no compression stands between the fuzzer
/// and the parser.
fn frames(bytes: &[u8]) -> Vec<u8> {
    let mut input = Input::new(bytes);
    let mut frames = Vec::new();
    let mut is_first = true;
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(8) {
            step @ 0..3 => {
                let id = u32::from(input.byte());
                let block = block(input.short(), &mut is_first);
                let (kind, payload) = match step {
                    2 => (8, [&id.to_be_bytes()[..], &block].concat()),
                    _ => (1, [&id.to_be_bytes()[..], &[0; 6], &block].concat()),
                };
                control(&mut frames, kind, input.below(2), &payload);
            }
            3 | 4 => {
                let id = u32::from(input.byte());
                let flags = input.below(2);
                let payload = match input.byte() {
                    0 => vec![7; input.u16().into()],
                    len => input.bytes(len.into()).to_vec(),
                };
                frames.extend(id.to_be_bytes());
                rest(&mut frames, flags, &payload);
            }
            5 | 6 => {
                let kind = input.below(12).into();
                let flags = input.byte();
                let payload = input.short();
                control(&mut frames, kind, flags, payload);
            }
            _ => frames.extend(input.short()),
        }
    }
    frames
}

fn control(frames: &mut Vec<u8>, kind: u16, flags: u8, payload: &[u8]) {
    frames.extend([0x80, 3]);
    frames.extend(kind.to_be_bytes());
    rest(frames, flags, payload);
}

/// What follows the first word of all frames: flags, a length of three bytes, the payload.
fn rest(frames: &mut Vec<u8>, flags: u8, payload: &[u8]) {
    frames.push(flags);
    frames.extend(
        &u32::try_from(payload.len())
            .expect("a length")
            .to_be_bytes()[1..],
    );
    frames.extend(payload);
}

fn block(plain: &[u8], is_first: &mut bool) -> Vec<u8> {
    let mut block = Vec::new();
    if std::mem::take(is_first) {
        block.extend([0x78, 1]);
    }
    let len = u16::try_from(plain.len()).expect("a short block");
    block.push(0);
    block.extend(len.to_le_bytes());
    block.extend((!len).to_le_bytes());
    block.extend(plain);
    block
}
