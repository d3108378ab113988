// SPDX-License-Identifier: Apache-2.0
//! Pods: who exists, and the way to the task that owns each.
//!
//! Every change of a pod or its containers is a request to the pod's [`owner`], handled there one at a time. Everyone
//! else reads the [`View`] that the owner published last, and so never waits for it. Waiting for something to
//! happen (a turn to boot, a graceful stop, an exec) is done here, in the caller's task, between requests.

pub mod admission;
pub mod adopt;
pub mod blocks;
mod boot;
pub mod capabilities;
mod containers;
mod cpulist;
mod errors;
mod limits;
mod logging;
mod news;
pub mod notices;
mod owner;
pub mod peaks;
pub mod program;
pub mod rates;
pub mod record;
mod registry;
mod resize;
mod shares;
pub mod signal;
pub mod sizing;
pub mod spec;
pub mod state;
pub mod statistics;
mod streams;
mod together;
pub mod volumes;
mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_guest::agent::ExecOutput;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::Cgroups;
use bulkhead_host::launch::Launcher;
use bulkhead_host::probe::Probe;
use bulkhead_network::Network;
use tokio::sync::oneshot;

use admission::{Admission, Patience};
pub use errors::{BootError, PodError};
pub use notices::{Notice, NoticeKind};
use owner::{Answer, Request};
use record::{ContainerRecord, PodRecord};
use registry::{Handle, Registry, Reservation, not_found};
use spec::{ContainerSpec, PodSpec, Resources};

use crate::clock::now;
use crate::random::new_id;
use crate::scratch::Scratch;
use crate::store::Store;
use volumes::Volumes;

/// How long a killed container may take to be reported dead.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What pods are made with.
#[derive(Debug)]
pub struct Host {
    pub run_pods: PathBuf,
    pub state_pods: PathBuf,
    /// The VM of a pod that asks for nothing.
    pub sizing: sizing::Defaults,
    pub admission: Admission,
    pub store: Store,
    pub network: Network,
    pub images: bulkhead_image::Store,
    pub launcher: Launcher,
    pub cgroups: Cgroups,
    pub scratch: Scratch,
    pub probe: Probe,
    pub volumes: Volumes,
}

/// What a pod's owner published last.
#[derive(Clone, Debug)]
pub struct View {
    pub pod: PodRecord,
    pub containers: BTreeMap<String, ContainerRecord>,
    /// `None`: no VM lives.
    pub guest: Option<Guest>,
}

/// All pods of this daemon. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Pods {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    host: Host,
    registry: Mutex<Registry>,
    rates: rates::Rates,
    peaks: peaks::Peaks,
    notices: notices::Notices,
}

impl Pods {
    pub fn new(host: Host) -> Self {
        Self {
            shared: Arc::new(Shared {
                host,
                registry: Mutex::default(),
                rates: rates::Rates::default(),
                peaks: peaks::Peaks::default(),
                notices: notices::Notices::default(),
            }),
        }
    }

    pub fn host(&self) -> &Host {
        &self.shared.host
    }

    /// Hears of everything that happens from now on.
    pub fn listen(&self) -> Result<notices::Listener, notices::TooManyListeners> {
        self.shared.notices.listen()
    }

    /// Makes a pod and waits until its guest is ready. A caller that goes away meanwhile takes the pod with it.
    pub async fn run(&self, spec: PodSpec, patience: Patience) -> Result<String, PodError> {
        self.host()
            .probe
            .ready()
            .await
            .map_err(BootError::Unready)?;
        let record = PodRecord {
            id: new_id(),
            created_at: now(),
            state: state::PodState::Creating,
            held: Vec::new(),
            addresses: Vec::new(),
            layers: BTreeMap::new(),
            size: sizing::VmSize::default(),
            allowance: sizing::Allowance::default(),
            mirrors: BTreeMap::new(),
            shares: Vec::new(),
            shares_made: 0,
            blocks: Vec::new(),
            disks: Some(BTreeMap::new()),
            spec,
        };
        let name = Reservation::of(&self.shared, &record)?;
        let turn = self.host().admission.turn(patience).await;
        let turn = turn.map_err(BootError::NoTurn)?;
        name.keep();
        let (answer, booted) = oneshot::channel();
        let id = record.id.clone();
        owner::start_new(Arc::clone(&self.shared), record, turn, answer);
        booted
            .await
            .map_err(|_| PodError::Gone { id: id.clone() })??;
        Ok(id)
    }

    /// Stops a pod; one that is not there is fine.
    pub async fn stop(&self, id: &str) -> Result<(), PodError> {
        self.ask_if_there(id, Request::StopPod).await
    }

    /// Removes a pod and all that it has; one that is not there is fine.
    pub async fn remove(&self, id: &str) -> Result<(), PodError> {
        self.ask_if_there(id, Request::RemovePod).await
    }

