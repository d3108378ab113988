// SPDX-License-Identifier: Apache-2.0
//! What a VM uses on the host: read from its cgroup or, if it has none, from its process; and what its files take.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// One clock tick in `/proc/<pid>/stat`. USER_HZ is 100 on all platforms with KVM that we support.
const TICKS_NS: u64 = 10_000_000;
/// The unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;

/// The usage as the host counts it, so the guest cannot falsify it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostUsage {
    pub cpu_ns: u64,
    pub memory_bytes: u64,
    /// Page cache that the host can reclaim at once.
    pub inactive_file_bytes: u64,
    pub anon_bytes: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// `None` if the host does not count it, or the VM has no cgroup.
    pub pressure: Option<HostPressure>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostPressure {
    pub cpu: Stall,
    pub memory: Stall,
    pub io: Stall,
}

/// Pressure on one resource: the time in which some tasks were stalled, and that in which all were.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    pub some: StallLine,
    pub full: StallLine,
}

/// A line of a pressure file. The averages are percentages of the last 10, 60 and 300 seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StallLine {
    pub averages: [f64; 3],
    pub total_us: u64,
}

impl HostUsage {
    /// Reads the VM's own cgroup. If there is none, or it lacks the controllers, reads /proc of the process `pid`.
    pub fn read(cgroup: Option<&Path>, pid: i32) -> Self {
        cgroup
            .and_then(Self::of_cgroup)
            .unwrap_or_else(|| Self::of_process(Path::new(&format!("/proc/{pid}"))))
    }

    /// Reads a cgroup. `None` if a file is missing, for example because the memory controller is not enabled.
    fn of_cgroup(path: &Path) -> Option<Self> {
        let read = |name: &str| fs::read_to_string(path.join(name));
        let current = read("memory.current").ok()?.trim().parse().ok()?;
        let cpu = read("cpu.stat").ok()?;
        let memory = read("memory.stat").ok()?;
        let stall = |name: &str| read(name).ok().map(|text| stall(&text));
        Some(Self {
            cpu_ns: value(&cpu, "usage_usec")?.saturating_mul(1000),
            memory_bytes: current,
            inactive_file_bytes: value(&memory, "inactive_file").unwrap_or(0),
            anon_bytes: value(&memory, "anon").unwrap_or(0),
            page_faults: value(&memory, "pgfault").unwrap_or(0),
            major_page_faults: value(&memory, "pgmajfault").unwrap_or(0),
            pressure: stall("cpu.pressure").map(|cpu| HostPressure {
                cpu,
                memory: stall("memory.pressure").unwrap_or_default(),
                io: stall("io.pressure").unwrap_or_default(),
            }),
        })
    }

    fn of_process(directory: &Path) -> Self {
        let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
        let stat = read("stat");
        // The process name in parentheses may contain anything, so fields are counted after the last `)`.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let fields: Vec<u64> = fields
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
        let status = read("status");
        let kibibytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            number.unwrap_or(0).saturating_mul(1024)
        };
        Self {
            cpu_ns: (field(14) + field(15)).saturating_mul(TICKS_NS),
            memory_bytes: kibibytes("VmRSS:"),
            inactive_file_bytes: 0,
            anon_bytes: kibibytes("RssAnon:"),
            page_faults: field(10),
            major_page_faults: field(12),
            pressure: None,
        }
    }

    /// The working set as cAdvisor defines it: memory that the kernel cannot reclaim at once.
    pub fn working_set_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.inactive_file_bytes)
    }
}

/// What a file takes on the host's disk: its blocks, without its holes. `None` if it cannot be looked at.
pub fn bytes_on_disk(file: &Path) -> Option<u64> {
    let metadata = fs::symlink_metadata(file).ok()?;
    Some(metadata.blocks().saturating_mul(BLOCK_BYTES))
}

/// The value in a line `key value`.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// Parses a pressure file, which has the line `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and a similar one for
/// full.
fn stall(text: &str) -> Stall {
    let line = |kind: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(kind));
        let word = |key: &str| {
            let mut words = words.unwrap_or_default().split_whitespace();
            words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        };
        let average = |key: &str| word(key).and_then(|text| text.parse().ok()).unwrap_or(0.0);
        StallLine {
            averages: [average("avg10"), average("avg60"), average("avg300")],
            total_us: word("total")
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
        }
    };
    Stall {
        some: line("some "),
        full: line("full "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_that_accounts_is_believed() {
        let directory = tempfile::tempdir().unwrap();
        let none = HostUsage::of_cgroup(directory.path());
        assert_eq!(none, None, "a cgroup without controllers");
        for (name, text) in [
            ("memory.current", "1000\n"),
            ("memory.stat", "anon 600\ninactive_file 300\npgfault 9\n"),
            ("cpu.stat", "usage_usec 7\nuser_usec 4\n"),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\n",
            ),
        ] {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let usage = HostUsage::read(Some(directory.path()), 1);
        assert_eq!(
            (usage.cpu_ns, usage.working_set_bytes(), usage.anon_bytes),
            (7000, 700, 600)
        );
        let pressure = usage.pressure.unwrap();
        assert_eq!(pressure.cpu.some.averages, [1.5, 0.0, 0.0]);
        assert_eq!(pressure.cpu.some.total_us, 42);
        assert_eq!(pressure.memory, Stall::default());
    }

    #[test]
    fn without_a_cgroup_the_process_is_looked_at() {
        let own = i32::try_from(std::process::id()).unwrap();
        let usage = HostUsage::read(None, own);
        assert!(usage.memory_bytes > 1 << 20, "{usage:?}");
        assert!(usage.page_faults > 0, "{usage:?}");
        assert_eq!(HostUsage::read(None, 0).memory_bytes, 0);
    }
}
