// SPDX-License-Identifier: Apache-2.0
//! Checks of the host: privilege, /dev/net/tun, cgroups, disk, clock.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use bulkhead_text::Problem;

const TUN: &str = "/dev/net/tun";
const CGROUPS: &str = "/sys/fs/cgroup/cgroup.controllers";
/// With less free space than this, not even the first image fits.
const MIN_FREE_BYTES: u64 = 1 << 30;
const MIN_FREE_FILES: u64 = 1000;
/// How far the clock may be behind the modification time of our own program's file.
const CLOCK_SLACK: Duration = Duration::from_secs(24 * 3600);

pub fn privilege() -> Result<String, Problem> {
    if rustix::process::geteuid().is_root() {
        return Ok("root".to_owned());
    }
    Err(Problem::new(
        "not root: namespaces, TAPs and mounts cannot be made",
        "run `bulkhead serve` as root; the VMMs give up their privilege by themselves",
    ))
}

/// Checks /dev/net/tun by opening it, because the file may exist without the driver.
pub fn tun() -> Result<String, Problem> {
    match File::options().read(true).write(true).open(TUN) {
        Ok(_) => Ok(format!("{TUN} opens")),
        Err(e) => Err(Problem::new(
            format!("open {TUN}: {e}"),
            "modprobe tun; in a container, give it the device",
        )),
    }
}

/// Checks cgroup v2. Pods also run on a host without it, but then their resources are neither limited nor counted. On one
/// that has it, a pod does not start without the controllers of its limits.
pub fn cgroups(parent: Option<&Path>) -> Result<String, Problem> {
    let Some(parent) = parent else {
        return Ok("not used: cgroup_parent is empty".to_owned());
    };
    let controllers = fs::read_to_string(CGROUPS).map_err(|e| {
        Problem::new(
            format!("no cgroup v2 at /sys/fs/cgroup ({e}): VMMs would not be accounted for"),
            "boot with systemd.unified_cgroup_hierarchy=1, or set `cgroup_parent = \"\"`",
        )
    })?;
    let missing: Vec<_> = ["cpu", "memory", "pids"]
        .into_iter()
        .filter(|name| !controllers.split_whitespace().any(|one| one == *name))
        .collect();
    if missing.is_empty() {
        return Ok(format!("version 2, pods below {}", parent.display()));
    }
    Err(Problem::new(
        format!("cgroup v2 lacks the controllers {}", missing.join(", ")),
        "unmount the cgroup v1 hierarchies that hold them, or set `allow_unbounded_vms = true`",
    ))
}

/// Checks the free space of the state directory. If it does not exist yet, its nearest existing ancestor is checked.
pub fn disk(state_dir: &Path, scratch_bytes: u64) -> Result<String, Problem> {
    let existing = state_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let shown = state_dir.display();
    let remedy = "free some space, or set `state_dir` to a larger file system";
    let statistics = rustix::fs::statvfs(existing).map_err(|e| {
        Problem::new(
            format!("read the free space of {}: {e}", existing.display()),
            remedy,
        )
    })?;
    let free_bytes = statistics.f_bavail.saturating_mul(statistics.f_frsize);
    if free_bytes < MIN_FREE_BYTES {
        let free = free_bytes >> 20;
        return Err(Problem::new(
            format!(
                "only {free} MiB are free in {shown}, at least {} MiB are needed",
                MIN_FREE_BYTES >> 20
            ),
            remedy,
        ));
    }
    // Some file systems have no fixed number of inodes and report 0.
    if statistics.f_files > 0 && statistics.f_favail < MIN_FREE_FILES {
        let free = statistics.f_favail;
        return Err(Problem::new(
            format!("{shown} has room for only {free} files, at least {MIN_FREE_FILES} are needed"),
            remedy,
        ));
    }
    Ok(format!(
        "{} GiB free in {shown}; a pod's scratch disk may grow to {} GiB",
        free_bytes >> 30,
        scratch_bytes >> 30
    ))
}

/// Checks the clock, because guests take their time from it, and certificates are checked against it.
pub fn clock() -> Result<String, Problem> {
    let written = std::env::current_exe()
        .and_then(fs::metadata)
        .and_then(|file| file.modified());
    match written {
        Ok(written) => compare_clock(SystemTime::now(), written),
        Err(e) => Err(Problem::new(
            format!("read the modification time of our own program: {e}"),
            "run it from a file",
        )),
    }
}

fn compare_clock(now: SystemTime, program_written: SystemTime) -> Result<String, Problem> {
    if now + CLOCK_SLACK >= program_written {
        return Ok("not before this program was made".to_owned());
    }
    let behind = program_written
        .duration_since(now)
        .unwrap_or_default()
        .as_secs()
        / (24 * 3600);
    Err(Problem::new(
        format!("the clock is {behind} days before this program was made"),
        "set it (ntpd, chrony, systemd-timesyncd): guests and certificates depend on it",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_not_there_yet_has_its_ancestors_space() {
        let directory = tempfile::tempdir().unwrap();
        let looked = disk(&directory.path().join("not/yet"), 10 << 30);
        let text = looked.unwrap_or_else(|problem| problem.to_string());
        assert!(text.contains("not/yet"), "{text}");
    }

    #[test]
    fn a_clock_before_the_program_was_made_is_wrong() {
        let day = Duration::from_secs(24 * 3600);
        let written = SystemTime::UNIX_EPOCH + day * 20_000;
        assert!(compare_clock(written + day, written).is_ok());
        assert!(compare_clock(written - day / 2, written).is_ok());
        let problem = compare_clock(SystemTime::UNIX_EPOCH, written).unwrap_err();
        assert!(problem.cause.contains("20000 days"), "{problem}");
    }

    #[test]
    fn cgroups_that_nobody_wants_are_no_problem() {
        assert!(cgroups(None).is_ok());
    }
}
