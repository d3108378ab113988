// SPDX-License-Identifier: Apache-2.0
//! Pods: which exist, and the way to the task that owns each.
//!
//! This file is the entrance, [`Pods`]. [`streams`] adds to it what streaming needs, [`status`] what the node reports,
//! and [`adopt`] the start of the daemon. [`clocks`] keeps the time of guests. Every change of a pod or its containers
//! is a [`request`] to the pod's [`owner`], which handles them one at a time; [`registry`] finds the owner. Everyone
//! else reads the [`View`] that the owner published last, and so never waits for the owner. What takes long (a turn to
//! boot, a graceful stop, an exec) is awaited here, in the caller's task, so that the owner can serve other requests
//! meanwhile.
//!
//! ```text
//! life       what pods and containers are: specs, states, records
//! plan       what is to be done for them, calculated before anything is done
//! volumes    what containers mount in addition to their images
//! checkpoint what is saved of a pod, and whether it fits what it is to be brought back as
//! warmed     the checkpoints as which new pods can begin
//! owner      the task that owns a pod, and all that only it does
//! readings   what pods and containers use
//! ```

pub mod admission;
mod adopt;
pub mod checkpoint;
mod clocks;
mod errors;
mod host;
pub mod life;
mod notices;
mod outputs;
mod owner;
pub mod plan;
pub mod readings;
mod registry;
mod request;
pub mod spares;
mod status;
mod strays;
mod streams;
pub mod templates;
pub mod users;
mod view;
pub mod volumes;
pub mod warmed;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_guest::agent::ExecOutput;
use bulkhead_text::chain;
use tokio::sync::oneshot;

use self::admission::Patience;
use self::checkpoint::{Saved, Wanted, fit};
pub use self::errors::{
    AgentError, BootError, CheckpointError, LaunchError, PodError, ShareError, TAKING_OVER,
};
pub use self::host::Host;
use self::host::Shared;
use self::life::record::{ContainerRecord, PodRecord};
use self::life::signal;
use self::life::spec::{ContainerSpec, PodName, PodSpec, Resources};
use self::life::state::PodState;
pub use self::notices::{Listener, Notice, NoticeKind, TooManyListeners};
use self::owner::{BringBack, Way};
use self::readings::{Depth, Reading};
use self::registry::Reservation;
use self::request::{Answer, Request};
pub use self::view::View;
use crate::clock::now;
use crate::descriptors;
use crate::random::new_id;

/// A pod's pidfds, control and agent connections, and pipes, and what a boot needs for a moment.
const POD_DESCRIPTORS: usize = 32;
/// A container's logs and its streams to the guest, and what their start needs for a moment.
const CONTAINER_DESCRIPTORS: usize = 16;
/// How long a checkpoint may take whose caller sets no limit.
const LONGEST_CHECKPOINT: Duration = Duration::from_secs(600);
/// How long a killed container may take to be reported dead, before its guest is killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the stop or removal of a pod may take, before the guest is killed. A guest with data to write gets 20 s for
/// that.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// All pods of this daemon. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Pods {
    shared: Arc<Shared>,
}

impl Pods {
    /// `spares` is how many VMs are kept ready for pods to come.
    pub fn new(host: Host, spares: usize) -> Self {
        Self {
            shared: Arc::new(Shared::new(host, spares)),
        }
    }

    /// Subscribes to all events from now on.
    pub fn listen(&self) -> Result<Listener, TooManyListeners> {
        self.shared.notices.listen()
    }

    /// Makes a pod and waits until its guest is ready. If the caller goes away meanwhile, the pod is removed.
    /// One that is to begin as a warmed pod and cannot begins as any other.
    pub async fn run(&self, spec: PodSpec, patience: Patience) -> Result<String, PodError> {
        if let Some(from) = self.find_warmed(&spec).await {
            let way = Way::Saved(Box::new(from));
            // Half of the time is left for another beginning.
            match self.begin(spec.clone(), way, patience.half()).await {
                Err(PodError::Boot(error)) if error.is_of_origin() => {
                    self.begins_cold(&spec.name, &error);
                }
                done => {
                    if done.is_ok() {
                        self.shared.host.warmed.count_pod(true);
                    }
                    return done;
                }
            }
        }
        match self.begin(spec.clone(), Way::Any, patience).await {
            Err(PodError::Boot(error @ BootError::Fork(_))) => {
                let why = chain(&error);
                tracing::warn!(
                    pod = spec.name.name,
                    namespace = spec.name.namespace,
                    "the pod's VM was forked and lost, so it boots: {why}"
                );
                self.begin(spec, Way::Boot, patience).await
            }
            done => done,
        }
    }

    /// The warmed pod as which this one is to begin, if it names one that it can have.
    async fn find_warmed(&self, spec: &PodSpec) -> Option<BringBack> {
        let (shared, wanted) = (Arc::clone(&self.shared), spec.clone());
        let found = tokio::task::spawn_blocking(move || shared.host.warmed.find(&wanted)).await;
        match found.map_err(|_| CheckpointError::Panicked).flatten() {
            Ok(saved) => saved.map(BringBack::warmed),
            Err(error) => {
                self.begins_cold(&spec.name, &error);
                None
            }
        }
    }

