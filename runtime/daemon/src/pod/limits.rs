// SPDX-License-Identifier: Apache-2.0
//! What a pod may use: by the size of its VM, by the host's cgroup around it, and by the guest's around its containers.
//!
//! ```text
//! host cgroup of the VM    memory.max: guest memory for the limit + VMM; cpu.max, cpu.weight: the pod's; cpuset: see below
//!   guest memory           fixed at the boot
//!     guest's pod cgroup   memory.max: the pod's limit
//!       container          its own limits
//! ```
//! CPUs and NUMA nodes that kubelet names are the host's, which the guest does not know. The VM runs on those of all its
//! containers together; a container without any lets it run everywhere. Likewise the host's memory killer sees the VM
//! with the lowest score of its containers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::owner::Owner;
use super::program::{self, ProgramError};
use super::record::ContainerRecord;
use super::sizing::{self, Defaults, Room, VmSize, Wanted, vmm_mib};
use super::spec::{PodLimits, Resources};
use super::{BootError, PodError, cpulist};
use crate::guest::cgroup::{self, HostLimits};
use crate::guest::{Guest, protocol};

const MIB: u64 = 1 << 20;
const ONLINE_CPUS: &str = "/sys/devices/system/cpu/online";
const ONLINE_NODES: &str = "/sys/devices/system/node/online";

impl PodLimits {
    pub fn wanted(&self) -> Wanted {
        let limits = &self.resources;
        let huge = limits.hugepage_limits.iter().map(|(_, bytes)| *bytes);
        Wanted {
            memory_limit_bytes: u64::try_from(limits.memory_limit_bytes).unwrap_or(0),
            hugepage_bytes: huge.fold(0, u64::saturating_add),
            cpu_limit_millis: limits.cpu_limit_millis(),
            cpu_request_millis: limits.cpu_request_millis(),
            scratch_bytes: self.scratch_bytes,
        }
    }
}

impl Owner {
    /// How large the VM will be, and its cgroup; or why there is no room for it. Nothing is taken yet.
    pub(super) fn plan(&self) -> Result<(VmSize, Option<PathBuf>), BootError> {
        let host = &self.shared.host;
        let limits = &self.pod.spec.limits;
        let cgroup = host.cgroups.path(&self.pod.id, &limits.cgroup_parent);
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let disk = host.state_pods.parent().unwrap_or(&host.state_pods);
        let disk = rustix::fs::statvfs(disk).map_err(|e| BootError::Directory {
            path: disk.to_owned(),
            source: e.into(),
        })?;
        let room = Room {
            cpus: cpus(),
            memory_bytes: meminfo(&memory, "MemTotal:"),
            available_bytes: meminfo(&memory, "MemAvailable:"),
            cgroup_bytes: cgroup
                .as_deref()
                .and_then(|path| host.cgroups.memory_limit(path)),
            disk_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
        };
        let size = sizing::size(&limits.wanted(), &host.sizing, &room)?;
        Ok((size, cgroup))
    }

    /// What the host lets the VM use, by the pod and its containers.
    pub(super) fn host_limits(&self) -> HostLimits {
        let limits = &self.pod.spec.limits;
        let containers: Vec<&Resources> = self
            .containers
            .values()
            .filter(|one| !one.state.is_exited())
            .map(|one| &one.spec.resources)
            .collect();
        let together = |list: fn(&Resources) -> &str| union(containers.iter().map(|one| list(one)));
        HostLimits {
            memory_bytes: host_memory(limits, &self.shared.host.sizing, &self.pod.size),
            cpu_millis: host_cpu(limits),
            cpu_shares: shares(limits),
            cpus: together(|one| &one.cpuset_cpus),
            nodes: together(|one| &one.cpuset_mems),
        }
    }

    /// Applies on the host what its containers say, after one has come, gone or changed.
    pub(super) fn place(&self) {
        if let Some(path) = self.pod.cgroup() {
            cgroup::limit(path, &self.host_limits());
        }
        let live = self
            .containers
            .values()
            .filter(|one| !one.state.is_exited());
        let scores = live.map(|one: &ContainerRecord| one.spec.resources.oom_score_adj);
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
        let limits = guest_limits(
            &self.pod.spec.limits,
            &self.shared.host.sizing,
            self.pod.cgroup(),
        );
        if limits == protocol::Resources::default() {
            return Ok(());
        }
        Ok(guest.agent.limit(limits).await?)
    }

