// SPDX-License-Identifier: Apache-2.0
//! What a pod's owner does with its containers.

use std::collections::BTreeMap;
use std::time::Duration;

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_guest::watch::News;
use bulkhead_host::control::Extent;
use bulkhead_host::{Guest, control};
use bulkhead_image::Image;

use super::blocks::{self, OpenBlock};
use super::boot::{hostname, killed};
use super::limits::check_placement;
pub use super::logging::LogTask;
use super::owner::{Answer, Owner};
use super::record::ContainerRecord;
use super::spec::{ContainerSpec, PidMode, Resources};
use super::state::{ContainerEvent, ContainerState, IllegalMove, PodState};
use super::volumes::mounting::{FoundMount, empty_dirs, termination_log};
use super::{NoticeKind, PodError, not_found, program, signal};
use crate::clock::now;
use crate::logs::{self, LogFile, Reopen};
use crate::random::new_id;
use crate::store::Kind;

/// How long the news of a failed start may take; they have its exit code.
const START_NEWS: Duration = Duration::from_secs(3);
/// A start that failed for a reason that nobody named.
const START_FAILED_EXIT_CODE: i32 = 128;

/// What of the host a container is to have.
struct Parts {
    mounts: Vec<FoundMount>,
    opened: Vec<OpenBlock>,
}

impl Owner {
    /// Makes a container; returns its id.
    pub(super) async fn create(&mut self, mut spec: ContainerSpec) -> Result<String, PodError> {
        let guest = self.ready_guest("a new container")?;
        self.check_name(&spec)?;
        check_placement(&spec.resources)?;
        self.resolve_target(&mut spec)?;
        let images = &self.shared.host.images;
        let image = images.find(&spec.image)?;
        let image = image.ok_or_else(|| PodError::NoImage(spec.image.clone()))?;
        let id = new_id();
        let name = hostname(&self.pod.id, &self.pod.spec);
        let mut request = program::describe(&id, &spec, &image.defaults, &name)?;
        self.make_room(&guest, &id, &spec.resources).await?;
        let opened = blocks::open(&spec.block_devices)?;
        let mounts = self.find_mounts(&id, &mut spec.mounts)?;
        let mut record = self.container_record(&id, spec, &image)?;
        record.termination_log = termination_log(&mounts);
        record.empty_dirs = empty_dirs(&mounts);
        // The record comes first: a lease without a record is given back at the next start.
        self.store(Kind::Container, &id, &record)?;
        let parts = Parts { mounts, opened };
        let resources = record.spec.resources.clone();
        let made = self
            .make(&guest, &image, parts, &resources, &mut request)
            .await;
        if let Err(error) = made {
            self.unmake(&guest, &record).await;
            return Err(error);
        }
        self.containers.insert(id.clone(), record);
        self.place();
        self.publish();
        self.notify(NoticeKind::Created, &id);
        Ok(id)
    }

    async fn make(
        &mut self,
        guest: &Guest,
        image: &Image,
        parts: Parts,
        resources: &Resources,
        request: &mut protocol::CreateContainerRequest,
    ) -> Result<(), PodError> {
        self.limit_together(guest, &request.id, resources).await?;
        request.layers = self.attach_image(guest, image, &request.id).await?;
        self.attach_blocks(guest, parts.opened, request).await?;
        self.prepare_mounts(guest, parts.mounts, request).await?;
        let created = guest.agent.create(request.clone()).await;
        created.map_err(|source| PodError::Agent {
            id: request.id.clone(),
            source,
        })
    }

    /// Keeps an image's layers for a container and puts those on the image disk that are not there yet; bottom first.
    pub(super) async fn attach_image(
        &mut self,
        guest: &Guest,
        image: &Image,
        holder: &str,
    ) -> Result<Vec<protocol::Layer>, PodError> {
        let images = &self.shared.host.images;
        let mut attached = Vec::new();
        for layer in images.lease(image.id.as_str(), holder)? {
            let extent = match self.pod.layers.get(&layer.diff_id) {
                Some(extent) => *extent,
                None => {
                    let extent = control::attach(&guest.files.control(), &layer.path).await?;
                    self.change_pod(|pod| {
                        pod.layers.insert(layer.diff_id.clone(), extent);
                    })?;
                    extent
                }
            };
            let Extent {
                first_sector,
                sectors,
            } = extent;
            attached.push(protocol::Layer {
                first_sector,
                sectors,
            });
        }
        Ok(attached)
    }

    /// Undoes a creation that failed.
    async fn unmake(&mut self, guest: &Guest, record: &ContainerRecord) {
        let id = &record.id;
        if let Err(error) = guest.agent.remove(id).await {
            self.complain("undo a container in the guest", &error);
        }
        self.give_back_hugepages(guest, id, &record.spec.resources)
            .await;
        self.remove_own_volumes(guest, record).await;
        self.unshare(id).await;
        self.detach_blocks(id).await;
        if let Err(error) = self.forget_container(id) {
            self.complain("undo a container", &error);
        }
    }

