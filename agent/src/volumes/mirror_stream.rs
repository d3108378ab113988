// SPDX-License-Identifier: Apache-2.0
//! Receives the states of a mirrored volume, as described for `MirrorStream` in `agent.proto`.
//!
//! Records are written in batches, each on a thread that may block. So a slow disk delays only its own stream, and
//! only one batch is in memory.

use std::io;

use bulkhead_proto::agent::mirror_record::Record;
use bulkhead_proto::agent::{MirrorAnswer, MirrorRecord};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::task::spawn_blocking;

use super::mirror::Mirror;
use crate::streams::messages;

const MAX_RECORD_BYTES: usize = 128 << 10;
const BATCH_BYTES: usize = 256 << 10;

/// Returns when the host closes the stream.
pub async fn serve(
    mut mirror: Mirror,
    stream: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    // An error is reported only at the commit. Records up to there are thrown away.
    let mut failed: Option<io::Error> = None;
    loop {
        let (batch, ends) = read_batch(&mut stream).await?;
        if failed.is_none() {
            let (kept, result) = spawn_blocking(move || apply(mirror, batch))
                .await
                .map_err(io::Error::other)?;
            mirror = kept;
            failed = result.err();
        }
        if ends {
            let error = failed.take().map(|e| e.to_string()).unwrap_or_default();
            messages::write(&mut stream, &MirrorAnswer { error }).await?;
        }
    }
}

fn apply(mut mirror: Mirror, batch: Vec<Record>) -> (Mirror, io::Result<()>) {
    let result = batch.into_iter().try_for_each(|record| mirror.take(record));
    if result.is_err() {
        mirror.give_up();
    }
    (mirror, result)
}

/// Reads records up to a commit, or as many as fit one batch. Also returns whether the last one is a commit.
async fn read_batch(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(Vec<Record>, bool)> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < BATCH_BYTES {
        let message: MirrorRecord = messages::read(stream, MAX_RECORD_BYTES).await?;
        bytes += message.encoded_len();
        let Some(record) = message.record else {
            continue;
        };
        let ends = matches!(record, Record::Commit(_));
        batch.push(record);
        if ends {
            return Ok((batch, true));
        }
    }
    Ok((batch, false))
}
