// SPDX-License-Identifier: Apache-2.0
//! How a pod's owner makes a container. First it finds what the container needs on the host, then it attaches that to
//! the guest's disks, then the guest makes the container. A creation that fails is undone.

use std::collections::BTreeMap;

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::protocol;
use bulkhead_host::{Guest, control};
use bulkhead_image::Image;

use super::Owner;
use super::kept::{empty_dirs, name_mirrors, termination_log, volumes};
use super::mounts::FoundMount;
use super::node::check_placement;
use crate::clock::now;
use crate::logs;
use crate::pod::errors::PodError;
use crate::pod::life::record::ContainerRecord;
use crate::pod::life::signal;
use crate::pod::life::spec::{ContainerSpec, PidMode, Resources};
use crate::pod::life::state::ContainerState;
use crate::pod::plan::{image_name, program, wire};
use crate::pod::registry::find;
use crate::pod::volumes::block::{self, OpenBlock};
use crate::random::new_id;

/// What the container gets from the host: its mounts and its opened block devices.
struct Parts {
    mounts: Vec<FoundMount>,
    opened: Vec<OpenBlock>,
}

impl Owner {
    /// Makes a container; returns its id.
    pub(super) async fn create(&mut self, mut spec: ContainerSpec) -> Result<String, PodError> {
        let guest = self.ledger.ready_guest("a new container")?;
        self.check_name(&spec)?;
        check_placement(&spec.resources)?;
        self.resolve_target(&mut spec)?;
        if let Some(id) = self.take_waiting(&guest, &spec).await? {
            return Ok(id);
        }
        let images = &self.shared.host.images;
        let image = images.find(&spec.image)?;
        let image = image.ok_or_else(|| PodError::NoImage(spec.image.clone()))?;
        if let Some(artifact_type) = &image.artifact_type {
            return Err(PodError::Artifact {
                image: spec.image.clone(),
                artifact_type: artifact_type.clone(),
            });
        }
        let id = new_id();
        let pod = self.ledger.pod();
        let name = wire::hostname(&pod.id, &pod.spec);
        let mut request = program::describe(&id, &spec, &image.defaults, &name)?;
        if !spec.start_hooks.is_empty() {
            request.annotations = wire::hook_annotations(&pod.id, &pod.spec, &spec);
        }
        self.make_room(&guest, &id, &spec.resources).await?;
        let opened = faults::within(Step::OpenBlockDevices, || {
            block::open(&spec.block_devices).map_err(PodError::from)
        })?;
        let mut mounts = self.find_mounts(&id, &mut spec.mounts)?;
        name_mirrors(&mut mounts, &self.ledger.pod().mirrors);
        let mounted = volumes(&mounts);
        self.drop_unlike(&guest, &mounted).await?;
        let mut record = self.container_record(&id, spec, &image)?;
        record.termination_log = termination_log(&mounts);
        record.empty_dirs = empty_dirs(&mounts);
        record.volumes = mounted;
        // The record must exist before the image lease: at its start, a daemon removes leases without a record.
        self.ledger.write_container(&record)?;
        let parts = Parts { mounts, opened };
        let resources = record.spec.resources.clone();
        let made = self
            .make(&guest, &image, parts, &resources, &mut request)
            .await;
        if let Err(error) = made {
            self.unmake(&guest, &record).await;
            return Err(error);
        }
        self.ledger.add_container(record);
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

    /// Leases an image's layers for a container, and attaches those that are not on the image disk yet. Returns the
    /// extents of all layers, the lowest layer first.
    pub(super) async fn attach_image(
        &mut self,
        guest: &Guest,
        image: &Image,
        holder: &str,
    ) -> Result<Vec<protocol::Extent>, PodError> {
        let images = &self.shared.host.images;
        let mut attached = Vec::new();
        let leased = tokio::task::block_in_place(|| {
            faults::within(Step::LeaseImage, || images.lease(image.id.as_str(), holder))
        });
        for layer in leased? {
            let extent = match self.ledger.pod().layers.get(&layer.diff_id) {
                Some(extent) => *extent,
                None => {
                    let extent = control::attach(&guest.files.control(), &layer.path).await?;
                    self.ledger.change_pod(|pod| {
                        pod.layers.insert(layer.diff_id.clone(), extent);
                    })?;
                    extent
                }
            };
            attached.push(control::told(extent));
        }
        Ok(attached)
    }

    /// Undoes a creation that failed.
    async fn unmake(&mut self, guest: &Guest, record: &ContainerRecord) {
        let id = &record.id;
        if let Err(error) = guest.agent.remove(id).await {
            self.ledger
                .complain("remove a failed container in the guest", &error);
        }
        self.give_back_hugepages(guest, id, &record.spec.resources)
            .await;
        self.remove_own_volumes(guest, record).await;
        self.unshare(id).await;
        self.detach_blocks(id).await;
        if let Err(error) = self.forget_container(id) {
            self.ledger.complain("remove a failed container", &error);
        }
    }

    pub(super) fn container_record(
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
            image_name: image_name::of(&spec, image),
            id: id.to_owned(),
            pod_id: self.ledger.pod().id.clone(),
            log_path: logs::log_path(&self.ledger.pod().spec.log_directory, &spec.log_path)?,
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
            volumes: BTreeMap::new(),
            user: None,
            first_id: None,
            is_waiting: false,
        })
    }

    fn check_name(&self, spec: &ContainerSpec) -> Result<(), PodError> {
        let same = |one: &&ContainerRecord| {
            !one.is_waiting && one.spec.name == spec.name && one.spec.attempt == spec.attempt
        };
        match self.ledger.containers().values().find(same) {
            None => Ok(()),
            Some(holder) => Err(PodError::Exists {
                what: "container",
                name: format!("{} (attempt {})", spec.name, spec.attempt),
                holder: holder.id.clone(),
            }),
        }
    }

    /// Completes the id of the container whose PID namespace this one joins, where a prefix was given.
    fn resolve_target(&self, spec: &mut ContainerSpec) -> Result<(), PodError> {
        if let PidMode::Target(target) = &mut spec.security.pid {
            *target = find(self.ledger.containers(), target, "container")?
                .0
                .to_owned();
        }
        Ok(())
    }
}
