// SPDX-License-Identifier: Apache-2.0
//! The metrics, one row each. Names, units and additional labels are those of cAdvisor
//! (docs/storage/prometheus.md of google/cadvisor).

use super::values::{
    MICROSECONDS, NANOSECONDS, Subject, Value, asked, block_io, cgroup, cpu, devices, full,
    host_full, host_some, known, labelled, memory, on_scratch_disk, one, page_faults, received,
    scratch, sent, some, working_set,
};
use crate::pod::life::state::ContainerState;
use crate::pod::readings::{HugepageUsage, Reading};

/// The kernel's default period in cpu.max.
const DEFAULT_PERIOD_US: u64 = 100_000;
const NO_LIMIT: u64 = u64::MAX;

pub enum Kind {
    Counter,
    Gauge,
}

/// A metric, and where its values come from. There are no values if they are unknown now, or if the metric does not
/// apply to a container or to a pod.
pub struct Row {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub container: fn(&Subject) -> Vec<Value>,
    pub pod: fn(&Reading) -> Vec<Value>,
}

const fn counter(name: &'static str, help: &'static str) -> Row {
    Row {
        name,
        help,
        kind: Kind::Counter,
        labels: &[],
        container: |_| Vec::new(),
        pod: |_| Vec::new(),
    }
}

const fn gauge(name: &'static str, help: &'static str) -> Row {
    Row {
        kind: Kind::Gauge,
        ..counter(name, help)
    }
}

impl Row {
    const fn by(self, labels: &'static [&'static str]) -> Self {
        Self { labels, ..self }
    }

    const fn of_container(self, container: fn(&Subject) -> Vec<Value>) -> Self {
        Self { container, ..self }
    }

    const fn of_pod(self, pod: fn(&Reading) -> Vec<Value>) -> Self {
        Self { pod, ..self }
    }
}

