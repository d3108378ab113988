// SPDX-License-Identifier: Apache-2.0
//! What a pod may use: by the size of its VM, by the host's cgroup around it, and by the guest's around its containers.
//!
//! ```text
//! host cgroup of the VM    memory.max: guest memory for the limit + VMM; cpu.max, cpu.weight: the pod's; cpuset: see below
//!   guest memory           for the limit at the boot; more is added for a higher one, and for a pod without one as it needs it
//!     guest's pod cgroup   memory.max: the pod's limit
//!       container          its own limits
//! ```
//! kubelet's cgroup of the pod says whether the pod has a limit at all: in CRI, kubelet sums up the limits that there are,
//! also where some container has none.
//!
//! CPUs and NUMA nodes that kubelet names are the host's, which the guest does not know. The VM runs on those of all its
//! containers together; a container without any lets it run everywhere. Likewise the host's memory killer sees the VM
//! with the lowest score of its containers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::{HostLimits, PodCgroup};

use super::owner::Owner;
use super::program::ProgramError;
use super::record::ContainerRecord;
use super::sizing::{self, Allowance, Room, VmSize, Wanted};
use super::spec::{PodLimits, Resources};
use super::{BootError, cpulist, together};

const ONLINE_CPUS: &str = "/sys/devices/system/cpu/online";
const ONLINE_NODES: &str = "/sys/devices/system/node/online";
/// A cgroup's file that kubelet names for the pod but means for its containers: in the pod's cgroup it would have one
/// container's end be the end of all.
const OOM_GROUP: &str = "memory.oom.group";
/// Moved by the agent in a pod without a limit.
const GATE: &str = "memory.high";

impl PodLimits {
    /// What the containers may use together when the pod is made. `cgroup` is kubelet's of the pod.
    pub fn allowance(&self, cgroup: Option<&PodCgroup>) -> Allowance {
        let limits = &self.resources;
        let is_limited = cgroup.is_none_or(|cgroup| cgroup.memory_bytes.is_some());
        let is_cpu_limited = cgroup.is_none_or(|cgroup| cgroup.is_cpu_limited);
        Allowance {
            memory_bytes: positive(limits.memory_limit_bytes).filter(|_| is_limited),
            cpu_millis: Some(limits.cpu_limit_millis())
                .filter(|millis| *millis > 0 && is_cpu_limited),
            hugepage_bytes: cgroup.map_or(0, |cgroup| cgroup.hugepage_bytes),
        }
    }

    pub fn wanted(&self, allowance: Allowance) -> Wanted {
        let hugepage_bytes = together::hugepage_bytes(&self.resources, std::iter::empty());
        Wanted {
            allowance,
            hugepage_bytes: hugepage_bytes.max(allowance.hugepage_bytes),
            cpu_request_millis: self.resources.cpu_request_millis(),
            scratch_bytes: self.scratch_bytes,
        }
    }
}

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
        let hugepage_bytes = together::hugepage_bytes(&limits.resources, live);
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

/// The containers' limit, and what the RuntimeClass adds for the VM.
fn host_cpu(allowance: Allowance, limits: &PodLimits) -> Option<u64> {
    let millis = allowance.cpu_millis?;
    Some(millis.saturating_add(limits.overhead.cpu_limit_millis()))
}

fn shares(limits: &PodLimits) -> Option<u64> {
    let shares = limits.resources.cpu_shares;
    let all = shares.saturating_add(limits.overhead.cpu_shares.max(0));
    u64::try_from(all).ok().filter(|_| shares > 0)
}

