// SPDX-License-Identifier: Apache-2.0
//! Writes the limits of a VM into the files of its cgroup on the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::held_bytes;

/// The most threads of the VMM and the file server together.
const MAX_TASKS: u64 = 1024;
const IO_MAX: &str = "io.max";
/// Limits of the host's pools of huge pages, none of which a VM uses: those of the guest are its own.
const HUGE_PAGES: [&str; 4] = [
    "hugetlb.2MB.max",
    "hugetlb.2MB.rsvd.max",
    "hugetlb.1GB.max",
    "hugetlb.1GB.rsvd.max",
];
const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;

/// The limits of a VM on the host. `None` and empty mean no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostLimits {
    pub memory_bytes: Option<u64>,
    /// How much of its memory may be swapped out.
    pub swap_bytes: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// On the scale of cgroup v1, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// The list of CPUs, and in `nodes` that of NUMA nodes.
    pub cpus: String,
    pub nodes: String,
    /// The kernel's lines for `io.max`, one for each device.
    pub io_max: Vec<String>,
}

/// A limit could not be written.
#[derive(Debug, thiserror::Error)]
#[error("limit {file} to {value:?}")]
pub struct LimitError {
    file: PathBuf,
    value: String,
    source: io::Error,
}

/// A file of the cgroup and what is written to it.
struct Setting {
    file: &'static str,
    value: String,
    /// Whether this bounds the VM. A weight does not, and neither does "no limit".
    bounds: bool,
}

/// Writes all limits. Then returns the first error about one that bounds the VM. Other errors are only logged, because a
/// host may lack files.
pub(super) fn write(path: &Path, limits: &HostLimits) -> Result<(), LimitError> {
    let mut done = Ok(());
    for Setting {
        file,
        value,
        bounds,
    } in settings(path, limits)
    {
        let file = path.join(file);
        // With a line feed, because the kernel ignores a write of zero bytes, and an empty list must be written too.
        match fs::write(&file, format!("{value}\n")) {
            Ok(()) => {}
            Err(source) if bounds => {
                let error = LimitError {
                    file,
                    value,
                    source,
                };
                done = done.and(Err(error));
            }
            Err(e) => tracing::debug!("{} = {value:?}: {e}", file.display()),
        }
    }
    done
}

fn settings(path: &Path, limits: &HostLimits) -> Vec<Setting> {
    let setting = |file, value: String, bounds| Setting {
        file,
        value,
        bounds,
    };
    let (cpus, nodes) = (&limits.cpus, &limits.nodes);
    let mut all = vec![
        setting("pids.max", MAX_TASKS.to_string(), true),
        setting(
            "cpu.max",
            cpu_max(limits.cpu_millis),
            limits.cpu_millis.is_some(),
        ),
        setting("cpu.weight", weight(limits.cpu_shares).to_string(), false),
        setting("cpuset.cpus", cpus.clone(), !cpus.is_empty()),
        setting("cpuset.mems", nodes.clone(), !nodes.is_empty()),
    ];
    all.extend(HUGE_PAGES.map(|file| setting(file, "0".to_owned(), false)));
    if let Some(limit) = memory_max(path, limits.memory_bytes) {
        all.push(setting("memory.max", limit, limits.memory_bytes.is_some()));
    }
    // A kernel without swap lacks this file alone, and has nothing to limit.
    let has = |file: &str| path.join(file).exists();
    if has("memory.swap.max") || !has("memory.max") {
        let limit = limits.swap_bytes.map(|bytes| bytes.to_string());
        let limit = limit.unwrap_or_else(|| "max".to_owned());
        all.push(setting(
            "memory.swap.max",
            limit,
            limits.swap_bytes.is_some(),
        ));
    }
    for line in no_longer(path, &limits.io_max) {
        all.push(setting(IO_MAX, line, false));
    }
    for line in &limits.io_max {
        all.push(setting(IO_MAX, line.clone(), true));
    }
    all
}

