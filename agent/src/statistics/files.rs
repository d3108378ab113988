// SPDX-License-Identifier: Apache-2.0
//! Parses the kernel's statistics files. Pure. A value that is missing or not valid counts as zero.

use std::collections::BTreeMap;

use bulkhead_proto::agent::{CpuStatistics, DeviceIo, MemoryStatistics, Pressure, PressureLine};

/// The value of a limit file if there is no limit.
const NONE: &str = "max";
/// A guest has only a few disks. More than this are not expected and left out.
const MAX_DEVICES: usize = 16;

/// A file with lines of `key value`, such as cpu.stat, memory.stat and memory.events.
pub struct Keyed<'a>(BTreeMap<&'a str, u64>);

impl<'a> Keyed<'a> {
    pub fn parse(text: &'a str) -> Self {
        let pair = |line: &'a str| {
            let (key, value) = line.split_once(' ')?;
            Some((key, value.trim().parse().ok()?))
        };
        Self(text.lines().filter_map(pair).collect())
    }

    pub fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

pub fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A limit. All ones if there is none.
pub fn limit(text: &str) -> u64 {
    match text.trim() {
        NONE => u64::MAX,
        value => number(value),
    }
}

/// Parses cpu.stat.
pub fn cpu(text: &str) -> CpuStatistics {
    let stat = Keyed::parse(text);
    CpuStatistics {
        usage_us: stat.get("usage_usec"),
        user_us: stat.get("user_usec"),
        system_us: stat.get("system_usec"),
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_us: stat.get("throttled_usec"),
    }
}

/// Parses memory.stat and memory.events. The caller adds the values of files with a single number.
pub fn memory(stat: &str, events: &str) -> MemoryStatistics {
    let stat = Keyed::parse(stat);
    let events = Keyed::parse(events);
    MemoryStatistics {
        anon_bytes: stat.get("anon"),
        file_bytes: stat.get("file"),
        inactive_file_bytes: stat.get("inactive_file"),
        file_mapped_bytes: stat.get("file_mapped"),
        kernel_bytes: stat.get("kernel"),
        page_faults: stat.get("pgfault"),
        major_page_faults: stat.get("pgmajfault"),
        limit_hits: events.get("max"),
        oom_kills: events.get("oom_kill"),
        ..Default::default()
    }
}

/// Parses cpu.pressure and similar files: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
pub fn pressure(text: &str) -> Pressure {
    let line = |kind: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let mut pressure = PressureLine::default();
        for (key, value) in words
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            let average = || value.parse().unwrap_or(0.0);
            match key {
                "avg10" => pressure.avg10 = average(),
                "avg60" => pressure.avg60 = average(),
                "avg300" => pressure.avg300 = average(),
                "total" => pressure.total_us = number(value),
                _ => {}
            }
        }
        Some(pressure)
    };
    Pressure {
        some: line("some "),
        full: line("full "),
    }
}

/// Parses io.stat: `253:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
pub fn io(text: &str) -> Vec<DeviceIo> {
    let device = |line: &str| {
        let (device, words) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let mut io = DeviceIo {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        };
        for (key, value) in words
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            match key {
                "rbytes" => io.read_bytes = number(value),
                "wbytes" => io.written_bytes = number(value),
                "rios" => io.reads = number(value),
                "wios" => io.writes = number(value),
                _ => {}
            }
        }
        Some(io)
    };
    text.lines().filter_map(device).take(MAX_DEVICES).collect()
}

/// The name of a block device, from its uevent file.
pub fn device_name(text: &str) -> String {
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.unwrap_or_default().to_owned()
}

/// The value of a line of /proc/meminfo, in bytes.
pub fn meminfo(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kibibytes = line.and_then(|line| line.split_whitespace().next());
    kibibytes.map_or(0, number).saturating_mul(1024)
}

/// The soft limit of open files, from `/proc/<pid>/limits`. All ones if there is none.
pub fn open_files_limit(text: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    match line.and_then(|line| line.split_whitespace().next()) {
        Some("unlimited") => u64::MAX,
        value => value.map_or(0, number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_files_are_read_by_key_and_nonsense_is_zero() {
        let read =
            cpu("usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_throttled x\nthrottled_usec -1\n");
        assert_eq!(
            (
                read.usage_us,
                read.user_us,
                read.system_us,
                read.throttled_periods,
                read.throttled_us
            ),
            (7, 4, 3, 0, 0)
        );
        let read = memory(
            "anon 1\nfile 2\ninactive_file 3\nkernel 4\n",
            "max 5\noom 9\noom_kill 6\n",
        );
        assert_eq!(
            (
                read.anon_bytes,
                read.inactive_file_bytes,
                read.kernel_bytes,
                read.limit_hits,
                read.oom_kills
            ),
            (1, 3, 4, 5, 6)
        );
    }

    #[test]
    fn limits_are_numbers_or_none() {
        assert_eq!(limit("max\n"), u64::MAX);
        assert_eq!(limit("12\n"), 12);
        assert_eq!(limit(""), 0);
    }

    #[test]
    fn pressure_has_two_lines_of_which_one_may_be_missing() {
        let read = pressure("some avg10=1.50 avg60=0.25 avg300=0.00 total=42\n");
        let some = read.some.unwrap();
        assert_eq!((some.avg10, some.avg60, some.total_us), (1.5, 0.25, 42));
        assert!(read.full.is_none());
        let read = pressure("some total=1\nfull avg10=x total=2\n");
        assert_eq!(
            read.full.map(|line| (line.avg10, line.total_us)),
            Some((0.0, 2))
        );
    }

    #[test]
    fn io_is_told_by_device() {
        let read = io("253:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\nnonsense\n253:0 \n");
        assert_eq!(read.len(), 2);
        assert_eq!(
            (
                read[0].major,
                read[0].minor,
                read[0].read_bytes,
                read[0].writes
            ),
            (253, 16, 1, 4)
        );
    }

    #[test]
    fn proc_files_are_read_by_their_names() {
        let text = "MemTotal:         100 kB\nMemAvailable:      60 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), 102_400);
        assert_eq!(meminfo(text, "MemAvailable"), 61_440);
        assert_eq!(meminfo(text, "Mem"), 0);
        assert_eq!(device_name("MAJOR=254\nDEVNAME=vdb\n"), "vdb");
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max open files            1024                 4096                 files\n";
        assert_eq!(open_files_limit(text), 1024);
        assert_eq!(
            open_files_limit("Max open files  unlimited unlimited files"),
            u64::MAX
        );
    }
}
