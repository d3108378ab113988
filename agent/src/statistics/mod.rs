// SPDX-License-Identifier: Apache-2.0
//! What the guest's kernel counts, for `Statistics`: raw numbers, which the daemon checks and adds up.
//!
//! Everything here reads files, so it must be called from a thread that may block. At most 64 KiB of a file are read.
//! Counting descriptors is limited in number and in time, so that the answer comes in time.

pub mod files;
pub mod writable;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use bulkhead_proto::agent::{
    CgroupStatistics, DeviceIo, FilesystemStatistics, GuestStatistics, HugepageUsage,
    MemoryStatistics,
};

use crate::disk::scratch;

const FILE_BYTES: u64 = 64 << 10;
const MAX_HUGEPAGE_SIZES: usize = 8;
/// The most descriptors that are counted in one container.
const MAX_DESCRIPTORS: u64 = 65_536;

/// The open descriptors of a container's processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptors {
    pub open: u64,
    pub sockets: u64,
}

/// Reads a cgroup's files. A missing file counts as zero.
pub fn cgroup(directory: &Path) -> CgroupStatistics {
    let read = |name: &str| read(&directory.join(name));
    let memory = files::memory(&read("memory.stat"), &read("memory.events"));
    CgroupStatistics {
        cpu: Some(files::cpu(&read("cpu.stat"))),
        memory: Some(MemoryStatistics {
            current_bytes: files::number(&read("memory.current")),
            peak_bytes: files::number(&read("memory.peak")),
            limit_bytes: files::limit(&read("memory.max")),
            swap_bytes: files::number(&read("memory.swap.current")),
            ..memory
        }),
        cpu_pressure: Some(files::pressure(&read("cpu.pressure"))),
        memory_pressure: Some(files::pressure(&read("memory.pressure"))),
        io_pressure: Some(files::pressure(&read("io.pressure"))),
        tasks: files::number(&read("pids.current")),
        tasks_limit: files::limit(&read("pids.max")),
        io: devices(&read("io.stat")),
        hugepages: hugepages(directory),
    }
}

/// Parses io.stat and adds the names of the devices.
fn devices(text: &str) -> Vec<DeviceIo> {
    let mut devices = files::io(text);
    for device in &mut devices {
        let file = format!("/sys/dev/block/{}:{}/uevent", device.major, device.minor);
        device.name = files::device_name(&read(Path::new(&file)));
    }
    devices
}

fn hugepages(directory: &Path) -> Vec<HugepageUsage> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let page_size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            // Files about reservations have similar names.
            let plain = !page_size.contains('.');
            plain.then(|| HugepageUsage {
                page_size: page_size.to_owned(),
                current_bytes: files::number(&read(&entry.path())),
            })
        })
        .take(MAX_HUGEPAGE_SIZES)
        .collect();
    found.sort_by(|one, other| one.page_size.cmp(&other.page_size));
    found
}

/// Statistics of the whole guest. `pod` is the cgroup above all containers.
pub fn guest(root: &Path, pod: &Path) -> GuestStatistics {
    let memory = read(Path::new("/proc/meminfo"));
    GuestStatistics {
        pod: Some(cgroup(pod)),
        cpu_usage_us: files::cpu(&read(&root.join("cpu.stat"))).usage_us,
        memory_total_bytes: files::meminfo(&memory, "MemTotal"),
        memory_available_bytes: files::meminfo(&memory, "MemAvailable"),
        scratch: filesystem(Path::new(scratch::MOUNT)),
    }
}

fn filesystem(mount: &Path) -> Option<FilesystemStatistics> {
    let stat = rustix::fs::statvfs(mount).ok()?;
    Some(FilesystemStatistics {
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        total_inodes: stat.f_files,
        free_inodes: stat.f_ffree,
    })
}

/// Counts the descriptors of processes, up to a limit and until `deadline`.
pub fn descriptors(pids: &[i32], deadline: Instant) -> Descriptors {
    let mut counted = Descriptors::default();
    for pid in pids {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.flatten() {
            counted.open += 1;
            let target = fs::read_link(entry.path()).unwrap_or_default();
            counted.sockets += u64::from(target.to_string_lossy().starts_with("socket:"));
            if counted.open >= MAX_DESCRIPTORS {
                return counted;
            }
        }
        if Instant::now() > deadline {
            return counted;
        }
    }
    counted
}

/// How many files a process may have open. Zero if the process is gone.
pub fn open_files_limit(pid: i32) -> u64 {
    files::open_files_limit(&read(Path::new(&format!("/proc/{pid}/limits"))))
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    // A file that cannot be read counts as empty.
    let _ = File::open(path).and_then(|file| file.take(FILE_BYTES).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_read_from_its_files() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("cpu.stat", "usage_usec 9\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("pids.current", "3\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.rsvd.current", "7\n"),
        ] {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let read = cgroup(directory.path());
        let memory = read.memory.unwrap();
        assert_eq!(read.cpu.unwrap().usage_us, 9);
        assert_eq!(
            (memory.current_bytes, memory.limit_bytes, memory.peak_bytes),
            (4096, u64::MAX, 0)
        );
        assert_eq!(read.tasks, 3);
        assert_eq!(read.hugepages.len(), 1);
        assert_eq!(read.hugepages[0].current_bytes, 2 << 20);
    }

    #[test]
    fn descriptors_of_this_process_are_counted_with_its_sockets() {
        let own = i32::try_from(std::process::id()).unwrap();
        let soon = Instant::now() + std::time::Duration::from_secs(10);
        let before = descriptors(&[own], soon);
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let after = descriptors(&[own], soon);
        assert!(
            after.open > 0 && after.sockets >= before.sockets,
            "{before:?} {after:?}"
        );
        assert!(after.sockets >= 2);
        assert_eq!(descriptors(&[], soon), Descriptors::default());
        assert!(open_files_limit(own) > 0);
    }
}
