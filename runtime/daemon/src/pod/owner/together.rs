// SPDX-License-Identifier: Apache-2.0
//! What the containers of a pod have of their guest together, though CRI says it of each, or not at all.
//!
//! **Huge pages** ([`crate::pod::plan::hugepages`]) are reserved before a container is made and given back after it was
//! removed. Those of one that has exited go to the next one that is made.
//! **Processes**: `podPidsLimit` is only in the cgroup that kubelet made for the pod. It is read for each new container, and
//! counts all of the guest's containers together.

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::pids::PidsLimit;

use super::Owner;
use crate::pod::errors::PodError;
use crate::pod::life::spec::Resources;
use crate::pod::plan::hugepages::together;

/// As the agent takes it: less than zero lifts a limit.
const NO_LIMIT: i64 = -1;

impl Owner {
    /// Makes room for the container `id`, which is to have `resources`, and has the guest count the pod's processes as
    /// kubelet's cgroup says, if that has changed.
    pub(super) async fn limit_together(
        &mut self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let parent = &self.ledger.pod().spec.limits.cgroup_parent;
        let pids = self.shared.host.cgroups.pids_limit(parent);
        // A fresh guest has none; an adopted one has what an earlier daemon told it.
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

    /// Has the guest keep the huge pages of its live containers and of `id`, which is to have `resources`.
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

    /// Gives back the huge pages of `id`, which had `resources` and is gone, or was never made.
    pub(super) async fn give_back_hugepages(&self, guest: &Guest, id: &str, resources: &Resources) {
        let limits = self.hugepages(id, resources, false);
        if let Err(error) = self.limit(guest, limits).await {
            self.ledger
                .complain("keep and give back huge pages", &error);
        }
    }

    /// Of the containers as they are known, after a change that was refused or that was of something else.
    pub(super) async fn keep_known_hugepages(&self, guest: &Guest) {
        self.give_back_hugepages(guest, "", &Resources::default())
            .await;
    }

    /// What the guest is to reserve for all but `id`, and for `id` with `resources` if it `lives`.
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

    /// One call to the guest, or none if there is nothing to say.
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