    fn begins_cold(&self, name: &PodName, why: &dyn std::error::Error) {
        self.shared.host.warmed.count_pod(false);
        let why = chain(why);
        tracing::warn!(
            pod = name.name,
            namespace = name.namespace,
            "the pod cannot begin as the warmed pod that it names, so it begins as any other: {why}"
        );
    }

    /// Saves a pod into a directory, with the containers with these ids, which must be all that run. It goes on afterwards,
    /// also if that fails, and if the caller goes away.
    pub async fn checkpoint(
        &self,
        id: &str,
        directory: PathBuf,
        containers: Vec<String>,
        patience: Patience,
    ) -> Result<(), PodError> {
        let handle = self.shared.registry.pod(id)?;
        let wanted = Wanted {
            directory,
            containers,
            until: patience.boot_until(LONGEST_CHECKPOINT),
        };
        handle
            .ask(|answer| Request::Checkpoint { wanted, answer })
            .await
    }

    /// Brings a pod back from a checkpoint. Its containers are created and have not executed anything; returns its id, and
    /// their names and ids. If the caller goes away meanwhile, the pod is removed.
    pub async fn restore(
        &self,
        saved: Saved,
        spec: PodSpec,
        containers: Vec<ContainerSpec>,
        patience: Patience,
    ) -> Result<(String, Vec<(String, String)>), PodError> {
        fit::pod(&saved.manifest.pod.spec, &spec)?;
        let fitting = fit::containers(&saved.manifest.containers, containers)?;
        let with_id = |(was, spec): (ContainerRecord, ContainerSpec)| (was, spec, new_id());
        let containers: Vec<_> = fitting.into_iter().map(with_id).collect();
        let named = containers.iter();
        let named = named.map(|(_, spec, id)| (spec.name.clone(), id.clone()));
        let named = named.collect();
        let from = BringBack {
            saved,
            containers,
            is_warmed: false,
        };
        let way = Way::Saved(Box::new(from));
        let id = self.begin(spec, way, patience).await?;
        Ok((id, named))
    }

    async fn begin(&self, spec: PodSpec, way: Way, patience: Patience) -> Result<String, PodError> {
        descriptors::check(POD_DESCRIPTORS)?;
        self.can_run().await.map_err(BootError::Unready)?;
        let record = PodRecord::new(new_id(), now(), spec);
        let name = Reservation::of(&self.shared.registry, &record)?;
        let turn = self.shared.host.admission.turn(patience).await;
        let turn = turn.map_err(BootError::NoTurn)?;
        name.keep();
        let (answer, booted) = oneshot::channel();
        let id = record.id.clone();
        owner::start_new(Arc::clone(&self.shared), record, way, turn, answer);
        booted
            .await
            .map_err(|_| PodError::Gone { id: id.clone() })??;
        Ok(id)
    }

    /// Keeps VMs ready for pods to come. It never returns.
    pub async fn keep_spares(self) {
        if !self.shared.spares.is_off() {
            owner::keep_spares(self.shared).await;
        }
    }

    /// Ends the VMs that are ready for pods to come.
    pub async fn end_spares(&self) {
        owner::end_spares(&self.shared).await;
    }

    /// Stops a pod. A pod that does not exist is no error. A guest that drags that out is killed.
    pub async fn stop(&self, id: &str) -> Result<(), PodError> {
        self.finish(id, Request::StopPod).await
    }

    /// Removes a pod and all that it has. A pod that does not exist is no error. A guest that drags that out is killed.
    pub async fn remove(&self, id: &str) -> Result<(), PodError> {
        self.finish(id, Request::RemovePod).await
    }

    async fn finish(
        &self,
        id: &str,
        request: impl FnOnce(Answer<()>) -> Request + Send + 'static,
    ) -> Result<(), PodError> {
        let handle = match self.shared.registry.pod(id) {
            Err(PodError::NotFound { .. }) => return Ok(()),
            handle => handle?,
        };
        let gone = PodError::Gone { id: id.to_owned() };
        // In a task of its own, because the limit also holds for a guest whose pod's caller has gone away.
        let ended = tokio::spawn(async move {
            let asked = handle.ask(request);
            handle.insist(asked, STOP_TIMEOUT, "pod").await
        });
        match ended.await.unwrap_or(Err(gone)) {
            // It was removed meanwhile.
            Err(PodError::Gone { .. }) => Ok(()),
            answer => answer,
        }
    }

    /// The view of a pod, found by its id or a unique prefix of it.
    pub fn pod(&self, id: &str) -> Result<Arc<View>, PodError> {
        let view = self.shared.registry.pod(id)?.view();
        if view.pod.state == PodState::Creating {
            return Err(PodError::NotFound {
                what: "pod",
                id: id.to_owned(),
            });
        }
        Ok(view)
    }

    /// All pods, oldest first, except those that still boot.
    pub fn all(&self) -> Vec<Arc<View>> {
        let mut views = self.shared.registry.views();
        views.retain(|view| view.pod.state != PodState::Creating);
        views.sort_by_key(|view| view.pod.created_at);
        views
    }