/// What containers may use together, by the guest's cgroup around them.
pub(super) fn guest_limits(
    limits: &PodLimits,
    allowance: Allowance,
    cgroup: Option<&Path>,
) -> protocol::Resources {
    let resources = &limits.resources;
    let hugepages = resources.hugepage_limits.iter();
    // Where the host cannot hold the VM to it, the guest at least holds its containers to it.
    let cpu = cgroup.is_none() && allowance.cpu_millis.is_some();
    let memory = allowance.memory_bytes;
    let meant = |file: &str| file != OOM_GROUP && (file != GATE || memory.is_some());
    let unified = resources.unified.iter().filter(|(file, _)| meant(file));
    protocol::Resources {
        memory_limit_bytes: memory.map_or(0, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
        cpu_quota_us: if cpu { resources.cpu_quota_us } else { 0 },
        cpu_period_us: if cpu { resources.cpu_period_us } else { 0 },
        unified: unified
            .map(|(file, value)| (file.clone(), value.clone()))
            .collect(),
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

/// `None`: no limit, or none that was said.
pub(super) fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

pub(super) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

pub(super) fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    fn allowed(memory_mib: Option<u64>, cpu_millis: Option<u64>) -> Allowance {
        Allowance {
            memory_bytes: memory_mib.map(|mebibytes| mebibytes << 20),
            cpu_millis,
            hugepage_bytes: 0,
        }
    }

    #[test]
    fn kubelets_cgroup_says_whether_the_sum_of_limits_is_a_limit() {
        let cgroup = |memory_bytes, is_cpu_limited| PodCgroup {
            path: "/p".into(),
            memory_bytes,
            is_cpu_limited,
            hugepage_bytes: 0,
        };
        for (cgroup, expected) in [
            (None, allowed(Some(64), Some(500))),
            (Some(cgroup(None, false)), allowed(None, None)),
            (Some(cgroup(Some(1), false)), allowed(Some(64), None)),
            (Some(cgroup(None, true)), allowed(None, Some(500))),
        ] {
            let found = limits(64, 50_000).allowance(cgroup.as_ref());
            assert_eq!(found, expected, "{cgroup:?}");
        }
        let none = limits(0, 0).allowance(Some(&cgroup(Some(1 << 30), true)));
        assert_eq!(none, Allowance::default(), "somebody else's cgroup");
    }

    #[test]
    fn the_overhead_of_the_runtime_class_is_the_vms_too() {
        let mut limits = limits(0, 150_000);
        limits.resources.cpu_shares = 512;
        let allowance = allowed(None, Some(1500));
        assert_eq!(
            (host_cpu(allowance, &limits), shares(&limits)),
            (Some(1500), Some(512))
        );
        limits.overhead.cpu_quota_us = 25_000;
        limits.overhead.cpu_period_us = 100_000;
        limits.overhead.cpu_shares = 102;
        assert_eq!(
            (host_cpu(allowance, &limits), shares(&limits)),
            (Some(1750), Some(614))
        );
        assert_eq!(host_cpu(Allowance::default(), &limits), None);
        assert_eq!(shares(&PodLimits::default()), None);
    }

    #[test]
    fn the_guest_limits_cpu_only_where_the_host_does_not() {
        let limits = limits(512, 150_000);
        let allowance = allowed(Some(512), Some(1500));
        let by_host = guest_limits(&limits, allowance, Some(Path::new("/x")));
        assert_eq!(
            (by_host.memory_limit_bytes, by_host.cpu_quota_us),
            (512 << 20, 0)
        );
        let alone = guest_limits(&limits, allowance, None);
        assert_eq!(
            (alone.cpu_quota_us, alone.cpu_period_us),
            (150_000, 100_000)
        );
        let small = guest_limits(&limits, allowed(Some(1), None), None);
        assert_eq!(small.memory_limit_bytes, 1 << 20, "exactly");
        assert_eq!(
            guest_limits(&limits, Allowance::default(), None),
            protocol::Resources::default()
        );
    }

    #[test]
    fn what_is_meant_for_containers_is_not_set_for_all_of_them_together() {
        let mut limits = limits(64, 0);
        limits.resources.unified = [
            (OOM_GROUP.to_owned(), "1".to_owned()),
            (GATE.to_owned(), "5".to_owned()),
            ("io.weight".to_owned(), "7".to_owned()),
        ]
        .into();
        let files = |allowance| {
            let unified = guest_limits(&limits, allowance, None).unified;
            let mut files: Vec<String> = unified.into_keys().collect();
            files.sort();
            files
        };
        assert_eq!(files(allowed(Some(64), None)), ["io.weight", GATE]);
        assert_eq!(files(Allowance::default()), ["io.weight"]);
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
