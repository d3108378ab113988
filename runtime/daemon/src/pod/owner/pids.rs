// SPDX-License-Identifier: Apache-2.0
//! The pod's limit of processes. `podPidsLimit` is only in the cgroup that kubelet made for the pod; it is read at the pod's
//! start and for each new container, and counts all of the guest's containers together.

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::pids::PidsLimit;

use super::Owner;
use crate::pod::errors::PodError;
use crate::pod::life::spec::Resources;

/// As the agent takes it: less than zero lifts a limit.
const NO_LIMIT: i64 = -1;

impl Owner {
    /// Has the guest count the pod's processes as kubelet's cgroup says, if that has changed.
    pub(super) async fn limit_pids(&mut self, guest: &Guest) -> Result<(), AgentError> {
        let parent = &self.pod.spec.limits.cgroup_parent;
        let Some(limit) = self.shared.host.cgroups.pids_limit(parent) else {
            return Ok(());
        };
        // A fresh guest has none; an adopted one has what an earlier daemon told it.
        if self.pids_limit == Some(limit) {
            return Ok(());
        }
        let limits = protocol::Resources {
            pids_limit: match limit {
                PidsLimit::None => NO_LIMIT,
                PidsLimit::AtMost(number) => number,
            },
            ..Default::default()
        };
        guest.agent.limit(limits).await?;
        self.pids_limit = Some(limit);
        Ok(())
    }

    /// Makes room for the container `id`, which is to have `resources`.
    pub(super) async fn limit_together(
        &mut self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let limited = self.limit_pids(guest).await;
        limited.map_err(|source| PodError::Guest {
            id: self.pod.id.clone(),
            source,
        })?;
        self.reserve_hugepages(guest, id, resources).await
    }
}
