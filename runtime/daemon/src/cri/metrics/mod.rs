// SPDX-License-Identifier: Apache-2.0
//! RPCs about metrics: what kubelet shows at `/metrics/cadvisor` when it gets its statistics from CRI (KEP-2371).
//!
//! [`table`] has a row for each metric, with its description and how to get its value. So no metric can have a value
//! without a description, or labels that are not described. Values in CRI are integers, so seconds are rounded down.
//! The labels are those that kubelet gives cAdvisor's metrics. Metrics of a whole pod have an empty container name. One is
//! not cAdvisor's: `bulkhead_pod_forked` says how a pod's VM began.

mod table;
mod values;

use bulkhead_proto::cri;

use self::table::{Kind, METRICS, Row};
use self::values::{Subject, Value};

pub use self::values::working_set;

use crate::pod::Pods;
use crate::pod::readings::{Depth, Reading};

/// Labels of every metric, as kubelet names them.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

pub fn descriptors() -> Vec<cri::MetricDescriptor> {
    METRICS
        .iter()
        .map(|row| cri::MetricDescriptor {
            name: row.name.to_owned(),
            help: row.help.to_owned(),
            label_keys: LABELS
                .iter()
                .chain(row.labels)
                .map(ToString::to_string)
                .collect(),
        })
        .collect()
}

pub async fn list(pods: &Pods) -> Vec<cri::PodSandboxMetrics> {
    let mut readings = pods.read_all(pods.all(), Depth::Descriptors).await;
    readings.sort_by_key(|reading| reading.view.pod.created_at);
    readings.iter().map(pod_metrics).collect()
}

