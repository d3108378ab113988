// SPDX-License-Identifier: Apache-2.0
//! Limits a guest's statistics to what can be true.
//!
//! The guest counts them itself, and its kernel may lie. So memory, disk and CPU time are capped at what the host has
//! given to the VM. Averages are limited to 0 to 100 percent. Pure.

use std::collections::HashSet;
use std::time::Duration;

use crate::protocol::{
    CgroupStatistics, ContainerStatistics, Pressure, PressureLine, StatisticsResponse,
};

/// The longest name of a device or page size that is accepted.
const NAME_BYTES: usize = 16;
const MAX_HUGEPAGE_SIZES: usize = 8;
const MAX_DEVICES: usize = 16;

/// The most that a guest can have used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub memory_bytes: u64,
    pub scratch_bytes: u64,
    /// The time of all vCPUs since the boot.
    pub cpu: Duration,
}

impl Bounds {
    /// Limits all numbers of an answer, removes containers that are not `known` or come again, and fills in zeros for
    /// what is missing.
    pub fn cut(
        &self,
        mut answer: StatisticsResponse,
        known: impl Fn(&str) -> bool,
    ) -> StatisticsResponse {
        let mut seen = HashSet::new();
        answer
            .containers
            .retain(|container| known(&container.id) && seen.insert(container.id.clone()));
        for container in &mut answer.containers {
            self.cut_container(container);
        }
        let mut guest = answer.guest.unwrap_or_default();
        guest.pod = Some(self.cgroup(guest.pod.take()));
        guest.cpu_usage_us = guest.cpu_usage_us.min(self.cpu_us());
        guest.memory_total_bytes = guest.memory_total_bytes.min(self.memory_bytes);
        guest.memory_available_bytes = guest.memory_available_bytes.min(guest.memory_total_bytes);
        if let Some(scratch) = &mut guest.scratch {
            scratch.total_bytes = scratch.total_bytes.min(self.scratch_bytes);
            scratch.free_bytes = scratch.free_bytes.min(scratch.total_bytes);
            // An inode takes more than a byte, so there are fewer inodes than bytes.
            scratch.total_inodes = scratch.total_inodes.min(self.scratch_bytes);
            scratch.free_inodes = scratch.free_inodes.min(scratch.total_inodes);
        }
        answer.guest = Some(guest);
        answer
    }

    fn cut_container(&self, container: &mut ContainerStatistics) {
        container.cgroup = Some(self.cgroup(container.cgroup.take()));
        // A process needs at least one page of its own.
        let processes = self.memory_bytes / 4096;
        container.processes = container.processes.min(processes);
        container.file_descriptors = container.file_descriptors.min(self.memory_bytes);
        container.sockets = container.sockets.min(container.file_descriptors);
        if let Some(layer) = &mut container.writable_layer {
            layer.bytes = layer.bytes.min(self.scratch_bytes);
            layer.inodes = layer.inodes.min(self.scratch_bytes);
        }
    }

    /// Limits the numbers of one cgroup.
    fn cgroup(&self, said: Option<CgroupStatistics>) -> CgroupStatistics {
        let mut cut = said.unwrap_or_default();
        let most = self.cpu_us();
        let mut cpu = cut.cpu.unwrap_or_default();
        cpu.usage_us = cpu.usage_us.min(most);
        cpu.user_us = cpu.user_us.min(cpu.usage_us);
        cpu.system_us = cpu.system_us.min(cpu.usage_us);
        cut.cpu = Some(cpu);
        let mut memory = cut.memory.unwrap_or_default();
        for bytes in [
            &mut memory.current_bytes,
            &mut memory.peak_bytes,
            &mut memory.anon_bytes,
            &mut memory.file_bytes,
            &mut memory.inactive_file_bytes,
            &mut memory.file_mapped_bytes,
            &mut memory.kernel_bytes,
        ] {
            *bytes = (*bytes).min(self.memory_bytes);
        }
        memory.swap_bytes = memory.swap_bytes.min(self.scratch_bytes);
        cut.memory = Some(memory);
        cut.tasks = cut.tasks.min(self.memory_bytes / 4096);
        for pressure in [
            &mut cut.cpu_pressure,
            &mut cut.memory_pressure,
            &mut cut.io_pressure,
        ] {
            *pressure = pressure.as_ref().map(plain_pressure);
        }
        // A name that came twice would be two values of one metric.
        let mut devices = HashSet::new();
        cut.io
            .retain(|device| is_name(&device.name) && devices.insert(device.name.clone()));
        cut.io.truncate(MAX_DEVICES);
        let mut sizes = HashSet::new();
        cut.hugepages
            .retain(|usage| is_name(&usage.page_size) && sizes.insert(usage.page_size.clone()));
        cut.hugepages.truncate(MAX_HUGEPAGE_SIZES);
        for usage in &mut cut.hugepages {
            usage.current_bytes = usage.current_bytes.min(self.memory_bytes);
        }
        cut
    }