pub const METRICS: &[Row] = &[
    // ---- CPU
    counter(
        "container_cpu_usage_seconds_total",
        "Cumulative CPU time consumed in seconds",
    )
    .by(&["cpu"])
    .of_container(|of| labelled("total", of.container.cpu.total_ns / NANOSECONDS))
    .of_pod(|of| labelled("total", of.cpu.total_ns / NANOSECONDS)),
    counter(
        "container_cpu_user_seconds_total",
        "Cumulative user CPU time consumed in seconds",
    )
    .of_container(|of| one(cpu(of).user_us / MICROSECONDS)),
    counter(
        "container_cpu_system_seconds_total",
        "Cumulative system CPU time consumed in seconds",
    )
    .of_container(|of| one(cpu(of).system_us / MICROSECONDS)),
    counter(
        "container_cpu_cfs_periods_total",
        "Number of elapsed enforcement period intervals",
    )
    .of_container(|of| one(cpu(of).periods)),
    counter(
        "container_cpu_cfs_throttled_periods_total",
        "Number of throttled period intervals",
    )
    .of_container(|of| one(cpu(of).throttled_periods)),
    counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Total time in seconds that the container has been throttled",
    )
    .of_container(|of| one(cpu(of).throttled_us / MICROSECONDS)),
    // ---- memory
    gauge(
        "container_memory_usage_bytes",
        "Memory in use in bytes, including memory that was not used recently",
    )
    .of_container(|of| one(memory(of).current_bytes))
    .of_pod(|of| one(of.host.memory_bytes)),
    gauge(
        "container_memory_working_set_bytes",
        "Working set in bytes: memory that the kernel cannot reclaim at once",
    )
    .of_container(|of| one(working_set(&memory(of))))
    .of_pod(|of| one(of.host.working_set_bytes())),
    gauge(
        "container_memory_max_usage_bytes",
        "Peak memory usage in bytes",
    )
    .of_container(|of| one(memory(of).peak_bytes)),
    gauge("container_memory_rss", "Anonymous memory in bytes")
        .of_container(|of| one(memory(of).anon_bytes))
        .of_pod(|of| one(of.host.anon_bytes)),
    gauge("container_memory_cache", "Page cache in bytes")
        .of_container(|of| one(memory(of).file_bytes)),
    gauge(
        "container_memory_mapped_file",
        "Memory-mapped files in bytes",
    )
    .of_container(|of| one(memory(of).file_mapped_bytes)),
    gauge(
        "container_memory_kernel_usage",
        "Kernel memory allocated in bytes",
    )
    .of_container(|of| one(memory(of).kernel_bytes)),
    gauge("container_memory_swap", "Swap in use in bytes")
        .of_container(|of| one(memory(of).swap_bytes)),
    counter(
        "container_memory_failcnt",
        "Number of times that memory usage hit its limit",
    )
    .of_container(|of| one(memory(of).limit_hits)),
    counter(
        "container_memory_failures_total",
        "Cumulative count of page faults",
    )
    .by(&["failure_type", "scope"])
    .of_container(|of| page_faults(memory(of).page_faults, memory(of).major_page_faults))
    .of_pod(|of| page_faults(of.host.page_faults, of.host.major_page_faults)),
    counter(
        "container_oom_events_total",
        "Number of processes killed because memory ran out",
    )
    .of_container(|of| one(memory(of).oom_kills)),
    gauge(
        "container_hugetlb_usage_bytes",
        "Huge pages in use in bytes",
    )
    .by(&["pagesize"])
    .of_container(|of| {
        let hugepages = &cgroup(of).hugepages;
        let value = |usage: &HugepageUsage| Value {
            labels: vec![usage.page_size.clone()],
            value: usage.current_bytes,
        };
        hugepages.iter().map(value).collect()
    }),
    gauge(
        "container_hugetlb_max_usage_bytes",
        "Peak usage of huge pages in bytes, as seen when statistics were read",
    )
    .by(&["pagesize"])
    .of_container(|of| {
        let hugepages = cgroup(of).hugepages.iter();
        let value = |(usage, most): (&HugepageUsage, &u64)| Value {
            labels: vec![usage.page_size.clone()],
            value: *most,
        };
        hugepages
            .zip(&of.container.hugepage_peaks)
            .map(value)
            .collect()
    }),
    // ---- pressure
    counter(
        "container_pressure_cpu_waiting_seconds_total",
        "Time in seconds that some task waited for a CPU",
    )
    .of_container(|of| some(cgroup(of).cpu_pressure.as_ref()))
    .of_pod(|of| host_some(of, |host| &host.cpu)),
    counter(
        "container_pressure_cpu_stalled_seconds_total",
        "Time in seconds that no task could make progress because all waited for a CPU",
    )
    .of_container(|of| full(cgroup(of).cpu_pressure.as_ref()))
    .of_pod(|of| host_full(of, |host| &host.cpu)),
    counter(
        "container_pressure_memory_waiting_seconds_total",
        "Time in seconds that some task waited for memory",
    )
    .of_container(|of| some(cgroup(of).memory_pressure.as_ref()))
    .of_pod(|of| host_some(of, |host| &host.memory)),
    counter(
        "container_pressure_memory_stalled_seconds_total",
        "Time in seconds that no task could make progress because all waited for memory",
    )
    .of_container(|of| full(cgroup(of).memory_pressure.as_ref()))
    .of_pod(|of| host_full(of, |host| &host.memory)),
    counter(
        "container_pressure_io_waiting_seconds_total",
        "Time in seconds that some task waited for I/O",
    )
    .of_container(|of| some(cgroup(of).io_pressure.as_ref()))
    .of_pod(|of| host_some(of, |host| &host.io)),
    counter(
        "container_pressure_io_stalled_seconds_total",
        "Time in seconds that no task could make progress because all waited for I/O",
    )
    .of_container(|of| full(cgroup(of).io_pressure.as_ref()))
    .of_pod(|of| host_full(of, |host| &host.io)),
    // ---- file systems and disks
    gauge(
        "container_fs_usage_bytes",
        "Bytes that the container wrote to its file system",
    )
    .by(&["device"])
    .of_container(|of| {
        let layer = of.container.statistics.writable_layer;
        layer.map_or_else(Vec::new, |layer| on_scratch_disk(layer.bytes))
    }),
    gauge(
        "container_fs_limit_bytes",
        "Size in bytes of the file system that the pod's containers write to",
    )
    .by(&["device"])
    .of_container(|of| scratch(of, |scratch| scratch.total_bytes)),
    gauge(
        "container_fs_inodes_total",
        "Number of inodes of that file system",
    )
    .by(&["device"])
    .of_container(|of| scratch(of, |scratch| scratch.total_inodes)),
    gauge(
        "container_fs_inodes_free",
        "Number of inodes that are free there",
    )
    .by(&["device"])
    .of_container(|of| scratch(of, |scratch| scratch.free_inodes)),
    counter("container_fs_reads_bytes_total", "Cumulative bytes read")
        .by(&["device"])
        .of_container(|of| devices(of, |device| device.read_bytes)),
    counter("container_fs_reads_total", "Cumulative reads completed")
        .by(&["device"])
        .of_container(|of| devices(of, |device| device.reads)),
    counter(
        "container_fs_writes_bytes_total",
        "Cumulative bytes written",
    )
    .by(&["device"])
    .of_container(|of| devices(of, |device| device.written_bytes)),
    counter("container_fs_writes_total", "Cumulative writes completed")
        .by(&["device"])
        .of_container(|of| devices(of, |device| device.writes)),
    counter(
        "container_blkio_device_usage_total",
        "Bytes read from and written to block devices",
    )
    .by(&["device", "major", "minor", "operation"])
    .of_container(block_io),
    // ---- network
    counter(
        "container_network_receive_bytes_total",
        "Cumulative bytes received",
    )
    .by(&["interface"])
    .of_pod(|of| received(of, |counters| counters.bytes)),
    counter(
        "container_network_receive_packets_total",
        "Cumulative packets received",
    )
    .by(&["interface"])
    .of_pod(|of| received(of, |counters| counters.packets)),
    counter(
        "container_network_receive_errors_total",
        "Cumulative errors while receiving",
    )
    .by(&["interface"])
    .of_pod(|of| received(of, |counters| counters.errors)),
    counter(
        "container_network_receive_packets_dropped_total",
        "Cumulative packets dropped while receiving",
    )
    .by(&["interface"])
    .of_pod(|of| received(of, |counters| counters.dropped)),
    counter(
        "container_network_transmit_bytes_total",
        "Cumulative bytes sent",
    )
    .by(&["interface"])
    .of_pod(|of| sent(of, |counters| counters.bytes)),
    counter(
        "container_network_transmit_packets_total",
        "Cumulative packets sent",
    )
    .by(&["interface"])
    .of_pod(|of| sent(of, |counters| counters.packets)),
    counter(
        "container_network_transmit_errors_total",
        "Cumulative errors while sending",
    )
    .by(&["interface"])
    .of_pod(|of| sent(of, |counters| counters.errors)),
    counter(
        "container_network_transmit_packets_dropped_total",
        "Cumulative packets dropped while sending",
    )
    .by(&["interface"])
    .of_pod(|of| sent(of, |counters| counters.dropped)),
    // ---- processes
    gauge(
        "container_processes",
        "Number of processes in the container",
    )
    .of_container(|of| one(of.container.statistics.processes)),
    gauge("container_threads", "Number of threads in the container")
        .of_container(|of| one(cgroup(of).tasks)),
    gauge(
        "container_threads_max",
        "Maximum number of threads allowed in the container; 0: no limit",
    )
    .of_container(|of| {
        one(match cgroup(of).tasks_limit {
            NO_LIMIT => 0,
            limit => limit,
        })
    }),
    gauge(
        "container_file_descriptors",
        "Number of open file descriptors in the container",
    )
    .of_container(|of| one(of.container.statistics.file_descriptors)),
    gauge(
        "container_sockets",
        "Number of open sockets in the container",
    )
    .of_container(|of| one(of.container.statistics.sockets)),
    gauge(
        "container_ulimits_soft",
        "Soft limits of the container's first process; no value: no limit",
    )
    .by(&["ulimit"])
    .of_container(|of| match of.container.statistics.open_files_limit {
        0 | NO_LIMIT => Vec::new(),
        limit => labelled("max_open_files", limit),
    }),
    // ---- requests and limits
    gauge(
        "container_spec_cpu_period",
        "CPU period of the container in microseconds",
    )
    .of_container(|of| {
        one(match asked(of.record.spec.resources.cpu_period_us) {
            0 => DEFAULT_PERIOD_US,
            period => period,
        })
    }),
    gauge(
        "container_spec_cpu_quota",
        "CPU quota of the container in microseconds per period; no value: no limit",
    )
    .of_container(|of| known(asked(of.record.spec.resources.cpu_quota_us))),
    gauge(
        "container_spec_cpu_shares",
        "CPU shares of the container; no value: not set",
    )
    .of_container(|of| known(asked(of.record.spec.resources.cpu_shares))),
    gauge(
        "container_spec_memory_limit_bytes",
        "Memory limit of the container in bytes; 0: none",
    )
    .of_container(|of| one(asked(of.record.spec.resources.memory_limit_bytes))),
    gauge(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap in bytes; 0: none",
    )
    .of_container(|of| one(asked(of.record.spec.resources.memory_swap_limit_bytes))),
    gauge(
        "container_spec_memory_reservation_limit_bytes",
        "Memory that is protected from reclaim in bytes (memory.low); 0: none",
    )
    .of_container(|of| {
        let low = of.record.spec.resources.unified.get("memory.low");
        one(low.and_then(|text| text.parse().ok()).unwrap_or(0))
    }),
    // ---- the pod's VM
    gauge(
        "bulkhead_pod_forked",
        "1 if the pod's VM was forked from a template, 0 if it has booted",
    )
    .of_pod(|of| one(of.view.pod.size.is_forked.into())),
    // ---- times
    gauge(
        "container_start_time_seconds",
        "Start of the container in seconds since 1970",
    )
    .of_container(|of| match of.record.state {
        ContainerState::Running { started_at, .. } => one(asked(started_at) / NANOSECONDS),
        _ => Vec::new(),
    }),
    gauge(
        "container_last_seen",
        "When the container was last seen, in seconds since 1970",
    )
    .of_container(|of| one(asked(of.reading.at) / NANOSECONDS)),
];
