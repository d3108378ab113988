// SPDX-License-Identifier: Apache-2.0
//! What this node has: CPUs, NUMA nodes, memory.

use std::fs;

use crate::pod::life::spec::Resources;
use crate::pod::plan::limits::check_list;
use crate::pod::plan::program::ProgramError;

const ONLINE_CPUS: &str = "/sys/devices/system/cpu/online";
const ONLINE_NODES: &str = "/sys/devices/system/node/online";
const MEMORY: &str = "/proc/meminfo";

/// The node's memory now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
}

impl Memory {
    pub fn read() -> Self {
        Self::parse(&fs::read_to_string(MEMORY).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let field = |name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kibibytes =
                line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            kibibytes.unwrap_or(0).saturating_mul(1024)
        };
        Self {
            total_bytes: field("MemTotal:"),
            available_bytes: field("MemAvailable:"),
        }
    }
}

/// How many CPUs this daemon may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Checks that the host has the CPUs and NUMA nodes that are named.
pub fn check_placement(resources: &Resources) -> Result<(), ProgramError> {
    for (name, list, online) in [
        ("cpuset_cpus", &resources.cpuset_cpus, ONLINE_CPUS),
        ("cpuset_mems", &resources.cpuset_mems, ONLINE_NODES),
    ] {
        check_list(name, list, &fs::read_to_string(online).unwrap_or_default())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Memory;

    #[test]
    fn memory_is_read_in_bytes_and_what_is_not_told_is_nothing() {
        let text = "MemTotal:        2048 kB\nMemFree:  1 kB\nMemAvailable:    1024 kB\n";
        let memory = Memory::parse(text);
        assert_eq!(
            (memory.total_bytes, memory.available_bytes),
            (2 << 20, 1 << 20)
        );
        assert_eq!(Memory::parse("").total_bytes, 0);
    }
}
