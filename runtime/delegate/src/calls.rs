// SPDX-License-Identifier: Apache-2.0
//! How long a call may take, by its kind.

use std::time::Duration;

use prost::Message;
use tonic::{Status, Streaming};

/// How long calls may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A list. kubelet lists every second, and Bulkhead's pods are in the same answer.
    pub list: Duration,
    /// What all pods use. One container that hangs can delay that.
    pub measure: Duration,
    /// What concerns one pod or container.
    pub read: Duration,
    /// A change whose caller does not say how long it waits. kubelet waits four minutes for RunPodSandbox.
    pub change: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            list: Duration::from_secs(2),
            measure: Duration::from_secs(4),
            read: Duration::from_secs(10),
            change: Duration::from_secs(4 * 60),
        }
    }
}

/// The longest streamed list.
const STREAM_BYTES: usize = 64 << 20;

/// The kind of a call, which says how long it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Asked of every side for one answer.
    List,
    /// The same for statistics and metrics.
    Measure,
    /// Changes nothing, and concerns one pod, container or image.
    Read,
    /// Takes as long as its caller waits.
    Change(Option<Duration>),
    /// A stream that does not end by itself.
    Endless,
}

impl Limit {
    pub(crate) fn duration(self, limits: &Limits) -> Option<Duration> {
        match self {
            Self::List => Some(limits.list),
            Self::Measure => Some(limits.measure),
            Self::Read => Some(limits.read),
            Self::Change(caller) => Some(caller.unwrap_or(limits.change)),
            Self::Endless => None,
        }
    }

    /// Whether a call that was not answered in time shows that the server is slow. Changes and measurements take their
    /// time.
    pub(crate) fn shows_health(self) -> bool {
        matches!(self, Self::List | Self::Read)
    }

    /// Whether the call may be repeated if the connection broke.
    pub(crate) fn may_repeat(self) -> bool {
        matches!(self, Self::List | Self::Measure | Self::Read)
    }
}

/// Reads a streamed list to its end. Its size is bounded.
pub(crate) async fn collect<M: Message + Default>(
    mut stream: Streaming<M>,
) -> Result<Vec<M>, Status> {
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
