// SPDX-License-Identifier: Apache-2.0
//! Functions that take the values of metrics from a reading.

use bulkhead_network::Direction;
use bulkhead_proto::agent::disk;

use crate::pod::life::record::ContainerRecord;
use crate::pod::readings::{
    CgroupStatistics, ContainerReading, CpuStatistics, DeviceIo, FilesystemStatistics,
    HostPressure, MemoryStatistics, Pressure, Reading, Stall,
};

pub const NANOSECONDS: u64 = 1_000_000_000;
pub const MICROSECONDS: u64 = 1_000_000;

/// A running container and its reading.
pub struct Subject<'a> {
    pub record: &'a ContainerRecord,
    pub container: &'a ContainerReading,
    pub reading: &'a Reading,
}

/// One value, with the labels in addition to those that all metrics have.
pub struct Value {
    pub labels: Vec<String>,
    pub value: u64,
}

pub fn one(value: u64) -> Vec<Value> {
    vec![Value {
        labels: Vec::new(),
        value,
    }]
}

pub fn labelled(label: &str, value: u64) -> Vec<Value> {
    vec![Value {
        labels: vec![label.to_owned()],
        value,
    }]
}

/// A value that CRI sets to 0 for "not set".
pub fn known(value: u64) -> Vec<Value> {
    if value == 0 { Vec::new() } else { one(value) }
}

/// A limit of CRI, where a negative number means "no limit" and becomes 0.
pub fn asked(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

pub fn cgroup<'a>(of: &'a Subject) -> &'a CgroupStatistics {
    static NOTHING: std::sync::LazyLock<CgroupStatistics> =
        std::sync::LazyLock::new(CgroupStatistics::default);
    of.container.statistics.cgroup.as_ref().unwrap_or(&NOTHING)
}

pub fn cpu(of: &Subject) -> CpuStatistics {
    cgroup(of).cpu.unwrap_or_default()
}

pub fn memory(of: &Subject) -> MemoryStatistics {
    cgroup(of).memory.unwrap_or_default()
}

/// The working set as cAdvisor defines it: memory in use without inactive page cache.
pub fn working_set(memory: &MemoryStatistics) -> u64 {
    memory
        .current_bytes
        .saturating_sub(memory.inactive_file_bytes)
}

/// cgroup v2 always includes the cgroups below, so cAdvisor's two scopes have the same value.
pub fn page_faults(all: u64, major: u64) -> Vec<Value> {
    let value = |kind: &str, scope: &str, value| Value {
        labels: vec![kind.to_owned(), scope.to_owned()],
        value,
    };
    vec![
        value("pgfault", "container", all),
        value("pgmajfault", "container", major),
        value("pgfault", "hierarchy", all),
        value("pgmajfault", "hierarchy", major),
    ]
}

pub fn some(pressure: Option<&Pressure>) -> Vec<Value> {
    let line = pressure.and_then(|pressure| pressure.some);
    line.map_or_else(Vec::new, |line| one(line.total_us / MICROSECONDS))
}

pub fn full(pressure: Option<&Pressure>) -> Vec<Value> {
    let line = pressure.and_then(|pressure| pressure.full);
    line.map_or_else(Vec::new, |line| one(line.total_us / MICROSECONDS))
}

pub fn host_some(of: &Reading, stall: fn(&HostPressure) -> &Stall) -> Vec<Value> {
    let pressure = of.host.pressure.as_ref();
    pressure.map_or_else(Vec::new, |host| {
        one(stall(host).some.total_us / MICROSECONDS)
    })
}

pub fn host_full(of: &Reading, stall: fn(&HostPressure) -> &Stall) -> Vec<Value> {
    let pressure = of.host.pressure.as_ref();
    pressure.map_or_else(Vec::new, |host| {
        one(stall(host).full.total_us / MICROSECONDS)
    })
}

/// A value with the label of the scratch disk, which holds the writable layers.
pub fn on_scratch_disk(value: u64) -> Vec<Value> {
    labelled(&format!("/dev/{}", disk::SCRATCH), value)
}

pub fn scratch(of: &Subject, value: fn(&FilesystemStatistics) -> u64) -> Vec<Value> {
    let scratch = of.reading.guest.scratch.as_ref();
    scratch.map_or_else(Vec::new, |scratch| on_scratch_disk(value(scratch)))
}

pub fn devices(of: &Subject, value: fn(&DeviceIo) -> u64) -> Vec<Value> {
    let io = cgroup(of).io.iter();
    io.map(|device| Value {
        labels: vec![format!("/dev/{}", device.name)],
        value: value(device),
    })
    .collect()
}

pub fn block_io(of: &Subject) -> Vec<Value> {
    let operations = |device: &DeviceIo| {
        [("Read", device.read_bytes), ("Write", device.written_bytes)].map(|(operation, value)| {
            Value {
                labels: vec![
                    format!("/dev/{}", device.name),
                    device.major.to_string(),
                    device.minor.to_string(),
                    operation.to_owned(),
                ],
                value,
            }
        })
    };
    cgroup(of).io.iter().flat_map(operations).collect()
}

pub fn received(of: &Reading, value: fn(&Direction) -> u64) -> Vec<Value> {
    let network = of.network.as_ref();
    network.map_or_else(Vec::new, |(name, counters)| {
        labelled(name, value(&counters.received))
    })
}

pub fn sent(of: &Reading, value: fn(&Direction) -> u64) -> Vec<Value> {
    let network = of.network.as_ref();
    network.map_or_else(Vec::new, |(name, counters)| {
        labelled(name, value(&counters.sent))
    })
}