    /// `UpdatePodSandboxResources`: checked against the VM, then the guest, which may refuse, then the host.
    pub(super) async fn resize(
        &mut self,
        resources: &Resources,
        overhead: &Resources,
    ) -> Result<(), PodError> {
        let guest = self.ready_guest("a resize")?;
        program::resources(resources)?;
        check_placement(resources)?;
        let mut changed = self.pod.spec.limits.clone();
        changed.resources.update(resources);
        changed.overhead.update(overhead);
        sizing::resize(&changed.wanted(), &self.pod.size, cpus())?;
        let limits = guest_limits(&changed, &self.shared.host.sizing, self.pod.cgroup());
        let limited = guest.agent.limit(limits).await;
        limited.map_err(|source| PodError::Guest {
            id: self.pod.id.clone(),
            source,
        })?;
        self.change_pod(|pod| pod.spec.limits = changed)?;
        // The pod's own, which came along, may be fewer than its containers have.
        self.keep_known_hugepages(&guest).await;
        self.place();
        Ok(())
    }
}

/// Whether the host has the CPUs and nodes that are named.
pub fn check_placement(resources: &Resources) -> Result<(), ProgramError> {
    for (name, list, online) in [
        ("cpuset_cpus", &resources.cpuset_cpus, ONLINE_CPUS),
        ("cpuset_mems", &resources.cpuset_mems, ONLINE_NODES),
    ] {
        check_list(name, list, &fs::read_to_string(online).unwrap_or_default())?;
    }
    Ok(())
}

fn check_list(name: &'static str, list: &str, online: &str) -> Result<(), ProgramError> {
    let wrong = || ProgramError::Placement {
        name,
        list: list.to_owned(),
        online: online.trim().to_owned(),
    };
    let named = cpulist::parse(list).ok_or_else(wrong)?;
    let online = cpulist::parse(online).unwrap_or_default();
    // A host that does not say what it has is not asked.
    if online.is_empty() || named.is_subset(&online) {
        return Ok(());
    }
    Err(wrong())
}

/// All that are named; empty if someone may be anywhere.
fn union<'a>(lists: impl Iterator<Item = &'a str>) -> String {
    let mut all = BTreeSet::new();
    for list in lists {
        match cpulist::parse(list) {
            Some(named) if !named.is_empty() => all.extend(named),
            _ => return String::new(),
        }
    }
    cpulist::format(&all)
}

/// What of the guest's memory the pod may fill, and the VMM's own. A VM of an earlier version has no size and no limit.
fn host_memory(limits: &PodLimits, defaults: &Defaults, size: &VmSize) -> Option<u64> {
    let whole = u64::from(size.memory_mib);
    if whole == 0 {
        return None;
    }
    let wanted = limits.wanted();
    let filled = if wanted.memory_limit_bytes == 0 {
        whole
    } else {
        let least = u64::from(defaults.memory_mib);
        wanted.memory_mib().max(least).min(whole)
    };
    Some((filled + vmm_mib(whole)) * MIB)
}

/// The containers' limit, and what the RuntimeClass adds for the VM.
fn host_cpu(limits: &PodLimits) -> Option<u64> {
    let millis = limits.resources.cpu_limit_millis();
    (millis > 0).then(|| millis.saturating_add(limits.overhead.cpu_limit_millis()))
}

fn shares(limits: &PodLimits) -> Option<u64> {
    let shares = limits.resources.cpu_shares;
    let all = shares.saturating_add(limits.overhead.cpu_shares.max(0));
    u64::try_from(all).ok().filter(|_| shares > 0)
}