fn pod_metrics(reading: &Reading) -> cri::PodSandboxMetrics {
    let pod = &reading.view.pod;
    let name = &pod.spec.name;
    let labels = ["", "", "", &name.name, &name.namespace];
    let labels = label_values(&pod.id, labels);
    let running = reading.view.containers.values();
    let running = running.filter(|record| record.state.is_running());
    let container_metrics = running.filter_map(|record| {
        let subject = Subject {
            record,
            container: reading.container(&record.id)?,
            reading,
        };
        let names = [
            &*record.spec.name,
            record.image_name(),
            &record.spec.name,
            &name.name,
            &name.namespace,
        ];
        let labels = label_values(&record.id, names);
        let values = |row: &Row| (row.container)(&subject);
        Some(cri::ContainerMetrics {
            container_id: record.id.clone(),
            metrics: metrics(&labels, reading.at, values),
        })
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: pod.id.clone(),
        metrics: metrics(&labels, reading.at, |row| (row.pod)(reading)),
        container_metrics: container_metrics.collect(),
    }
}

fn label_values(id: &str, rest: [&str; 5]) -> Vec<String> {
    std::iter::once(id).chain(rest).map(str::to_owned).collect()
}

fn metrics(
    labels: &[String],
    timestamp: i64,
    values: impl Fn(&Row) -> Vec<Value>,
) -> Vec<cri::Metric> {
    let of_row = |row: &Row| {
        let kind = match row.kind {
            Kind::Counter => cri::MetricType::Counter,
            Kind::Gauge => cri::MetricType::Gauge,
        };
        let name = row.name;
        values(row).into_iter().map(move |value| cri::Metric {
            name: name.to_owned(),
            timestamp,
            metric_type: kind.into(),
            label_values: labels.iter().cloned().chain(value.labels).collect(),
            value: Some(cri::UInt64Value { value: value.value }),
        })
    };
    METRICS.iter().flat_map(of_row).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;

    use super::*;
    use crate::pod::life::record::ContainerRecord;
    use crate::pod::life::state::ContainerState;
    use crate::pod::readings::ContainerReading;
    use crate::pod::readings::rates::CpuUse;
    use crate::pod::{View, fixtures, life::record::PodRecord};
    use bulkhead_guest::protocol as guest;
    use bulkhead_host::usage::{HostPressure, HostUsage};
    use bulkhead_network::Counters;

    /// The metrics that critest expects from a runtime on a node with cgroup v2.
    const EXPECTED: &str = "blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total \
        cpu_cfs_throttled_seconds_total cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total \
        file_descriptors fs_inodes_free fs_inodes_total fs_limit_bytes fs_reads_bytes_total fs_reads_total \
        fs_usage_bytes fs_writes_bytes_total fs_writes_total hugetlb_max_usage_bytes hugetlb_usage_bytes last_seen memory_cache \
        memory_failcnt memory_failures_total memory_kernel_usage memory_mapped_file memory_max_usage_bytes \
        memory_rss memory_swap memory_usage_bytes memory_working_set_bytes network_receive_bytes_total \
        network_receive_errors_total network_receive_packets_dropped_total network_receive_packets_total \
        network_transmit_bytes_total network_transmit_errors_total network_transmit_packets_dropped_total \
        network_transmit_packets_total oom_events_total pressure_cpu_stalled_seconds_total \
        pressure_cpu_waiting_seconds_total pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total \
        pressure_memory_stalled_seconds_total pressure_memory_waiting_seconds_total processes sockets \
        spec_cpu_period spec_cpu_quota spec_cpu_shares spec_memory_limit_bytes \
        spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes start_time_seconds threads threads_max \
        ulimits_soft";

    fn reading() -> Reading {
        let mut spec = fixtures::container_spec();
        spec.resources.cpu_quota_us = 20_000;
        spec.resources.cpu_shares = 1024;
        let record = ContainerRecord {
            id: "c".into(),
            pod_id: "p".into(),
            spec,
            state: ContainerState::Running {
                pid: 1,
                started_at: 5_000_000_000,
            },
            ..fixtures::container_record()
        };
        let pod = PodRecord {
            id: "p".into(),
            ..fixtures::pod_record()
        };
        let pressure = || {
            Some(guest::Pressure {
                some: Some(guest::PressureLine::default()),
                full: Some(guest::PressureLine::default()),
            })
        };
        let cpu = CpuUse {
            total_ns: 3_500_000_000,
            nano_cores: 1,
        };
        let statistics = guest::ContainerStatistics {
            id: "c".into(),
            cgroup: Some(guest::CgroupStatistics {
                cpu: Some(guest::CpuStatistics::default()),
                memory: Some(guest::MemoryStatistics {
                    current_bytes: 100,
                    inactive_file_bytes: 30,
                    ..Default::default()
                }),
                cpu_pressure: pressure(),
                memory_pressure: pressure(),
                io_pressure: pressure(),
                tasks: 3,
                tasks_limit: u64::MAX,
                io: vec![guest::DeviceIo {
                    name: "vdb".into(),
                    ..Default::default()
                }],
                hugepages: vec![guest::HugepageUsage::default()],
            }),
            writable_layer: Some(guest::WritableLayer::default()),
            open_files_limit: 1024,
            ..Default::default()
        };
        Reading {
            view: Arc::new(View {
                pod,
                containers: [("c".to_owned(), record)].into(),
                guest: None,
            }),
            at: 9_000_000_000,
            cpu,
            host: HostUsage {
                pressure: Some(HostPressure::default()),
                ..Default::default()
            },
            guest: guest::GuestStatistics {
                scratch: Some(guest::FilesystemStatistics::default()),
                ..Default::default()
            },
            network: Some(("eth0", Counters::default())),
            containers: vec![ContainerReading {
                cpu,
                hugepage_peaks: vec![4 << 20],
                statistics,
            }],
        }
    }

    #[test]
    fn every_metric_that_kubelet_expects_and_our_own_are_described_once() {
        let described: BTreeSet<String> = descriptors().into_iter().map(|one| one.name).collect();
        let expected = EXPECTED
            .split_whitespace()
            .map(|name| format!("container_{name}"))
            .chain(["bulkhead_pod_forked".to_owned()]);
        assert_eq!(described, expected.collect());
        assert_eq!(described.len(), METRICS.len(), "no name twice");
        assert!(descriptors().iter().all(|one| !one.help.is_empty()));
    }

    #[test]
    fn every_value_has_the_labels_of_its_description_and_every_description_a_value() {
        let metrics = pod_metrics(&reading());
        let described: BTreeMap<_, _> = descriptors()
            .into_iter()
            .map(|one| (one.name, one.label_keys.len()))
            .collect();
        let [container] = metrics.container_metrics.as_slice() else {
            panic!("one container");
        };
        let all = || metrics.metrics.iter().chain(&container.metrics);
        for metric in all() {
            assert_eq!(
                metric.label_values.len(),
                described[&metric.name],
                "{metric:?}"
            );
            assert_eq!(metric.timestamp, 9_000_000_000);
        }
        let valued: BTreeSet<_> = all().map(|metric| &metric.name).collect();
        assert_eq!(valued, described.keys().collect());
    }

    #[test]
    fn values_are_in_the_units_of_their_names() {
        let metrics = pod_metrics(&reading());
        let value = |name: &str| {
            let mut found = metrics.container_metrics[0].metrics.iter();
            let metric = found.find(|metric| metric.name == name).expect(name);
            metric.value.map(|value| value.value)
        };
        assert_eq!(value("container_cpu_usage_seconds_total"), Some(3));
        assert_eq!(value("container_memory_working_set_bytes"), Some(70));
        assert_eq!(value("container_start_time_seconds"), Some(5));
        assert_eq!(value("container_last_seen"), Some(9));
        assert_eq!(value("container_threads"), Some(3));
        assert_eq!(value("container_threads_max"), Some(0), "no limit");
        assert_eq!(value("container_spec_cpu_period"), Some(100_000));
        assert_eq!(value("container_hugetlb_usage_bytes"), Some(0));
        assert_eq!(value("container_hugetlb_max_usage_bytes"), Some(4 << 20));
    }

    #[test]
    fn containers_that_do_not_run_have_no_metrics() {
        let mut reading = reading();
        let mut view = (*reading.view).clone();
        for record in view.containers.values_mut() {
            record.state = ContainerState::Created;
        }
        reading.view = Arc::new(view);
        assert!(pod_metrics(&reading).container_metrics.is_empty());
    }
}