    fn cpu_us(&self) -> u64 {
        u64::try_from(self.cpu.as_micros()).unwrap_or(u64::MAX)
    }
}

/// Whether the name of a device or page size can be used as the label of a metric.
fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    !name.is_empty() && name.len() <= NAME_BYTES && name.bytes().all(plain)
}

fn plain_pressure(said: &Pressure) -> Pressure {
    let percent = |value: f64| {
        if value.is_finite() {
            value.clamp(0.0, 100.0)
        } else {
            0.0
        }
    };
    let line = |line: PressureLine| PressureLine {
        avg10: percent(line.avg10),
        avg60: percent(line.avg60),
        avg300: percent(line.avg300),
        total_us: line.total_us,
    };
    Pressure {
        some: said.some.map(line),
        full: said.full.map(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{
        CpuStatistics, DeviceIo, GuestStatistics, HugepageUsage, MemoryStatistics, WritableLayer,
    };

    const BOUNDS: Bounds = Bounds {
        memory_bytes: 1 << 30,
        scratch_bytes: 1 << 32,
        cpu: Duration::from_secs(10),
    };

    #[test]
    fn a_guest_cannot_have_used_more_than_it_was_given() {
        let lie = CgroupStatistics {
            cpu: Some(CpuStatistics {
                usage_us: u64::MAX,
                user_us: u64::MAX,
                ..Default::default()
            }),
            memory: Some(MemoryStatistics {
                current_bytes: u64::MAX,
                limit_bytes: u64::MAX,
                ..Default::default()
            }),
            cpu_pressure: Some(Pressure {
                some: Some(PressureLine {
                    avg10: f64::NAN,
                    avg60: -3.0,
                    avg300: 1e9,
                    total_us: 1,
                }),
                full: None,
            }),
            hugepages: vec![HugepageUsage {
                page_size: "../2MB".into(),
                current_bytes: 1,
            }],
            ..Default::default()
        };
        let answer = StatisticsResponse {
            guest: Some(GuestStatistics {
                pod: Some(lie.clone()),
                ..Default::default()
            }),
            containers: vec![
                ContainerStatistics {
                    id: "known".into(),
                    cgroup: Some(lie),
                    writable_layer: Some(WritableLayer {
                        bytes: u64::MAX,
                        inodes: 2,
                        cut: false,
                    }),
                    ..Default::default()
                },
                ContainerStatistics {
                    id: "invented".into(),
                    ..Default::default()
                },
                // Otherwise one could be shown and the other one be added up.
                ContainerStatistics {
                    id: "known".into(),
                    ..Default::default()
                },
            ],
        };
        let cut = BOUNDS.cut(answer, |id| id == "known");
        assert_eq!(cut.containers.len(), 1);
        let container = cut.containers.first().unwrap();
        let cgroup = container.cgroup.as_ref().unwrap();
        assert_eq!(cgroup.cpu.unwrap().usage_us, 10_000_000);
        assert_eq!(cgroup.cpu.unwrap().user_us, 10_000_000);
        assert_eq!(cgroup.memory.unwrap().current_bytes, 1 << 30);
        assert_eq!(
            cgroup.memory.unwrap().limit_bytes,
            u64::MAX,
            "no limit is none"
        );
        let some = cgroup.cpu_pressure.as_ref().unwrap().some.unwrap();
        assert_eq!((some.avg10, some.avg60, some.avg300), (0.0, 0.0, 100.0));
        assert!(cgroup.hugepages.is_empty());
        assert_eq!(container.writable_layer.unwrap().bytes, 1 << 32);
    }

    #[test]
    fn what_a_guest_repeats_counts_once() {
        let again = |number: usize| ContainerStatistics {
            id: if number == 5 { "second" } else { "first" }.into(),
            processes: 1,
            cgroup: Some(CgroupStatistics {
                io: vec![
                    DeviceIo {
                        name: "vdb".into(),
                        ..Default::default()
                    };
                    20
                ],
                hugepages: vec![
                    HugepageUsage {
                        page_size: "2MB".into(),
                        current_bytes: 1,
                    };
                    20
                ],
                ..Default::default()
            }),
            ..Default::default()
        };
        let answer = StatisticsResponse {
            guest: None,
            containers: (0..1000).map(again).collect(),
        };
        let cut = BOUNDS.cut(answer, |_| true);
        let ids: Vec<_> = cut.containers.iter().map(|one| one.id.as_str()).collect();
        assert_eq!(ids, ["first", "second"]);
        for container in cut.containers {
            let cgroup = container.cgroup.unwrap();
            assert_eq!((cgroup.io.len(), cgroup.hugepages.len()), (1, 1));
        }
    }

    #[test]
    fn what_is_missing_is_zero() {
        let cut = BOUNDS.cut(StatisticsResponse::default(), |_| true);
        let guest = cut.guest.unwrap();
        assert_eq!(guest.pod.unwrap().cpu.unwrap().usage_us, 0);
        assert!(guest.scratch.is_none());
    }
}
