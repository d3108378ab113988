// SPDX-License-Identifier: Apache-2.0
//! The records of exec and attach streams, in both directions: what a hostile guest sends to the daemon, and what the agent
//! reads.
//!
//! However the bytes arrive, the records are the same, and no payload is longer than it may be.
#![no_main]

use bulkhead_agent::fuzzing::records::{self, FromHost, ToHost};
use bulkhead_agent::fuzzing::{Source, messages};
use bulkhead_fuzz::input::Input;
use bulkhead_guest::streams::{FromProcess, ProcessStreams};
use bulkhead_proto::agent::OpenStream;
use bulkhead_proto::agent::record::MAX_PAYLOAD_BYTES;
use futures_util::FutureExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.below(4) {
        0 => agent(input.rest()),
        1 => {
            let mut bytes = input.rest();
            let read = messages::read::<OpenStream>(&mut bytes, 4096);
            drop(read.now_or_never().expect("bytes never wait"));
        }
        2 => {
            let payload = input.rest();
            let ToHost(bytes) = ToHost::output(Source::Stderr, payload);
            let records = daemon(&[&bytes]);
            assert_eq!(
                records.as_slice(),
                [FromProcess::Stderr(payload.to_vec().into())]
            );
        }
        _ => {
            let at = usize::from(input.byte());
            let bytes = input.rest();
            let (head, rest) = bytes.split_at(at.min(bytes.len()));
            assert_eq!(daemon(&[head, rest]), daemon(&[bytes]));
        }
    }
});

/// What the daemon makes of bytes that come in pieces, up to the first that breaks the protocol.
fn daemon(pieces: &[&[u8]]) -> Vec<FromProcess> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build();
    runtime.expect("a runtime").block_on(async {
        let (ours, mut guest) = UnixStream::pair().expect("a socket pair");
        let mut output = ProcessStreams::new(ours).output;
        let mut records = Vec::new();
        let reading = async {
            while let Ok(record) = output.next().await {
                if let FromProcess::Stdout(bytes) | FromProcess::Stderr(bytes) = &record {
                    assert!(bytes.len() <= MAX_PAYLOAD_BYTES);
                }
                records.push(record);
            }
        };
        let writing = async {
            for piece in pieces {
                // The daemon may have hung up.
                let _ = guest.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            drop(guest);
        };
        tokio::join!(reading, writing);
        records
    })
}

/// What the agent makes of bytes of the host.
fn agent(mut bytes: &[u8]) {
    loop {
        let before = bytes.len();
        let read = records::read(&mut bytes)
            .now_or_never()
            .expect("bytes never wait");
        let Ok(Some(record)) = read else {
            return;
        };
        if let FromHost::Input(payload) = record {
            assert!((1..=MAX_PAYLOAD_BYTES).contains(&payload.len()));
        }
        assert!(bytes.len() < before, "a record of no bytes");
    }
}
