// SPDX-License-Identifier: Apache-2.0
//! How a pod's owner hands out the containers of a warmed pod ([`crate::pod::warmed`]).
//!
//! They are in the guest from the start, frozen. Each waits until a client asks for a container of its name: it is that one
//! if it was started with all that is asked for. If not, it is removed, and the container is made from its image.

use bulkhead_host::Guest;
use bulkhead_text::chain;

use super::Owner;
use crate::pod::checkpoint::fit;
use crate::pod::errors::PodError;
use crate::pod::life::record::{ContainerRecord, Kept};
use crate::pod::life::spec::ContainerSpec;
use crate::pod::life::state::ContainerState;

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
            waiting: Some(Kept::of(saved)),
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
        let found = all.find(|one| one.waiting.is_some() && one.spec.name == spec.name);
        let Some(waiting) = found.cloned() else {
            return Ok(None);
        };
        let taken = self.take(guest, &waiting, spec).await;
        self.shared.host.warmed.count_container(taken.is_ok());
        match taken {
            Ok(()) => Ok(Some(waiting.id)),
            Err(error) => {
                tracing::warn!(
                    pod = self.ledger.pod().id,
                    "the warmed container {} is not what is asked for, so it is made from its image: {}",
                    spec.name,
                    chain(&error)
                );
                self.remove(&waiting.id).await?;
                Ok(None)
            }
        }
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
        for (name, source) in mirrors {
            self.follow(guest, &name, source).await?;
        }
        self.ledger.write_container(&record)?;
        self.ledger.add_container(record);
        Ok(())
    }
}
