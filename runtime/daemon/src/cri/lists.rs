// SPDX-License-Identifier: Apache-2.0
//! Sends lists as streams, because a node may have more pods than fit into one gRPC message.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::Status;

/// How many items of a streamed list are in one message.
const STREAM_CHUNK: usize = 100;

pub type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Splits a list into a stream of messages.
pub fn stream_list<T, M>(items: Vec<T>, message: fn(Vec<T>) -> M) -> BoxStream<M>
where
    T: Clone + Send + 'static,
    M: Send + 'static,
{
    let messages: Vec<_> = items
        .chunks(STREAM_CHUNK)
        .map(|chunk| Ok(message(chunk.to_vec())))
        .collect();
    Box::pin(tokio_stream::iter(messages))
}
