// SPDX-License-Identifier: Apache-2.0
//! The limits of a pod: the size of its VM, the VM's cgroup on the host, and the pod's cgroup in the guest.
//!
//! ```text
//! host cgroup of the VM    memory.max: guest memory for the limit + VMM; cpu.max, cpu.weight: the pod's; cpuset: below
//!   guest memory           at boot what the limit needs; more for a raised limit or, without a limit, on demand
//!     guest's pod cgroup   memory.max: the pod's limit
//!       container          its own limits
//! ```
//! The cgroup that kubelet makes for the pod tells whether the pod has a limit at all. CRI does not: there, kubelet
//! sums up the limits that exist, even if some container has none.
//!
//! kubelet's CPU and NUMA node numbers are those of the host, which mean nothing in the guest. So they apply to the
//! whole VM: it runs on the CPUs of all its containers together, or on all CPUs if one container has no list. In the
//! same way, the VM gets the lowest OOM score of its containers.

use std::collections::BTreeSet;
use std::path::Path;

use bulkhead_guest::protocol;
use bulkhead_host::cgroup::PodCgroup;

use super::program::ProgramError;
use super::sizing::Wanted;
use super::{cpulist, hugepages, io};
use crate::pod::life::record::Allowance;
use crate::pod::life::spec::PodLimits;

/// kubelet sets this file for the pod but means it for each container. In the pod's cgroup it would kill all containers
/// when one runs out of memory.
const OOM_GROUP: &str = "memory.oom.group";
/// In a pod without a memory limit the agent itself uses this file, so kubelet's value must not overwrite it.
const GATE: &str = "memory.high";

impl PodLimits {
    /// What the containers may use together when the pod is made. `cgroup` is the one that kubelet made for the pod.
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
        let hugepage_bytes = hugepages::bytes(&self.resources, std::iter::empty());
        Wanted {
            allowance,
            hugepage_bytes: hugepage_bytes.max(allowance.hugepage_bytes),
            cpu_request_millis: self.resources.cpu_request_millis(),
            scratch_bytes: self.scratch_bytes,
        }
    }
}

/// Checks that all numbers of a CPU or NUMA node list are `online`.
pub fn check_list(name: &'static str, list: &str, online: &str) -> Result<(), ProgramError> {
    let wrong = || ProgramError::Placement {
        name,
        list: list.to_owned(),
        online: online.trim().to_owned(),
    };
    let named = cpulist::parse(list).ok_or_else(wrong)?;
    let online = cpulist::parse(online).unwrap_or_default();
    // If the host's own list is unknown, anything is accepted.
    if online.is_empty() || named.is_subset(&online) {
        return Ok(());
    }
    Err(wrong())
}

/// The union of the lists. It is empty, which means "everywhere", if one of them is empty.
pub fn union<'a>(lists: impl Iterator<Item = &'a str>) -> String {
    let mut all = BTreeSet::new();
    for list in lists {
        match cpulist::parse(list) {
            Some(named) if !named.is_empty() => all.extend(named),
            _ => return String::new(),
        }
    }
    cpulist::format(&all)
}

/// The VM's CPU limit on the host in thousandths: the containers' limit and the RuntimeClass's overhead.
pub fn host_cpu(allowance: Allowance, limits: &PodLimits) -> Option<u64> {
    let millis = allowance.cpu_millis?;
    Some(millis.saturating_add(limits.overhead.cpu_limit_millis()))
}

/// The VM's CPU shares on the host: the pod's and those of the overhead. `None` if the pod has none.
pub fn shares(limits: &PodLimits) -> Option<u64> {
    let shares = limits.resources.cpu_shares;
    let all = shares.saturating_add(limits.overhead.cpu_shares.max(0));
    u64::try_from(all).ok().filter(|_| shares > 0)
}

/// The limits of the pod's cgroup in the guest, which all containers share. `cgroup` is the VM's on the host.
pub fn guest_limits(
    limits: &PodLimits,
    allowance: Allowance,
    cgroup: Option<&Path>,
) -> protocol::Resources {
    let resources = &limits.resources;
    let hugepages = resources.hugepage_limits.iter();
    // If the VM has no cgroup on the host, the CPU limit is enforced at least for the containers, in the guest.
    let cpu = cgroup.is_none() && allowance.cpu_millis.is_some();
    let memory = allowance.memory_bytes;
    // The limits of I/O are those of the VM on the host.
    let meant =
        |file: &str| file != OOM_GROUP && file != io::KEY && (file != GATE || memory.is_some());
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

/// A limit of CRI. `None` if it is not set (0) or means "no limit" (below 0).
pub fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::life::spec::Resources;

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
            ("io.max".to_owned(), "8:0 rbps=1".to_owned()),
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