    async fn ask_if_there(
        &self,
        id: &str,
        request: impl FnOnce(Answer<()>) -> Request,
    ) -> Result<(), PodError> {
        let handle = match self.shared.pod(id) {
            Err(PodError::NotFound { .. }) => return Ok(()),
            handle => handle?,
        };
        match handle.ask(request).await {
            // It was removed meanwhile.
            Err(PodError::Gone { .. }) => Ok(()),
            answer => answer,
        }
    }

    /// What is known of a pod, by its id or a unique beginning of it.
    pub fn pod(&self, id: &str) -> Result<Arc<View>, PodError> {
        let view = self.shared.pod(id)?.view();
        if view.pod.state == state::PodState::Creating {
            return Err(PodError::NotFound {
                what: "pod",
                id: id.to_owned(),
            });
        }
        Ok(view)
    }

    /// All pods, oldest first. Those that are being made are not shown.
    pub fn all(&self) -> Vec<Arc<View>> {
        let registry = self.shared.registry();
        let mut views: Vec<_> = registry.pods.values().map(Handle::view).collect();
        drop(registry);
        views.retain(|view| view.pod.state != state::PodState::Creating);
        views.sort_by_key(|view| view.pod.created_at);
        views
    }

    /// What is known of a container, and of its pod.
    pub fn container(&self, id: &str) -> Result<(Arc<View>, ContainerRecord), PodError> {
        let (handle, id) = self.shared.container(id)?;
        let view = handle.view();
        let record = view.containers.get(&id).cloned();
        let record = record.ok_or_else(|| not_found("container", &id))?;
        Ok((view, record))
    }

    pub async fn create_container(
        &self,
        pod: &str,
        spec: ContainerSpec,
    ) -> Result<String, PodError> {
        let handle = self.shared.pod(pod)?;
        let spec = Box::new(spec);
        handle.ask(|answer| Request::Create { spec, answer }).await
    }

    pub async fn start_container(&self, id: &str) -> Result<(), PodError> {
        let (handle, id) = self.shared.container(id)?;
        handle.ask(|answer| Request::Start { id, answer }).await
    }

    /// Asks a container to end, and kills it after `grace`. One that is not there or has ended is fine.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), PodError> {
        let (handle, id) = match self.shared.container(id) {
            Err(PodError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let Some(signal) = handle.running(&id).map(|record| record.stop_signal) else {
            return Ok(());
        };
        if !grace.is_zero() {
            handle.signal(&id, signal).await?;
            if handle.exits_within(&id, grace).await {
                return Ok(());
            }
        }
        handle.signal(&id, signal::SIGKILL).await?;
        if handle.exits_within(&id, KILL_TIMEOUT).await {
            return Ok(());
        }
        Err(PodError::Stuck { id })
    }

    /// Removes a container, killing it if it runs; one that is not there is fine.
    pub async fn remove_container(&self, id: &str) -> Result<(), PodError> {
        let (handle, id) = match self.shared.container(id) {
            Err(PodError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        match handle.ask(|answer| Request::Remove { id, answer }).await {
            Err(PodError::NotFound { .. } | PodError::Gone { .. }) => Ok(()),
            answer => answer,
        }
    }

    pub async fn update_container(&self, id: &str, change: Resources) -> Result<(), PodError> {
        let (handle, id) = self.shared.container(id)?;
        let change = Box::new(change);
        handle
            .ask(|answer| Request::Update { id, change, answer })
            .await
    }

    /// Changes what a pod may use, within the VM that it has.
    pub async fn resize(
        &self,
        id: &str,
        resources: Resources,
        overhead: Resources,
    ) -> Result<(), PodError> {
        let handle = self.shared.pod(id)?;
        let change = Box::new((resources, overhead));
        handle
            .ask(|answer| Request::Resize { change, answer })
            .await
    }

    pub async fn reopen_log(&self, id: &str) -> Result<(), PodError> {
        let (handle, id) = self.shared.container(id)?;
        handle.ask(|answer| Request::ReopenLog { id, answer }).await
    }

    /// Runs a command in a running container until it ends. `limit` zero: however long it takes.
    pub async fn exec(
        &self,
        id: &str,
        args: Vec<String>,
        limit: Duration,
    ) -> Result<ExecOutput, PodError> {
        let (record, guest) = self.running(id, "exec")?;
        let (id, pod) = (record.id, record.pod_id);
        // A VM that dies ends the call, whatever the connection does.
        tokio::select! {
            output = guest.agent.exec(&id, args, limit) => {
                output.map_err(|source| PodError::Agent { id, source })
            }
            () = guest.process.ended() => Err(PodError::Lost { id: pod }),
        }
    }
}

#[cfg(test)]
pub mod fixtures;
