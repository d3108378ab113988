// SPDX-License-Identifier: Apache-2.0
//! The messages to a pod's owner, and the channel for each answer.

use tokio::sync::oneshot;

use super::checkpoint::Wanted;
use super::errors::PodError;
use super::life::spec::{ContainerSpec, Resources};

pub type Answer<T> = oneshot::Sender<Result<T, PodError>>;

/// A message to a pod's owner.
#[derive(Debug)]
pub enum Request {
    StopPod(Answer<()>),
    RemovePod(Answer<()>),
    Create {
        spec: Box<ContainerSpec>,
        answer: Answer<String>,
    },
    Start {
        id: String,
        answer: Answer<()>,
    },
    /// The stop signal of a container, unless it has had it already.
    SignalStop {
        id: String,
        answer: Answer<()>,
    },
    Signal {
        id: String,
        signal: i32,
        answer: Answer<()>,
    },
    Remove {
        id: String,
        answer: Answer<()>,
    },
    Update {
        id: String,
        change: Box<Resources>,
        answer: Answer<()>,
    },
    Resize {
        /// The resources of all containers together, and the overhead.
        change: Box<(Resources, Resources)>,
        answer: Answer<()>,
    },
    /// Saves the pod into a directory.
    Checkpoint {
        wanted: Wanted,
        answer: Answer<()>,
    },
    ReopenLog {
        id: String,
        answer: Answer<()>,
    },
}
