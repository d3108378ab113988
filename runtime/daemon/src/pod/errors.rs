// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with pods and containers. `cri` gives each a gRPC code.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use bulkhead_guest::agent::AgentError;
use bulkhead_guest::connect::ConnectError;
use bulkhead_host::control::ControlError;
pub use bulkhead_host::launch::LaunchError;
pub use bulkhead_host::shares::ShareError;
use bulkhead_host::systemd::SystemdError;
use bulkhead_network::NetworkError;
use bulkhead_text::Problem;

use super::admission::NoTurn;
use super::life::record::{ContainerRecord, PodRecord};
use super::life::state::IllegalMove;
use super::plan::program::ProgramError;
use super::plan::sizing::Unfit;
use super::volumes::VolumeError;
use super::volumes::block::BlockError;
use crate::logs::LogError;
use crate::scratch::ScratchError;
use crate::store::StoreError;

/// An error about a pod or one of its containers.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("no {what} {id}")]
    NotFound { what: &'static str, id: String },
    #[error("more than one {what} has an id that begins with {id}")]
    Ambiguous { what: &'static str, id: String },
    #[error("{what} {name} exists already as {holder}")]
    Exists {
        what: &'static str,
        name: String,
        holder: String,
    },
    #[error("{id}")]
    State { id: String, source: IllegalMove },
    #[error("container cannot be made")]
    Program(#[from] ProgramError),
    #[error("image {0} is not here: pull it first")]
    NoImage(String),
    #[error("image of the container")]
    Image(#[from] bulkhead_image::StoreError),
    #[error("image volume {image}")]
    ImageVolume {
        image: String,
        source: Box<PodError>,
    },
    #[error("container log")]
    Log(#[from] LogError),
    #[error("container {id}")]
    Agent { id: String, source: AgentError },
    /// Its program could not be executed.
    #[error("container {id}: {message}")]
    NotStarted { id: String, message: String },
    #[error("guest of pod {id}")]
    Guest { id: String, source: AgentError },
    #[error("{id}")]
    Stream { id: String, source: ConnectError },
    #[error("the VM of pod {id} ended meanwhile")]
    Lost { id: String },
    #[error("put what the container needs on the disks of its VM")]
    Disk(#[from] ControlError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("mount of the container")]
    Share(#[from] ShareError),
    #[error("remember the state")]
    Store(#[from] StoreError),
    #[error("run pod")]
    Boot(#[from] BootError),
    #[error("container {id} does not end though it was killed")]
    Stuck { id: String },
    #[error("pod {id} was removed meanwhile")]
    Gone { id: String },
}

impl PodError {
    pub fn not_found(what: &'static str, id: &str) -> Self {
        Self::NotFound {
            what,
            id: id.to_owned(),
        }
    }

    /// The pod is not in a state in which `event` is possible.
    pub fn pod_is(pod: &PodRecord, event: &'static str) -> Self {
        Self::State {
            id: pod.id.clone(),
            source: pod.state.refuse(event),
        }
    }

    /// The container is not in a state in which `event` is possible.
    pub fn container_is(container: &ContainerRecord, event: &'static str) -> Self {
        Self::State {
            id: container.id.clone(),
            source: container.state.refuse(event),
        }
    }
}

/// An error on the way to a pod that is ready, or back from it.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("{0}")]
    Unready(Problem),
    #[error("directory {path} of the pod")]
    Directory { path: PathBuf, source: io::Error },
    #[error("no room")]
    Unfit(#[from] Unfit),
    #[error("network of the pod")]
    Network(#[from] NetworkError),
    #[error("scratch disk of the pod")]
    Scratch(#[from] ScratchError),
    #[error("a thread that worked for the pod has panicked")]
    Panicked,
    /// `waited`: for its turn.
    #[error("VM of the pod, whose turn came after {waited:.1?}")]
    Launch {
        waited: Duration,
        source: Box<LaunchError>,
    },
    #[error("too many pods boot")]
    NoTurn(#[from] NoTurn),
    #[error("cgroup of the VM")]
    Scope(#[from] SystemdError),
    #[error("nobody waits for the pod any more")]
    Abandoned,
    #[error("configure the guest")]
    Configure(#[from] AgentError),
    #[error("remember the state of the pod")]
    Store(#[from] StoreError),
    #[error("VMM process {pid} does not end within {limit:?} though it was killed")]
    Unkillable { pid: i32, limit: Duration },
}
