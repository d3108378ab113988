// SPDX-License-Identifier: Apache-2.0
//! How long a call may take, by its kind.

use std::time::Duration;

use prost::Message;
use tonic::{Status, Streaming};

/// How long a list may take. kubelet lists every second, and Bulkhead's pods are in the same answer.
const LIST: Duration = Duration::from_secs(2);
/// How long it may take to read what concerns one pod or container.
const READ: Duration = Duration::from_secs(10);
/// How long a change may take if its caller does not say. kubelet waits four minutes for RunPodSandbox.
const CHANGE: Duration = Duration::from_secs(4 * 60);

/// The longest streamed list.
const STREAM_BYTES: usize = 64 << 20;

/// The kind of a call, which says how long it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Asked of every side for one answer.
    List,
    /// Changes nothing, and concerns one pod, container or image.
    Read,
    /// Takes as long as its caller waits.
    Change(Option<Duration>),
    /// A stream that does not end by itself.
    Endless,
}

impl Limit {
    pub fn duration(self) -> Option<Duration> {
        match self {
            Self::List => Some(LIST),
            Self::Read => Some(READ),
            Self::Change(caller) => Some(caller.unwrap_or(CHANGE)),
            Self::Endless => None,
        }
    }

    /// Whether a call that was not answered in time shows that the server is slow. Changes take their time.
    pub(crate) fn shows_health(self) -> bool {
        matches!(self, Self::List | Self::Read)
    }

    /// Whether the call may be repeated if the connection broke.
    pub(crate) fn may_repeat(self) -> bool {
        matches!(self, Self::List | Self::Read)
    }
}

/// Reads a streamed list to its end. Its size is bounded.
pub async fn collect<M: Message + Default>(mut stream: Streaming<M>) -> Result<Vec<M>, Status> {
    let mut messages = Vec::new();
    let mut bytes = 0;
    while let Some(message) = stream.message().await? {
        bytes += message.encoded_len();
        if bytes > STREAM_BYTES {
            return Err(Status::resource_exhausted(format!(
                "a list of more than {STREAM_BYTES} bytes is too long"
            )));
        }
        messages.push(message);
    }
    Ok(messages)
}
