// SPDX-License-Identifier: Apache-2.0
//! Limits of all containers of a pod together, which CRI gives for each container or not at all.
//!
//! - **Huge pages** ([`crate::pod::plan::hugepages`]) are reserved before a container is made, and released after it
//!   was removed. Those of a container that has exited can be used by the next new one.
//! - **Processes**: kubelet writes `podPidsLimit` only into the cgroup that it makes for the pod. It is read for each
//!   new container, and limits the processes of all containers of the guest together.

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::pids::PidsLimit;

use super::Owner;
use crate::pod::errors::PodError;
use crate::pod::life::spec::Resources;
use crate::pod::plan::hugepages::together;

/// To the agent, a number below zero means "no limit".
const NO_LIMIT: i64 = -1;

impl Owner {
    /// Reserves huge pages for the container `id`, which will have `resources`. Also sets the guest's limit of
    /// processes to that of kubelet's cgroup, if it has changed.
    pub(super) async fn limit_together(
        &mut self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let parent = &self.ledger.pod().spec.limits.cgroup_parent;
        let pids = self.shared.host.cgroups.pids_limit(parent);
        // A new guest has no limit yet, and of an adopted one it is unknown: then `self.pids_limit` is `None`.
        let pids = pids.filter(|limit| self.pids_limit != Some(*limit));
        let limits = protocol::Resources {
            pids_limit: match pids {
                None => 0,
                Some(PidsLimit::None) => NO_LIMIT,
                Some(PidsLimit::AtMost(number)) => number,
            },
            ..self.hugepages(id, resources, true)
        };
        let limited = self.limit(guest, limits).await;
        limited.map_err(|source| self.guest_error(source))?;
        self.pids_limit = pids.or(self.pids_limit);
        Ok(())
    }

    /// Reserves huge pages in the guest for its live containers and for `id`, which will have `resources`.
    pub(super) async fn reserve_hugepages(
        &self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let limits = self.hugepages(id, resources, true);
        let reserved = self.limit(guest, limits).await;
        reserved.map_err(|source| self.guest_error(source))
    }

    /// Releases the huge pages of `id`, which had `resources`. Call this after it was removed, or could not be made.
    pub(super) async fn give_back_hugepages(&self, guest: &Guest, id: &str, resources: &Resources) {
        let limits = self.hugepages(id, resources, false);
        if let Err(error) = self.limit(guest, limits).await {
            self.ledger
                .complain("reserve or release huge pages", &error);
        }
    }

    /// Reserves the huge pages of the containers as they are recorded, after another change failed or overwrote them.
    pub(super) async fn keep_known_hugepages(&self, guest: &Guest) {
        self.give_back_hugepages(guest, "", &Resources::default())
            .await;
    }

    /// The huge pages of all other live containers and, if `lives`, of `id` with `resources`.
    fn hugepages(&self, id: &str, resources: &Resources, lives: bool) -> protocol::Resources {
        let others = self.ledger.containers().values().filter(|one| one.id != id);
        let live = others.clone().filter(|one| !one.state.is_exited());
        let hugepage_limits = together(
            &self.ledger.pod().spec.limits.resources,
            others.map(|one| &one.spec.resources).chain([resources]),
            live.map(|one| &one.spec.resources)
                .chain(lives.then_some(resources)),
        );
        protocol::Resources {
            hugepage_limits,
            ..Default::default()
        }
    }

    /// Sends limits to the guest, if there are any.
    pub(super) async fn limit(
        &self,
        guest: &Guest,
        limits: protocol::Resources,
    ) -> Result<(), AgentError> {
        if limits == protocol::Resources::default() {
            return Ok(());
        }
        guest.agent.limit(limits).await
    }
}