    /// Reads what one pod uses. It is an error if its guest does not answer.
    pub async fn read(&self, view: Arc<View>, depth: Depth) -> Result<Reading, PodError> {
        self.shared.readings.read(view, depth).await
    }

    /// Reads what pods use, all at the same time. Pods that are not ready, or whose guest does not answer, are left
    /// out.
    pub async fn read_all(&self, views: Vec<Arc<View>>, depth: Depth) -> Vec<Reading> {
        let all = self.all();
        let ids: HashSet<&str> = all
            .iter()
            .flat_map(|view| view.containers.keys().chain([&view.pod.id]))
            .map(String::as_str)
            .collect();
        self.shared.readings.keep(&ids);
        self.shared.readings.read_all(views, depth).await
    }

    /// The record of a container, and the view of its pod.
    pub fn container(&self, id: &str) -> Result<(Arc<View>, ContainerRecord), PodError> {
        let (handle, id) = self.shared.registry.container(id)?;
        let view = handle.view();
        let record = view.container(&id)?.clone();
        Ok((view, record))
    }

    pub async fn create_container(
        &self,
        pod: &str,
        spec: ContainerSpec,
    ) -> Result<String, PodError> {
        descriptors::check(CONTAINER_DESCRIPTORS)?;
        let handle = self.shared.registry.pod(pod)?;
        let spec = Box::new(spec);
        let _first = self.shared.host.admission.container();
        handle.ask(|answer| Request::Create { spec, answer }).await
    }

    pub async fn start_container(&self, id: &str) -> Result<(), PodError> {
        let (handle, id) = self.shared.registry.container(id)?;
        let _first = self.shared.host.admission.container();
        handle.ask(|answer| Request::Start { id, answer }).await
    }

    /// Sends the container its stop signal, and kills it after `grace`. Of several stops at once, only the first sends
    /// the signal, and the one whose grace ends first kills. A container that does not exist or has ended is no error. A
    /// guest that drags that out is killed, so the container has ended in any case.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), PodError> {
        let (handle, id) = match self.shared.registry.container(id) {
            Err(PodError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        if handle.running(&id).is_none() {
            return Ok(());
        }
        let stopping = async {
            if !grace.is_zero() {
                sent(handle.signal_stop(&id).await)?;
                if handle.exits_within(&id, grace).await {
                    return Ok(());
                }
            }
            sent(handle.signal(&id, signal::SIGKILL).await)?;
            handle.exits_within(&id, Duration::MAX).await;
            Ok(())
        };
        let limit = grace.saturating_add(KILL_TIMEOUT);
        handle.insist(stopping, limit, "container").await
    }

    /// Removes a container, and kills it first if it runs. A container that does not exist is no error.
    pub async fn remove_container(&self, id: &str) -> Result<(), PodError> {
        let (handle, id) = match self.shared.registry.container(id) {
            Err(PodError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let removing = handle.ask(|answer| Request::Remove { id, answer });
        match removing.await {
            Err(PodError::NotFound { .. } | PodError::Gone { .. }) => Ok(()),
            answer => answer,
        }
    }

    pub async fn update_container(&self, id: &str, change: Resources) -> Result<(), PodError> {
        let (handle, id) = self.shared.registry.container(id)?;
        let change = Box::new(change);
        handle
            .ask(|answer| Request::Update { id, change, answer })
            .await
    }

    /// Changes what a pod may use, up to the largest size of its VM.
    pub async fn resize(
        &self,
        id: &str,
        resources: Resources,
        overhead: Resources,
    ) -> Result<(), PodError> {
        let handle = self.shared.registry.pod(id)?;
        let change = Box::new((resources, overhead));
        handle
            .ask(|answer| Request::Resize { change, answer })
            .await
    }

    pub async fn reopen_log(&self, id: &str) -> Result<(), PodError> {
        let (handle, id) = self.shared.registry.container(id)?;
        handle.ask(|answer| Request::ReopenLog { id, answer }).await
    }

    /// Runs a command in a running container until it ends. A `limit` of zero means no time limit.
    pub async fn exec(
        &self,
        id: &str,
        args: Vec<String>,
        limit: Duration,
    ) -> Result<ExecOutput, PodError> {
        let (record, guest) = self.running(id, "exec")?;
        let (id, pod) = (record.id, record.pod_id);
        let room = self.shared.outputs.take();
        // If the VM dies, the call ends, even if the connection to it does not break.
        tokio::select! {
            output = guest.agent.exec(&id, args, limit, room.bytes) => {
                output.map_err(|source| PodError::Agent { id, source })
            }
            () = guest.process.ended() => Err(PodError::Lost { id: pod }),
        }
    }
}

/// The result of a signal to a container that is to end. A guest that refuses it or does not answer is waited for all
/// the same: at its limit the stop kills the VM, which ends the container too.
fn sent(result: Result<(), PodError>) -> Result<(), PodError> {
    match result {
        Err(PodError::Agent { .. }) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
pub mod fixtures;
