// SPDX-License-Identifier: Apache-2.0
//! What the owner holds a pod's VM and its containers to, on the host and in the guest, by [`crate::pod::plan::limits`].

use std::path::PathBuf;

use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::HostLimits;

use super::{Owner, node};
use crate::pod::errors::BootError;
use crate::pod::life::record::{Allowance, ContainerRecord, VmSize};
use crate::pod::life::spec::{PodLimits, Resources};
use crate::pod::plan::hugepages;
use crate::pod::plan::limits::{guest_limits, host_cpu, shares, union};
use crate::pod::plan::sizing::{self, Room, Wanted};

/// What is known of a pod's VM before anything is taken for it.
#[derive(Debug)]
pub(super) struct Plan {
    pub size: VmSize,
    pub allowance: Allowance,
    pub cgroup: Option<PathBuf>,
}

impl Owner {
    /// How large the VM will be, and its cgroup; or why there is no room for it. Nothing is taken yet.
    pub(super) fn plan(&self) -> Result<Plan, BootError> {
        let host = &self.shared.host;
        let limits = &self.pod.spec.limits;
        let given = host.cgroups.of_pod(&limits.cgroup_parent);
        let allowance = limits.allowance(given.as_ref());
        let wanted = limits.wanted(allowance);
        let cgroup = host
            .cgroups
            .place(&self.pod.id, given.as_ref(), wanted.host_bytes());
        let memory = node::Memory::read();
        let disk = host.state_pods.parent().unwrap_or(&host.state_pods);
        let disk = rustix::fs::statvfs(disk).map_err(|e| BootError::Directory {
            path: disk.to_owned(),
            source: e.into(),
        })?;
        let room = Room {
            cpus: node::cpus(),
            memory_bytes: memory.total_bytes,
            available_bytes: memory.available_bytes,
            cgroup_bytes: cgroup
                .as_deref()
                .and_then(|path| host.cgroups.memory_limit(path)),
            disk_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
        };
        Ok(Plan {
            size: sizing::size(&wanted, &host.sizing, &room)?,
            allowance,
            cgroup,
        })
    }

    /// What the pod and its live containers are to have.
    pub(super) fn wanted(&self) -> Wanted {
        let live = self.live().map(|one| &one.spec.resources);
        self.wanted_with(&self.pod.spec.limits, self.pod.allowance, live)
    }

    pub(super) fn wanted_with<'a>(
        &self,
        limits: &'a PodLimits,
        allowance: Allowance,
        live: impl Iterator<Item = &'a Resources>,
    ) -> Wanted {
        let wanted = limits.wanted(allowance);
        let hugepage_bytes = hugepages::bytes(&limits.resources, live);
        Wanted {
            hugepage_bytes: wanted.hugepage_bytes.max(hugepage_bytes),
            ..wanted
        }
    }

    pub(super) fn live(&self) -> impl Iterator<Item = &ContainerRecord> {
        let all = self.containers.values();
        all.filter(|one| !one.state.is_exited())
    }

    /// What the host lets the VM use, by the pod and its containers.
    pub(super) fn host_limits(&self) -> HostLimits {
        self.host_limits_for(&self.wanted())
    }

    pub(super) fn host_limits_for(&self, wanted: &Wanted) -> HostLimits {
        let limits = &self.pod.spec.limits;
        let containers: Vec<&Resources> = self.live().map(|one| &one.spec.resources).collect();
        let together = |list: fn(&Resources) -> &str| union(containers.iter().map(|one| list(one)));
        HostLimits {
            memory_bytes: wanted.host_bytes(),
            cpu_millis: host_cpu(wanted.allowance, limits),
            cpu_shares: shares(limits),
            cpus: together(|one| &one.cpuset_cpus),
            nodes: together(|one| &one.cpuset_mems),
        }
    }

    /// Applies on the host what its containers say, after one has come, gone or changed.
    pub(super) fn place(&self) {
        if let Some(path) = self.pod.cgroup() {
            let limits = self.host_limits();
            self.shared.host.cgroups.limit(path, &limits);
        }
        let scores = self.live().map(|one| one.spec.resources.oom_score_adj);
        let score = i32::try_from(scores.min().unwrap_or(0).clamp(-1000, 1000)).unwrap_or(0);
        if let Some(guest) = &self.guest
            && let Err(e) = guest.process.set_oom_score_adj(score)
        {
            // Lowering it takes CAP_SYS_RESOURCE, which a daemon in a container may lack.
            tracing::debug!(pod = self.pod.id, "oom_score_adj of the VMM: {e}");
        }
    }

    /// Limits the pod's containers together, in the guest.
    pub(super) async fn limit_guest(&self, guest: &Guest) -> Result<(), BootError> {
        let limits = guest_limits(&self.pod.spec.limits, self.pod.allowance, self.pod.cgroup());
        if limits == protocol::Resources::default() {
            return Ok(());
        }
        Ok(guest.agent.limit(limits).await?)
    }
}
