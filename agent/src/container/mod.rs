// SPDX-License-Identifier: Apache-2.0
//! The containers of this guest.
//!
//! [`Containers`] knows all of them, and [`crate::service`] calls it. Each operation has a file of its own. The
//! `operation` lock of a container serializes operations on it. Its state changes only in [`Containers::advance`],
//! which publishes the change to the watchers.

mod attach;
mod command;
mod create;
mod exec_stream;
mod exec_sync;
#[cfg(test)]
pub mod fakes;
mod freeze;
mod given;
mod launch;
mod pod_pids;
mod remove;
mod restore;
mod signal;
mod start;
pub mod state;
mod statistics;

use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bulkhead_proto::agent::{CreateContainerRequest, Identity, Process, Resources};
use tokio::io::unix::AsyncFd;
use tokio::sync::{RwLock, Semaphore, watch};

use crate::cgroup::{Cgroup, CgroupError};
use crate::disk::blocks::{BlockError, Blocks, MappedBlock};
use crate::disk::layers::{LayerError, Layers};
use crate::disk::overlay::{ImageView, Overlay, OverlayError};
use crate::init::config::{BindMount, GivenDevice};
use crate::reaper::Reaper;
use crate::seccomp::{Program, SeccompError};
use crate::statistics::writable::Counted;
use crate::streams::pump::Log;
use crate::users::PodUsers;
use crate::volumes::Volumes;
use crate::volumes::declared::DeclaredError;
use crate::volumes::mounts::MountError;
use state::{Event, IllegalMove, State};

pub use exec_sync::ExecRequest;
pub use freeze::CheckpointError;

const MAX_CONTAINERS: usize = 1024;
/// How many execs of both kinds may run at once.
const MAX_EXECS: usize = 256;
const MAX_ID_BYTES: usize = 128;

