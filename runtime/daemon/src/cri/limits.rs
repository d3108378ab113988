// SPDX-License-Identifier: Apache-2.0
//! Converts CRI's resources to [`Resources`] and [`PodLimits`].

use std::collections::HashMap;

use bulkhead_proto::cri;

use super::quantity;
use super::refusal::ParseError;
use crate::pod::life::spec::{PodLimits, Resources};
use crate::pod::plan::io;

/// The annotation with the size of the pod's scratch disk, as a Kubernetes quantity. CRI itself has no field for it.
pub const EPHEMERAL_STORAGE: &str = "bulkhead.dev/ephemeral-storage";
/// The possible sizes. A smaller ext4 has no room for files, and no host has room for a larger one.
const SCRATCH_BYTES: std::ops::RangeInclusive<u64> = (64 << 20)..=(64 << 40);

pub fn resources(limits: cri::LinuxContainerResources) -> Resources {
    Resources {
        cpu_period_us: limits.cpu_period,
        cpu_quota_us: limits.cpu_quota,
        cpu_shares: limits.cpu_shares,
        memory_limit_bytes: limits.memory_limit_in_bytes,
        memory_swap_limit_bytes: limits.memory_swap_limit_in_bytes,
        oom_score_adj: limits.oom_score_adj,
        cpuset_cpus: limits.cpuset_cpus,
        cpuset_mems: limits.cpuset_mems,
        hugepage_limits: limits
            .hugepage_limits
            .into_iter()
            .map(|limit| (limit.page_size, limit.limit))
            .collect(),
        unified: limits.unified.into_iter().collect(),
    }
}

/// The limits in a pod's configuration.
pub fn pod(
    linux: &cri::LinuxPodSandboxConfig,
    annotations: &HashMap<String, String>,
) -> Result<PodLimits, ParseError> {
    let resources = linux.resources.as_ref();
    let io_max = resources.and_then(|limits| limits.unified.get(io::KEY));
    if let Some(value) = io_max.filter(|value| !io::is_valid(value)) {
        return Err(ParseError::Wrong {
            what: io::KEY,
            value: value.clone(),
        });
    }
    let said = |limits: &Option<cri::LinuxContainerResources>| {
        limits.clone().map(self::resources).unwrap_or_default()
    };
    Ok(PodLimits {
        resources: said(&linux.resources),
        overhead: said(&linux.overhead),
        cgroup_parent: linux.cgroup_parent.clone(),
        scratch_bytes: annotations
            .get(EPHEMERAL_STORAGE)
            .map(|text| scratch(text))
            .transpose()?,
    })
}

fn scratch(text: &str) -> Result<u64, ParseError> {
    let bytes = quantity::bytes(text).filter(|bytes| SCRATCH_BYTES.contains(bytes));
    bytes.ok_or_else(|| ParseError::Wrong {
        what: EPHEMERAL_STORAGE,
        value: format!("{text} (possible are 64Mi to 64Ti)"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_disk_is_said_by_an_annotation() {
        let linux = cri::LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/p".into(),
            resources: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 5,
                ..Default::default()
            }),
            ..Default::default()
        };
        let with = |value: &str| {
            let annotations = [(EPHEMERAL_STORAGE.to_owned(), value.to_owned())].into();
            pod(&linux, &annotations)
        };
        let limits = with("2Gi").unwrap();
        assert_eq!(limits.scratch_bytes, Some(2 << 30));
        assert_eq!(limits.resources.memory_limit_bytes, 5);
        assert_eq!(limits.cgroup_parent, "/kubepods/p");
        assert_eq!(pod(&linux, &HashMap::new()).unwrap().scratch_bytes, None);
        for (value, is_good) in [("8:0 rbps=5", true), ("sda rbps=5", false)] {
            let mut linux = linux.clone();
            let resources = linux.resources.as_mut().unwrap();
            resources
                .unified
                .insert(io::KEY.to_owned(), value.to_owned());
            let limits = pod(&linux, &HashMap::new());
            assert_eq!(limits.is_ok(), is_good, "{value}");
        }
        for bad in ["", "-1", "1Ki", "1Ei", "2Gi; rm -rf /"] {
            let error = with(bad).unwrap_err().to_string();
            assert!(error.contains(EPHEMERAL_STORAGE), "{bad}: {error}");
        }
    }
}