    fn container_record(
        &self,
        id: &str,
        spec: ContainerSpec,
        image: &Image,
    ) -> Result<ContainerRecord, PodError> {
        let stop_signal = spec
            .stop_signal
            .or_else(|| signal::parse(&image.defaults.stop_signal))
            .unwrap_or(signal::SIGTERM);
        Ok(ContainerRecord {
            id: id.to_owned(),
            pod_id: self.pod.id.clone(),
            log_path: logs::log_path(&self.pod.spec.log_directory, &spec.log_path)?,
            spec,
            state: ContainerState::Created,
            created_at: now(),
            image_id: image.id.to_string(),
            image_ref: image
                .repo_digests
                .first()
                .cloned()
                .unwrap_or_else(|| image.id.to_string()),
            stop_signal,
            termination_log: None,
            empty_dirs: BTreeMap::new(),
            user: None,
        })
    }

    /// Starts a container. One that cannot run has exited after this, with the code that says why.
    pub(super) async fn start(&mut self, id: &str) -> Result<(), PodError> {
        let record = self.container(id)?;
        let illegal = |event| PodError::State {
            id: id.to_owned(),
            source: IllegalMove {
                subject: "container",
                state: record.state.name(),
                event,
            },
        };
        if record.state != ContainerState::Created {
            return Err(illegal("start"));
        }
        let (id, path) = (record.id.clone(), record.log_path.clone());
        let guest = self.ready_guest("start of a container")?;
        match guest.agent.start(&id).await {
            Ok((pid, user)) => {
                let log = LogTask::start(guest.files.vsock(), id.clone(), path);
                self.logs.insert(id.clone(), log);
                self.is_user(&id, user);
                self.happened(&id, &ContainerEvent::Started { pid, at: now() });
                Ok(())
            }
            Err(source) => {
                // Clients look for a log of whatever was started.
                if let Err(error) = LogFile::new(path).open() {
                    self.complain("make a log", &error);
                }
                let event = self.why_not_started(&id, &source).await;
                self.happened(&id, &event);
                Err(PodError::Agent { id, source })
            }
        }
    }

    async fn why_not_started(&mut self, id: &str, error: &AgentError) -> ContainerEvent {
        let told = match error {
            AgentError::Refused { .. } => self.news_of_failed_start(id).await,
            // Who did not answer has no news either.
            _ => None,
        };
        let (code, message, at) = told.unwrap_or((START_FAILED_EXIT_CODE, String::new(), now()));
        ContainerEvent::StartFailed {
            code,
            message: if message.is_empty() {
                error.to_string()
            } else {
                message
            },
            at,
        }
    }

    /// The exit code of a failed start comes with the news.
    async fn news_of_failed_start(&mut self, id: &str) -> Option<(i32, String, i64)> {
        let deadline = tokio::time::Instant::now() + START_NEWS;
        loop {
            match tokio::time::timeout_at(deadline, self.news.recv())
                .await
                .ok()??
            {
                News::Exited {
                    id: about,
                    code,
                    message,
                    finished_at,
                    ..
                } if about == id => return Some((code, message, finished_at)),
                news => self.take_news(news),
            }
        }
    }

    /// Signals a container; one that does not run is fine.
    pub(super) async fn signal(&mut self, id: &str, signal: i32) -> Result<(), PodError> {
        let running = self.container(id)?.state.is_running();
        let Some(guest) = self.guest.clone().filter(|_| running) else {
            return Ok(());
        };
        let signalled = guest.agent.signal(id, signal).await;
        signalled.map_err(|source| PodError::Agent {
            id: id.to_owned(),
            source,
        })
    }

    /// Kills what is left of a container, and forgets it.
    pub(super) async fn remove(&mut self, id: &str) -> Result<(), PodError> {
        let running = self.container(id)?.state.is_running();
        if let Some(guest) = self.guest.clone() {
            let failed = |source| PodError::Agent {
                id: id.to_owned(),
                source,
            };
            if running {
                guest
                    .agent
                    .signal(id, signal::SIGKILL)
                    .await
                    .map_err(failed)?;
            }
            LogTask::rest_of(self.logs.get(id)).await;
            guest.agent.remove(id).await.map_err(failed)?;
            self.remove_own_volumes(&guest, self.container(id)?).await;
        }
        self.unshare(id).await;
        self.detach_blocks(id).await;
        self.happened(id, &killed());
        let resources = self.container(id)?.spec.resources.clone();
        self.forget_container(id)?;
        if let Some(guest) = self.guest.clone() {
            self.give_back_hugepages(&guest, id, &resources).await;
        }
        Ok(())
    }