#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("{0}")]
    Invalid(String),
    #[error("container {0} does not exist")]
    NotFound(String),
    #[error("container {0} exists already")]
    Exists(String),
    #[error("too many {0}")]
    TooMany(&'static str),
    #[error(transparent)]
    State(#[from] IllegalMove),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("mount layers")]
    Layers(#[from] LayerError),
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error("mount root file system")]
    Overlay(#[from] OverlayError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Declared(#[from] DeclaredError),
    #[error("cgroup of the container")]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("exec failed: {0}")]
    Exec(String),
    #[error("{what}")]
    System {
        what: &'static str,
        source: std::io::Error,
    },
}

impl ContainerError {
    fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// One container. [`create`] creates it, [`remove`] removes it.
#[derive(Debug)]
pub struct Container {
    /// By which the host knows it. Only a restore changes it.
    id: Mutex<String>,
    pub log: Arc<Log>,
    /// What it was created with. The id in it is the name of its directories and its cgroup, as long as it exists.
    spec: CreateContainerRequest,
    process: Process,
    seccomp: Program,
    cgroup: Cgroup,
    rootfs: PathBuf,
    mounts: Vec<BindMount>,
    devices: Vec<GivenDevice>,
    /// The block devices of the host that it uses.
    blocks: Mutex<Vec<MappedBlock>>,
    /// The images that it mounts as volumes.
    views: Mutex<Vec<ImageView>>,
    overlay: Mutex<Option<Overlay>>,
    state: Mutex<Versioned>,
    /// The pidfd of its first process, while that runs.
    pidfd: Mutex<Option<Arc<OwnedFd>>>,
    /// The user that its first process runs or ran as. Empty before it runs.
    pub identity: OnceLock<Identity>,
    /// The agent's end of its standard input. It is kept open so that the input does not end.
    stdin: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    /// The agent's side of its terminal, while the container runs.
    terminal: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    ended: watch::Sender<bool>,
    written: Counted,
    operation: tokio::sync::Mutex<()>,
}

/// A state, and the number of the change that led to it. All containers of the guest share one counter.
#[derive(Debug)]
struct Versioned {
    state: State,
    version: u64,
}

/// All containers of this guest. Clones share them.
#[derive(Clone, Debug)]
pub struct Containers {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    layers: Layers,
    blocks: Blocks,
    volumes: Volumes,
    users: PodUsers,
    reaper: Reaper,
    pod_pids: pod_pids::PodPids,
    /// The number of changes so far.
    changes: watch::Sender<u64>,
    execs: Arc<Semaphore>,
    phase: Arc<RwLock<freeze::Phase>>,
}

#[derive(Debug, Default)]
struct Known {
    containers: BTreeMap<String, Arc<Container>>,
    /// The ids of containers that are being created.
    reserved: HashSet<String>,
}

impl Containers {
    pub fn new(reaper: Reaper, volumes: Volumes, users: PodUsers) -> Self {
        Self {
            shared: Arc::new(Shared {
                known: Mutex::default(),
                layers: Layers::default(),
                blocks: Blocks::default(),
                volumes,
                users,
                reaper,
                pod_pids: pod_pids::PodPids::default(),
                changes: watch::Sender::new(0),
                execs: Arc::new(Semaphore::new(MAX_EXECS)),
                phase: Arc::default(),
            }),
        }
    }

    pub fn get(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let found = self.known().containers.get(id).cloned();
        found.ok_or_else(|| ContainerError::NotFound(id.to_owned()))
    }

    /// The volumes that containers may mount.
    pub fn volumes(&self) -> &Volumes {
        &self.shared.volumes
    }

    /// Notifies when [`Self::changed_since`] may return something new.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// The containers that changed after `version`, the oldest change first, and the newest version.
    pub fn changed_since(&self, version: u64) -> (Vec<(Arc<Container>, State)>, u64) {
        let containers: Vec<_> = self.known().containers.values().cloned().collect();
        let mut changed: Vec<_> = containers
            .into_iter()
            .filter_map(|container| {
                let (state, at) = container.snapshot();
                (at > version).then_some((at, container, state))
            })
            .collect();
        changed.sort_by_key(|(at, ..)| *at);
        let newest = changed.last().map_or(version, |(at, ..)| *at);
        (
            changed
                .into_iter()
                .map(|(_, container, state)| (container, state))
                .collect(),
            newest,
        )
    }

    pub fn update(
        &self,
        id: &str,
        resources: &Resources,
        oom_score_adj: Option<i32>,
    ) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        container.cgroup.update(resources)?;
        if let Some(score) = oom_score_adj {
            container.cgroup.set_oom_score_adj(score)?;
        }
        Ok(())
    }

    /// Kills all processes of all containers, for the end of the guest.
    pub fn kill_all(&self) {
        for container in self.known().containers.values() {
            container.cgroup.kill();
        }
    }

    fn advance(&self, container: &Container, event: Event) -> Result<State, IllegalMove> {
        let mut versioned = container.versioned();
        versioned.state = versioned.state.after(event)?;
        self.shared.changes.send_modify(|changes| {
            *changes += 1;
            versioned.version = *changes;
        });
        Ok(versioned.state.clone())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.shared
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Container {
    pub fn id(&self) -> String {
        let id = self.id.lock();
        id.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_id(&self, id: &str) {
        let place = self.id.lock();
        id.clone_into(&mut place.unwrap_or_else(PoisonError::into_inner));
    }

    /// The state and the number of the change that led to it.
    pub fn snapshot(&self) -> (State, u64) {
        let versioned = self.versioned();
        (versioned.state.clone(), versioned.version)
    }

    fn illegal(&self, event: &'static str) -> ContainerError {
        self.versioned().state.refuses(event).into()
    }

    fn running_pidfd(&self, event: &'static str) -> Result<Arc<OwnedFd>, ContainerError> {
        let pidfd = self
            .pidfd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        // A restored container has a process, which does not run yet.
        let runs = matches!(self.snapshot().0, State::Running { .. });
        pidfd.filter(|_| runs).ok_or_else(|| self.illegal(event))
    }

    fn stdin(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        let stdin = self.stdin.lock();
        stdin.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn terminal(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        let terminal = self.terminal.lock();
        terminal.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn versioned(&self) -> MutexGuard<'_, Versioned> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks an id, which becomes the name of a directory.
fn check_id(id: &str) -> Result<(), ContainerError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let starts_well = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if starts_well && id.len() <= MAX_ID_BYTES && id.bytes().all(plain) {
        return Ok(());
    }
    Err(ContainerError::Invalid(format!(
        "{id:?} is not a container id"
    )))
}

#[cfg(test)]
mod tests {
    use super::check_id;

    #[test]
    fn ids_are_safe_as_names_of_directories() {
        for good in ["a", "0123abc", "a-b_c.d"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-a", "a b", "ä", &"x".repeat(129)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }
}