/// What containers may use together. A pod with a small limit may use no less than one without: kubelet sums up the
/// limits that there are, also where some container has none.
fn guest_limits(
    limits: &PodLimits,
    defaults: &Defaults,
    cgroup: Option<&Path>,
) -> protocol::Resources {
    let resources = &limits.resources;
    let least = sizing::containers_mib(u64::from(defaults.memory_mib)) * MIB;
    let least = i64::try_from(least).unwrap_or(i64::MAX);
    let hugepages = resources.hugepage_limits.iter();
    // Where the host cannot hold the VM to it, the guest at least holds its containers to it.
    let cpu = cgroup.is_none() && resources.cpu_quota_us > 0;
    protocol::Resources {
        memory_limit_bytes: match resources.memory_limit_bytes {
            limit if limit > 0 => limit.max(least),
            limit => limit,
        },
        cpu_quota_us: if cpu { resources.cpu_quota_us } else { 0 },
        cpu_period_us: if cpu { resources.cpu_period_us } else { 0 },
        unified: resources.unified.clone().into_iter().collect(),
        hugepage_limits: hugepages
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(page_size, limit_bytes)| protocol::HugepageLimit {
                page_size: page_size.clone(),
                limit_bytes: *limit_bytes,
            })
            .collect(),
        ..Default::default()
    }
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults = Defaults {
        vcpus: 1,
        memory_mib: 256,
        headroom_mib: 0,
        scratch_bytes: 1 << 30,
    };

    fn limits(memory_mib: i64, quota_us: i64) -> PodLimits {
        PodLimits {
            resources: Resources {
                memory_limit_bytes: memory_mib << 20,
                cpu_quota_us: quota_us,
                cpu_period_us: 100_000,
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn a_vm_is_bound_on_the_host_by_its_limit_and_never_below_the_default() {
        let size = VmSize {
            memory_mib: 2000,
            ..Default::default()
        };
        let bound = |memory| host_memory(&limits(memory, 0), &DEFAULTS, &size).unwrap() / MIB;
        assert_eq!(bound(0), 2000 + vmm_mib(2000), "no limit: the whole VM");
        let needed = limits(512, 0).wanted().memory_mib();
        assert_eq!(bound(512), needed + vmm_mib(2000));
        assert_eq!(bound(1), 256 + vmm_mib(2000));
        assert_eq!(
            bound(90_000),
            2000 + vmm_mib(2000),
            "never more than there is"
        );
        assert_eq!(
            host_memory(&limits(512, 0), &DEFAULTS, &VmSize::default()),
            None
        );
    }

    #[test]
    fn the_overhead_of_the_runtime_class_is_the_vms_too() {
        let mut limits = limits(0, 150_000);
        limits.resources.cpu_shares = 512;
        assert_eq!(
            (host_cpu(&limits), shares(&limits)),
            (Some(1500), Some(512))
        );
        limits.overhead.cpu_quota_us = 25_000;
        limits.overhead.cpu_period_us = 100_000;
        limits.overhead.cpu_shares = 102;
        assert_eq!(
            (host_cpu(&limits), shares(&limits)),
            (Some(1750), Some(614))
        );
        assert_eq!(host_cpu(&PodLimits::default()), None);
        assert_eq!(shares(&PodLimits::default()), None);
    }

    #[test]
    fn the_guest_limits_cpu_only_where_the_host_does_not() {
        let limits = limits(512, 150_000);
        let by_host = guest_limits(&limits, &DEFAULTS, Some(Path::new("/x")));
        assert_eq!(
            (by_host.memory_limit_bytes, by_host.cpu_quota_us),
            (512 << 20, 0)
        );
        let alone = guest_limits(&limits, &DEFAULTS, None);
        assert_eq!(
            (alone.cpu_quota_us, alone.cpu_period_us),
            (150_000, 100_000)
        );
        let small = guest_limits(&self::limits(1, 0), &DEFAULTS, None);
        assert!(small.memory_limit_bytes > 128 << 20, "{small:?}");
        assert_eq!(
            guest_limits(&PodLimits::default(), &DEFAULTS, None),
            protocol::Resources::default()
        );
    }

    #[test]
    fn a_vm_runs_where_any_of_its_containers_may() {
        assert_eq!(union(["0-1", "3"].into_iter()), "0-1,3");
        assert_eq!(union(["0-1", ""].into_iter()), "");
        assert_eq!(union(std::iter::empty()), "");
    }

    #[test]
    fn cpus_that_the_host_lacks_are_named() {
        check_list("cpuset_cpus", "0-3", "0-7\n").unwrap();
        check_list("cpuset_cpus", "", "0").unwrap();
        check_list("cpuset_mems", "0", "").unwrap();
        for bad in ["8", "x", "3-1"] {
            let error = check_list("cpuset_cpus", bad, "0-7\n")
                .unwrap_err()
                .to_string();
            assert!(error.contains("0-7") && error.contains(bad), "{error}");
        }
    }
}