/// The lines that lift the limits of devices which are limited now and are not in `wanted`.
fn no_longer(path: &Path, wanted: &[String]) -> Vec<String> {
    let device = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let wanted: Vec<_> = wanted.iter().filter_map(|line| device(line)).collect();
    let now = fs::read_to_string(path.join(IO_MAX)).unwrap_or_default();
    let limited = now.lines().filter_map(device);
    limited
        .filter(|device| !wanted.contains(device))
        .map(|device| format!("{device} rbps=max wbps=max riops=max wiops=max"))
        .collect()
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
        let limits = HostLimits {
            memory_bytes: Some(1 << 20),
            swap_bytes: Some(0),
            cpu_millis: Some(1500),
            cpu_shares: Some(1024),
            cpus: "0-1".into(),
            nodes: String::new(),
            io_max: vec!["8:0 rbps=5".to_owned()],
        };
        write(directory.path(), &limits).unwrap();
        assert_eq!(read("memory.max"), "1048576\n");
        assert_eq!(read("memory.swap.max"), "0\n");
        assert_eq!(read("cpu.max"), "150000 100000\n");
        assert_eq!(read("cpu.weight"), "39\n");
        assert_eq!(read("cpuset.cpus"), "0-1\n");
        assert_eq!(read("io.max"), "8:0 rbps=5\n");
        assert_eq!(read("pids.max"), "1024\n");
        assert_eq!(read("hugetlb.2MB.rsvd.max"), "0\n");
        write(directory.path(), &HostLimits::default()).unwrap();
        assert_eq!(read("memory.max"), "max\n");
        assert_eq!(read("memory.swap.max"), "max\n");
        assert_eq!(read("cpu.max"), "max 100000\n");
        assert_eq!(read("cpu.weight"), "100\n");
        assert_eq!(
            read("io.max"),
            "8:0 rbps=max wbps=max riops=max wiops=max\n"
        );
    }

    #[test]
    fn a_limit_that_cannot_be_written_is_an_error_and_the_others_are_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let bound = HostLimits {
            memory_bytes: Some(1 << 20),
            swap_bytes: Some(7),
            cpu_millis: Some(1500),
            cpu_shares: Some(1024),
            cpus: "0".into(),
            nodes: "0".into(),
            io_max: vec!["8:0 rbps=5".to_owned()],
        };
        for (file, is_error) in [
            ("memory.max", true),
            ("memory.swap.max", true),
            ("cpu.max", true),
            ("cpuset.cpus", true),
            ("cpuset.mems", true),
            ("pids.max", true),
            ("io.max", true),
            ("cpu.weight", false),
        ] {
            let _ = fs::remove_file(path.join(file));
            // To a directory nobody can write.
            fs::create_dir(path.join(file)).unwrap();
            let written = write(path, &bound).map_err(|e| e.to_string());
            assert_eq!(written.is_err(), is_error, "{file}: {written:?}");
            if let Err(words) = written {
                assert!(words.contains(file), "{words}");
            }
            fs::remove_dir(path.join(file)).unwrap();
            fs::write(path.join(file), "").unwrap();
        }
        assert_eq!(
            fs::read_to_string(path.join("cpu.max")).unwrap(),
            "150000 100000\n"
        );
        fs::remove_file(path.join("cpu.max")).unwrap();
        fs::create_dir(path.join("cpu.max")).unwrap();
        write(path, &HostLimits::default()).expect("no limit is wanted there");
    }

    #[test]
    fn a_host_without_swap_has_nothing_to_limit() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("memory.max"), "").unwrap();
        let limits = HostLimits {
            swap_bytes: Some(0),
            ..Default::default()
        };
        write(directory.path(), &limits).unwrap();
        assert!(!directory.path().join("memory.swap.max").exists());
    }

    #[test]
    fn a_vm_is_not_killed_by_a_limit_below_what_it_holds() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("memory.current"), "5000\n").unwrap();
        assert_eq!(memory_max(directory.path(), Some(4000)), None);
        assert_eq!(memory_max(directory.path(), Some(6000)).unwrap(), "6000");
    }
}
