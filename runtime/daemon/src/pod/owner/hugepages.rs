// SPDX-License-Identifier: Apache-2.0
//! Huge pages of a guest: reserved before a container is made and given back after it was removed. Those of one that has
//! exited go to the next one that is made.

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_host::Guest;

use super::Owner;
use crate::pod::errors::PodError;
use crate::pod::life::spec::Resources;
use crate::pod::plan::hugepages::together;

impl Owner {
    /// Has the guest keep the huge pages of its live containers and of `id`, which is to have `resources`.
    pub(super) async fn reserve_hugepages(
        &self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let reserved = self.keep_hugepages(guest, id, resources, true).await;
        reserved.map_err(|source| PodError::Guest {
            id: self.pod.id.clone(),
            source,
        })
    }

    /// Gives back the huge pages of `id`, which had `resources` and is gone, or was never made.
    pub(super) async fn give_back_hugepages(&self, guest: &Guest, id: &str, resources: &Resources) {
        if let Err(error) = self.keep_hugepages(guest, id, resources, false).await {
            self.complain("keep and give back huge pages", &error);
        }
    }

    /// Of the containers as they are known, after a change that was refused or that was of something else.
    pub(super) async fn keep_known_hugepages(&self, guest: &Guest) {
        self.give_back_hugepages(guest, "", &Resources::default())
            .await;
    }

    async fn keep_hugepages(
        &self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
        lives: bool,
    ) -> Result<(), AgentError> {
        let others = self.containers.values().filter(|one| one.id != id);
        let live = others.clone().filter(|one| !one.state.is_exited());
        let hugepage_limits = together(
            &self.pod.spec.limits.resources,
            others.map(|one| &one.spec.resources).chain([resources]),
            live.map(|one| &one.spec.resources)
                .chain(lives.then_some(resources)),
        );
        if hugepage_limits.is_empty() {
            return Ok(());
        }
        let limits = protocol::Resources {
            hugepage_limits,
            ..Default::default()
        };
        guest.agent.limit(limits).await
    }
}
