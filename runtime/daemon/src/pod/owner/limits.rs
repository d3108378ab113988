// SPDX-License-Identifier: Apache-2.0
//! The limits of a pod's VM and its containers, on the host and in the guest. [`crate::pod::plan::limits`] calculates
//! them; the owner applies them.

use std::path::PathBuf;

use bulkhead_host::Guest;
use bulkhead_host::cgroup::HostLimits;
use bulkhead_host::usage::bytes_on_disk;

use super::ledger::Ledger;
use super::{Owner, node};
use crate::pod::errors::BootError;
use crate::pod::host::Shared;
use crate::pod::life::record::{Allowance, ContainerRecord, PodRecord, VmSize};
use crate::pod::life::spec::{PodLimits, Resources};
use crate::pod::life::state::PodState;
use crate::pod::plan::limits::{guest_limits, host_cpu, shares, union};
use crate::pod::plan::sizing::{self, Room, Wanted};
use crate::pod::plan::{hugepages, io, swap};
use crate::pod::registry::Registry;

/// The size and cgroup of a pod's VM, before any resource is taken for it.
#[derive(Debug)]
pub(super) struct Plan {
    pub size: VmSize,
    pub allowance: Allowance,
    pub cgroup: Option<PathBuf>,
}

impl Plan {
    /// Calculates the VM's size and cgroup; the error says why the node has no room for it. Takes nothing yet.
    pub fn of(shared: &Shared, id: &str, limits: &PodLimits) -> Result<Self, BootError> {
        let host = &shared.host;
        let given = host.cgroups.of_pod(&limits.cgroup_parent);
        let allowance = limits.allowance(given.as_ref());
        let wanted = limits.wanted(allowance);
        let cgroup = host.cgroups.place(id, given.as_ref(), wanted.host_bytes());
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
            promised_bytes: promised_bytes(&shared.registry),
        };
        Ok(Self {
            size: sizing::size(&wanted, &host.sizing, &room)?,
            allowance,
            cgroup,
        })
    }
}

/// How much disk pods asked for and have not written yet.
fn promised_bytes(registry: &Registry) -> u64 {
    let views = registry.views();
    let pods = views.iter().map(|view| &view.pod);
    let writes = |pod: &&PodRecord| matches!(pod.state, PodState::Creating | PodState::Ready);
    let asked = pods.filter(writes);
    let asked = asked.filter(|pod| pod.spec.limits.scratch_bytes.is_some());
    asked
        .filter_map(|pod| {
            let written = bytes_on_disk(&pod.scratch_file()?).unwrap_or(0);
            Some(pod.size.scratch_bytes.saturating_sub(written))
        })
        .fold(0, u64::saturating_add)
}

impl Owner {
    /// The plan for this pod.
    pub(super) fn plan(&self) -> Result<Plan, BootError> {
        let pod = self.ledger.pod();
        Plan::of(&self.shared, &pod.id, &pod.spec.limits)
    }

    /// Limits all containers of the pod together, in the guest.
    pub(super) async fn limit_guest(&self, guest: &Guest) -> Result<(), BootError> {
        let pod = self.ledger.pod();
        let limits = guest_limits(&pod.spec.limits, pod.allowance, pod.cgroup());
        Ok(self.limit(guest, limits).await?)
    }
}

impl Ledger {
    /// What the pod with its live containers asks for.
    pub fn wanted(&self) -> Wanted {
        let live = self.live().map(|one| &one.spec.resources);
        self.wanted_with(&self.pod().spec.limits, self.pod().allowance, live)
    }

    pub fn wanted_with<'a>(
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

    /// The containers that have not exited, also those not started yet.
    pub fn live(&self) -> impl Iterator<Item = &ContainerRecord> {
        let all = self.containers().values();
        all.filter(|one| !one.state.is_exited())
    }

    /// The VM's limits on the host, from the pod and its containers.
    pub fn host_limits(&self) -> HostLimits {
        self.host_limits_for(&self.wanted())
    }

    pub fn host_limits_for(&self, wanted: &Wanted) -> HostLimits {
        let limits = &self.pod().spec.limits;
        let containers: Vec<&Resources> = self.live().map(|one| &one.spec.resources).collect();
        let together = |list: fn(&Resources) -> &str| union(containers.iter().map(|one| list(one)));
        let own = &limits.resources;
        HostLimits {
            memory_bytes: wanted.host_bytes(),
            swap_bytes: swap::together(own, containers.iter().copied()),
            io_max: io::together(own, containers.iter().copied()),
            cpu_millis: host_cpu(wanted.allowance, limits),
            cpu_shares: shares(limits),
            cpus: together(|one| &one.cpuset_cpus),
            nodes: together(|one| &one.cpuset_mems),
        }
    }

    /// The VMM's OOM score adjustment on the host: the lowest of its live containers, so that the VM is killed no
    /// earlier than its most protected container would be.
    pub fn oom_score_adj(&self) -> i32 {
        let scores = self.live().map(|one| one.spec.resources.oom_score_adj);
        i32::try_from(scores.min().unwrap_or(0).clamp(-1000, 1000)).unwrap_or(0)
    }
}
