// SPDX-License-Identifier: Apache-2.0
//! Writes the limits of a VM into the files of its cgroup on the host.

use std::fs;
use std::path::Path;

use super::held_bytes;

const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;

/// The limits of a VM on the host. `None` and empty mean no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostLimits {
    pub memory_bytes: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// On the scale of cgroup v1, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// The list of CPUs, and in `nodes` that of NUMA nodes.
    pub cpus: String,
    pub nodes: String,
}

/// Writes all limits. One that the host cannot set is only logged.
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
        // With a line feed, because the kernel ignores a write of zero bytes, and an empty list must be written too.
        if let Err(e) = fs::write(path.join(file), format!("{value}\n")) {
            tracing::debug!("{}: {file} = {value:?}: {e}", path.display());
        }
    }
}

/// The value for memory.max. `None` if the limit is below what the VM uses, because then the kernel would kill the VM.
/// In that case the old limit stays until the next change.
fn memory_max(path: &Path, limit: Option<u64>) -> Option<String> {
    let Some(limit) = limit else {
        return Some("max".to_owned());
    };
    let held = held_bytes(path).unwrap_or(0);
    if held > limit {
        tracing::warn!(
            "{}: the VM uses {held} bytes, more than its new limit of {limit}: on the host the old limit stays, in the guest \
             the new one applies",
            path.display()
        );
        return None;
    }
    Some(limit.to_string())
}

fn cpu_max(millis: Option<u64>) -> String {
    const PERIOD_US: u64 = 100_000;
    match millis {
        // The kernel accepts no quota below 1 ms.
        Some(millis) => format!(
            "{} {PERIOD_US}",
            (millis.saturating_mul(PERIOD_US / 1000)).max(1000)
        ),
        None => format!("max {PERIOD_US}"),
    }
}

/// Converts shares to a weight of cgroup v2, 1 to 10000, with the same formula as kubelet and runc.
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
