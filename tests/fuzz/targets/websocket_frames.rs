// SPDX-License-Identifier: Apache-2.0
//! WebSocket frames of a streaming client, of each version of Kubernetes' protocol, and pieces of window sizes.
#![no_main]

use bulkhead::fuzzing::streaming::{FromClient, Protocol, SizeParser, websocket};
use bulkhead_fuzz::input::Input;
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};

const PIPE_BYTES: usize = 1 << 20;
const MOST_STEPS: usize = 64;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let protocol = Protocol::ALL[usize::from(input.byte()) % Protocol::ALL.len()].1;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build();
    runtime.expect("a runtime").block_on(async {
        let (theirs, ours) = tokio::io::duplex(PIPE_BYTES);
        let mut client = websocket(ours, protocol).await.expect("a connection");
        let (mut reader, mut writer) = split(theirs);
        let sent = frames(&mut input);
        writer.write_all(&sent).await.expect("a large pipe");
        writer.shutdown().await.expect("the end");
        let answers =
            tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await.is_ok() });
        let mut got = 0;
        while let Some(said) = client.input.recv().await {
            if let FromClient::Input(bytes) = said {
                assert!(!bytes.is_empty(), "input of no bytes");
                got += bytes.len();
            }
        }
        assert!(got <= sent.len(), "{got} bytes came of {}", sent.len());
        client.left.cancelled().await;
        drop(client);
        answers.await.expect("the answers");
    });
    let mut parser = SizeParser::default();
    for piece in bytes.chunks(7) {
        let _ = parser.push(piece);
    }
});

/// Makes frames of an input: masked by zeroes, so that the payload is what is written, or bytes that are no frames.
fn frames(input: &mut Input<'_>) -> Vec<u8> {
    let mut frames = Vec::new();
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        match input.byte() {
            255 => frames.extend(input.short()),
            // The flags of the end and of the reserved bits, and the opcode.
            head => {
                let payload = input.short();
                frames.push(head);
                match u8::try_from(payload.len()) {
                    Ok(len @ ..126) => frames.push(0x80 | len),
                    _ => {
                        frames.push(0x80 | 126);
                        frames.extend(
                            u16::try_from(payload.len())
                                .expect("a short payload")
                                .to_be_bytes(),
                        );
                    }
                }
                frames.extend([0; 4]);
                frames.extend(payload);
            }
        }
    }
    frames
}
