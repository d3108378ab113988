// SPDX-License-Identifier: Apache-2.0
//! What is asked of a pod's owner, and the way back of its answers.

use tokio::sync::oneshot;

use super::errors::PodError;
use super::life::spec::{ContainerSpec, Resources};

pub type Answer<T> = oneshot::Sender<Result<T, PodError>>;

/// What is asked of a pod.
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
        /// Of the containers together, and the overhead.
        change: Box<(Resources, Resources)>,
        answer: Answer<()>,
    },
    ReopenLog {
        id: String,
        answer: Answer<()>,
    },
}