    /// Gives back what a container holds on the host, and forgets it: lease, record, memory.
    pub(super) fn forget_container(&mut self, id: &str) -> Result<(), PodError> {
        let host = &self.shared.host;
        tokio::task::block_in_place(|| {
            host.images.release(id)?;
            host.store.remove(Kind::Container, id)?;
            Ok::<_, PodError>(())
        })?;
        self.logs.remove(id);
        if self.containers.remove(id).is_some() {
            self.place();
            self.publish();
            self.notify(NoticeKind::Deleted, id);
        }
        Ok(())
    }

    /// Changes limits, in the guest and in the record.
    pub(super) async fn update(&mut self, id: &str, change: &Resources) -> Result<(), PodError> {
        check_placement(change)?;
        let mut record = self.container(id)?.clone();
        record.spec.resources.update(change);
        let limits = program::resources(&record.spec.resources)?;
        let score = (change.oom_score_adj != 0).then(|| program::oom_score_adj(change));
        let guest = self.guest.clone().filter(|_| !record.state.is_exited());
        let guest = guest.ok_or_else(|| PodError::State {
            id: id.to_owned(),
            source: IllegalMove {
                subject: "container",
                state: record.state.name(),
                event: "an update",
            },
        })?;
        self.make_room(&guest, id, &record.spec.resources).await?;
        self.reserve_hugepages(&guest, id, &record.spec.resources)
            .await?;
        let updated = guest.agent.update(id, limits, score).await;
        if updated.is_err() {
            self.keep_known_hugepages(&guest).await;
        }
        updated.map_err(|source| PodError::Agent {
            id: id.to_owned(),
            source,
        })?;
        self.store(Kind::Container, id, &record)?;
        self.containers.insert(id.to_owned(), record);
        self.place();
        self.publish();
        Ok(())
    }

    /// Has the log's task open its file again. The answer comes from there.
    pub(super) fn reopen_log(&mut self, id: &str, answer: Answer<()>) {
        let record = match self.container(id) {
            Ok(record) => record,
            Err(error) => return drop(answer.send(Err(error))),
        };
        let not_running = PodError::State {
            id: id.to_owned(),
            source: IllegalMove {
                subject: "container",
                state: record.state.name(),
                event: "reopening the log",
            },
        };
        let log = self.logs.get(id).filter(|_| record.state.is_running());
        let (reopen, reopened) = tokio::sync::oneshot::channel();
        let reopen: Reopen = reopen;
        match log.map(|log| log.reopen(reopen)) {
            Some(Ok(())) => {
                tokio::spawn(async move {
                    let result = match reopened.await {
                        Ok(result) => result.map_err(PodError::from),
                        // The log came to its end meanwhile.
                        Err(_) => Ok(()),
                    };
                    let _ = answer.send(result);
                });
            }
            Some(Err(_)) | None => drop(answer.send(Err(not_running))),
        }
    }

    /// Follows the logs of containers that an earlier daemon started.
    pub(super) fn follow_logs(&mut self, guest: &Guest) {
        let started = self.containers.values();
        let started = started.filter(|one| one.state != ContainerState::Created);
        let tasks: Vec<_> = started
            .map(|one| {
                let (id, path) = (one.id.clone(), one.log_path.clone());
                (id.clone(), LogTask::start(guest.files.vsock(), id, path))
            })
            .collect();
        self.logs.extend(tasks);
    }

    fn container(&self, id: &str) -> Result<&ContainerRecord, PodError> {
        self.containers
            .get(id)
            .ok_or_else(|| not_found("container", id))
    }

    /// The guest, if the pod is one that can run something.
    pub(super) fn ready_guest(&self, event: &'static str) -> Result<Guest, PodError> {
        match (&self.pod.state, &self.guest) {
            (PodState::Ready, Some(guest)) => Ok(guest.clone()),
            (state, _) => Err(PodError::State {
                id: self.pod.id.clone(),
                source: IllegalMove {
                    subject: "pod",
                    state: state.name(),
                    event,
                },
            }),
        }
    }

    fn check_name(&self, spec: &ContainerSpec) -> Result<(), PodError> {
        let same =
            |one: &&ContainerRecord| one.spec.name == spec.name && one.spec.attempt == spec.attempt;
        match self.containers.values().find(same) {
            None => Ok(()),
            Some(holder) => Err(PodError::Exists {
                what: "container",
                name: format!("{} (attempt {})", spec.name, spec.attempt),
                holder: holder.id.clone(),
            }),
        }
    }

    /// Makes the whole id of the container whose processes are to be shared.
    fn resolve_target(&self, spec: &mut ContainerSpec) -> Result<(), PodError> {
        if let PidMode::Target(target) = &mut spec.security.pid {
            let ids: BTreeMap<_, _> = self.containers.iter().collect();
            *target = super::registry::find(ids.keys().map(|id| id.as_str()), target, "container")?;
        }
        Ok(())
    }
}
