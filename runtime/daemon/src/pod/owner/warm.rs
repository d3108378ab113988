// SPDX-License-Identifier: Apache-2.0
//! How a pod's owner hands out the containers of a warmed pod ([`crate::pod::warmed`]).
//!
//! They are in the guest from the start, frozen. Each waits until a client asks for a container of its name: it is that one
//! if it was started with all that is asked for. If not, it is removed, and the container is made from its image. What it
//! alone had mounted goes with it: a new container is not to find what the saved one left there, and the guest has only one
//! volume of a name, whose kind may be another now.

use std::collections::BTreeMap;

use bulkhead_host::Guest;
use bulkhead_text::chain;

use super::Owner;
use super::kept::{clash, only_of};
use crate::pod::checkpoint::fit;
use crate::pod::errors::PodError;
use crate::pod::life::record::ContainerRecord;
use crate::pod::life::spec::ContainerSpec;
use crate::pod::life::state::ContainerState;
use crate::pod::life::volume::VolumeMount;

impl Owner {
    /// The record of a container that nobody has asked for yet. It has no files of the host.
    pub(super) fn waiting(
        &self,
        id: &str,
        saved: &ContainerRecord,
    ) -> Result<ContainerRecord, PodError> {
        let images = &self.shared.host.images;
        let image = images.find(&saved.image_id)?;
        let image = image.ok_or_else(|| PodError::NoImage(saved.image_name().to_owned()))?;
        Ok(ContainerRecord {
            first_id: Some(saved.first_id().to_owned()),
            user: saved.user.clone(),
            volumes: saved.volumes.clone(),
            is_waiting: true,
            ..self.container_record(id, saved.spec.clone(), &image)?
        })
    }

    /// The container of this name that waits, if it is what is asked for. One that is not is removed.
    pub(super) async fn take_waiting(
        &mut self,
        guest: &Guest,
        spec: &ContainerSpec,
    ) -> Result<Option<String>, PodError> {
        let mut all = self.ledger.containers().values();
        let found = all.find(|one| one.is_waiting && one.spec.name == spec.name);
        let Some(waiting) = found.cloned() else {
            return Ok(None);
        };
        match self.take(guest, &waiting, spec).await {
            Ok(()) => {
                self.shared.host.warmed.count_container(true);
                Ok(Some(waiting.id))
            }
            Err(error) => {
                self.drop_waiting(guest, &waiting, &chain(&error)).await?;
                Ok(None)
            }
        }
    }

    /// Drops the containers that wait with a volume that is to be of another kind now, for a container that is made from its
    /// image.
    pub(super) async fn drop_unlike(
        &mut self,
        guest: &Guest,
        wanted: &BTreeMap<String, VolumeMount>,
    ) -> Result<(), PodError> {
        let all = self.ledger.containers().values();
        let waiting = all.filter(|one| one.is_waiting);
        let unlike = waiting.filter_map(|one| {
            let (volume, was, now) = clash(&one.volumes, wanted)?;
            let why = format!("its volume {volume} was {was}, and is {now} of another container");
            Some((one.clone(), why))
        });
        for (waiting, why) in unlike.collect::<Vec<_>>() {
            self.drop_waiting(guest, &waiting, &why).await?;
        }
        Ok(())
    }

    /// Removes a container that waits, and the volumes that no other one mounts.
    async fn drop_waiting(
        &mut self,
        guest: &Guest,
        waiting: &ContainerRecord,
        why: &str,
    ) -> Result<(), PodError> {
        self.shared.host.warmed.count_container(false);
        tracing::warn!(
            pod = self.ledger.pod().id,
            "the warmed container {} is not what is asked for, so it is made from its image: {why}",
            waiting.spec.name,
        );
        self.remove(&waiting.id).await?;
        for volume in only_of(waiting, self.ledger.containers().values()) {
            self.remove_volume(guest, &volume).await;
        }
        Ok(())
    }

    async fn take(
        &mut self,
        guest: &Guest,
        waiting: &ContainerRecord,
        spec: &ContainerSpec,
    ) -> Result<(), PodError> {
        if waiting.state != ContainerState::Created {
            return Err(PodError::container_is(
                waiting,
                "a start from where it was saved",
            ));
        }
        fit::container(&waiting.spec, spec)?;
        let followed = &self.ledger.pod().mirrors;
        let (record, mirrors) = self.brought_back(&waiting.id, waiting, spec.clone(), followed)?;
        // The guest still has the limits of the pod that was saved.
        self.limit_together(guest, &waiting.id, &spec.resources)
            .await?;
        for (name, source) in mirrors {
            self.follow(guest, &name, source).await?;
        }
        self.ledger.write_container(&record)?;
        self.ledger.add_container(record);
        Ok(())
    }
}
