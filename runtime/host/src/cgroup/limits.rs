// SPDX-License-Identifier: Apache-2.0
//! What a VM may use of the host, as the files of a cgroup.

use std::fs;
use std::path::Path;

use super::held_bytes;

const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;

/// What a VM may use of the host; `None` and empty: as much as there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostLimits {
    pub memory_bytes: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// As cgroup v1 counts them, [2, 262144].
    pub cpu_shares: Option<u64>,
    /// Lists of CPUs and NUMA nodes.
    pub cpus: String,
    pub nodes: String,
}

/// Each as far as the host can; what it cannot is said in the log.
pub(super) fn write(path: &Path, limits: &HostLimits) {
    let mut files = vec![
        ("cpu.max", cpu_max(limits.cpu_millis)),
        ("cpu.weight", weight(limits.cpu_shares).to_string()),
        ("cpuset.cpus", limits.cpus.clone()),
        ("cpuset.mems", limits.nodes.clone()),
    ];
    if let Some(limit) = memory_max(path, limits.memory_bytes) {
        files.push(("memory.max", limit));
    }
    for (file, value) in files {
        // An empty list of CPUs is written as a line, or the kernel sees nothing.
        if let Err(e) = fs::write(path.join(file), format!("{value}\n")) {
            tracing::debug!("{}: {file} = {value:?}: {e}", path.display());
        }
    }
}

/// A limit below what the VM holds would have the kernel kill it: then the old one stays until the next change.
fn memory_max(path: &Path, limit: Option<u64>) -> Option<String> {
    let Some(limit) = limit else {
        return Some("max".to_owned());
    };
    let held = held_bytes(path).unwrap_or(0);
    if held > limit {
        tracing::warn!(
            "{}: the VM holds {held} bytes, more than its new limit of {limit}: the host keeps the old limit, the guest \
             has the new one",
            path.display()
        );
        return None;
    }
    Some(limit.to_string())
}

fn cpu_max(millis: Option<u64>) -> String {
    const PERIOD_US: u64 = 100_000;
    match millis {
        // The kernel takes no less than a millisecond.
        Some(millis) => format!(
            "{} {PERIOD_US}",
            (millis.saturating_mul(PERIOD_US / 1000)).max(1000)
        ),
        None => format!("max {PERIOD_US}"),
    }
}

/// On cgroup v2's scale [1, 10000], as kubelet and runc convert it.
pub(super) fn weight(shares: Option<u64>) -> u64 {
    shares.map_or(100, |shares| {
        1 + (shares.clamp(MIN_SHARES, MAX_SHARES) - MIN_SHARES) * 9999 / (MAX_SHARES - MIN_SHARES)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_files_and_none_lifts_them() {
        let directory = tempfile::tempdir().unwrap();
        let read = |file: &str| fs::read_to_string(directory.path().join(file)).unwrap();
        write(
            directory.path(),
            &HostLimits {
                memory_bytes: Some(1 << 20),
                cpu_millis: Some(1500),
                cpu_shares: Some(1024),
                cpus: "0-1".into(),
                nodes: String::new(),
            },
        );
        assert_eq!(read("memory.max"), "1048576\n");
        assert_eq!(read("cpu.max"), "150000 100000\n");
        assert_eq!(read("cpu.weight"), "39\n");
        assert_eq!(read("cpuset.cpus"), "0-1\n");
        write(directory.path(), &HostLimits::default());
        assert_eq!(read("memory.max"), "max\n");
        assert_eq!(read("cpu.max"), "max 100000\n");
        assert_eq!(read("cpu.weight"), "100\n");
    }

    #[test]
    fn a_vm_is_not_killed_by_a_limit_below_what_it_holds() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("memory.current"), "5000\n").unwrap();
        assert_eq!(memory_max(directory.path(), Some(4000)), None);
        assert_eq!(memory_max(directory.path(), Some(6000)).unwrap(), "6000");
    }
}
