// SPDX-License-Identifier: Apache-2.0
//! Resource limits of the process itself. [`crate::cgroup`] sets those of its cgroup.

use std::fs;

use bulkhead_proto::agent::Rlimit as Limit;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::config::{Failure, Stage};

/// The hard limit of open files, in containers as on a node.
pub const MAX_OPEN_FILES: u64 = 1 << 20;
/// The soft limit of open files in a container: what systemd gives containerd. A program that closes all descriptors it
/// could have is fast, and one that needs more raises the limit itself.
const OPEN_FILES: u64 = 1024;

/// Call it while the agent's `/proc` is still mounted.
pub fn set_oom_score_adj(value: i32) -> Result<(), Failure> {
    fs::write("/proc/self/oom_score_adj", value.to_string()).stage("set the OOM score")
}

/// Sets the default limits, then `limits`.
pub fn set_rlimits(limits: &[Limit]) -> Result<(), Failure> {
    let files = Limit {
        name: "RLIMIT_NOFILE".to_owned(),
        soft: OPEN_FILES,
        hard: MAX_OPEN_FILES,
    };
    for limit in std::iter::once(&files).chain(limits) {
        let resource = resource(&limit.name)
            .ok_or_else(|| Failure::other(format!("unknown resource limit {:?}", limit.name)))?;
        // All ones is RLIM_INFINITY, which is None in rustix.
        let value = |n: u64| (n != u64::MAX).then_some(n);
        setrlimit(
            resource,
            Rlimit {
                current: value(limit.soft),
                maximum: value(limit.hard),
            },
        )
        .stage_on("set limit", &limit.name)?;
    }
    Ok(())
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return None,
    })
}
