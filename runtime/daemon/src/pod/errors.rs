// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with pods and containers. `cri` gives each a gRPC code.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_faults::Fault;
pub use bulkhead_guest::agent::AgentError;
use bulkhead_guest::connect::ConnectError;
use bulkhead_host::cgroup::CgroupError;
use bulkhead_host::control::ControlError;
pub use bulkhead_host::launch::{LaunchError, TAKING_OVER};
pub use bulkhead_host::shares::ShareError;
use bulkhead_host::systemd::SystemdError;
use bulkhead_network::NetworkError;
use bulkhead_text::Problem;

use super::admission::NoTurn;
pub use super::checkpoint::CheckpointError;
use super::life::record::{ContainerRecord, PodRecord};
use super::life::state::IllegalMove;
use super::plan::program::ProgramError;
use super::plan::sizing::Unfit;
use super::volumes::VolumeError;
use super::volumes::block::BlockError;
use crate::descriptors::TooFew;
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
    #[error(
        "{image} is an artifact of type {artifact_type:?} and no container image, so no container can run it; it can \
         be mounted as an image volume"
    )]
    Artifact {
        image: String,
        artifact_type: String,
    },
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
    /// The guest could not execute the container's program.
    #[error("container {id}: {message}")]
    NotStarted { id: String, message: String },
    #[error("guest of pod {id}")]
    Guest { id: String, source: AgentError },
    #[error("{id}")]
    Stream { id: String, source: ConnectError },
    #[error("the VM of pod {id} ended meanwhile")]
    Lost { id: String },
    #[error("attach the container's layers or volumes to the disks of its VM")]
    Disk(#[from] ControlError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error(transparent)]
    Descriptors(#[from] TooFew),
    #[error("mount of the container")]
    Share(#[from] ShareError),
    #[error("store the state")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("run pod")]
    Boot(#[from] BootError),
    #[error("a {what} of pod {id} has not ended, though the pod's VM was killed")]
    Stuck { what: &'static str, id: String },
    #[error("pod {id} was removed meanwhile")]
    Gone { id: String },
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl PodError {
    pub fn not_found(what: &'static str, id: &str) -> Self {
        Self::NotFound {
            what,
            id: id.to_owned(),
        }
    }

    /// The error for a pod whose state does not allow `event`.
    pub fn pod_is(pod: &PodRecord, event: &'static str) -> Self {
        Self::State {
            id: pod.id.clone(),
            source: pod.state.refuse(event),
        }
    }

    /// The error for a container whose state does not allow `event`.
    pub fn container_is(container: &ContainerRecord, event: &'static str) -> Self {
        Self::State {
            id: container.id.clone(),
            source: container.state.refuse(event),
        }
    }
}

/// Why a pod did not move to another state.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    #[error("{id}")]
    Illegal { id: String, source: IllegalMove },
    #[error("store the state")]
    Store(#[from] StoreError),
}

impl From<MoveError> for PodError {
    fn from(error: MoveError) -> Self {
        match error {
            MoveError::Illegal { id, source } => Self::State { id, source },
            MoveError::Store(error) => Self::Store(error),
        }
    }
}

impl From<MoveError> for BootError {
    fn from(error: MoveError) -> Self {
        match error {
            MoveError::Illegal { source, .. } => Self::State(source),
            MoveError::Store(error) => Self::Store(error),
        }
    }
}

/// An error while a pod boots or is torn down.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("{0}")]
    Unready(Problem),
    #[error("directory {path} of the pod")]
    Directory { path: PathBuf, source: io::Error },
    #[error("not enough resources on this node")]
    Unfit(#[from] Unfit),
    #[error("network of the pod")]
    Network(#[from] NetworkError),
    #[error("scratch disk of the pod")]
    Scratch(#[from] ScratchError),
    #[error("duplicate the descriptor of the pod's TAP")]
    Tap(#[source] io::Error),
    #[error("a background task of the pod panicked; see the daemon's log")]
    Panicked,
    #[error("state of the pod")]
    State(#[source] IllegalMove),
    /// `waited` is how long the pod waited for its turn.
    #[error("start the VM of the pod, after it waited {waited:.1?} for its turn to boot")]
    Launch {
        waited: Duration,
        source: Box<LaunchError>,
    },
    #[error("too many pods boot")]
    NoTurn(#[from] NoTurn),
    /// Only a daemon with the systemd cgroup driver has this. Its caller can try again.
    #[error("cgroup of the VM")]
    Scope(#[source] SystemdError),
    #[error(
        "the VM cannot be bounded on this host: give the daemon the right to make cgroups and enable the controllers above \
         them (`bulkhead check` looks at it), or set `allow_unbounded_vms = true`"
    )]
    Unbounded(#[source] CgroupError),
    #[error("every user of `sandbox.first_uid` and `sandbox.uids` has a VM: raise `sandbox.uids`")]
    NoUser,
    #[error("there is no template for VMs of its size; the daemon's log says why")]
    NoTemplate,
    #[error("the caller has gone away")]
    Abandoned,
    #[error("configure the guest")]
    Configure(#[from] AgentError),
    /// Its VM has gone on from a template, but never became the pod's.
    #[error("the pod's VM was forked")]
    Fork(#[source] Box<BootError>),
    #[error("bring back what the checkpoint has")]
    BringBack(#[source] Box<PodError>),
    #[error("store the state of the pod")]
    Store(#[from] StoreError),
    #[error("process {pid} of the pod was killed but has not ended within {limit:?}")]
    Unkillable { pid: i32, limit: Duration },
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl BootError {
    /// Whether the pod may begin another way than from what it was to begin from.
    pub fn is_of_origin(&self) -> bool {
        matches!(
            self,
            Self::BringBack(_) | Self::Launch { .. } | Self::Configure(_)
        )
    }

    /// Whether the guest is gone or its agent does not speak any more, and not only refuses what the pod asks for.
    pub fn is_lost_guest(&self) -> bool {
        matches!(
            self,
            Self::Configure(AgentError::Lost { .. } | AgentError::Fault(_))
        )
    }
}

impl From<CgroupError> for BootError {
    fn from(error: CgroupError) -> Self {
        match error {
            CgroupError::Scope(error) => Self::Scope(error),
            other => Self::Unbounded(other),
        }
    }
}
