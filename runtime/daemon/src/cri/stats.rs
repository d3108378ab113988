// SPDX-License-Identifier: Apache-2.0
//! RPCs about statistics of pods and containers.
//!
//! As in other runtimes, a list of containers has all containers, but only running ones have CPU and memory. A list of
//! pods has only pods that are ready.

use std::path::Path;
use std::sync::Arc;

use bulkhead_network::Counters;
use bulkhead_proto::cri;
use tonic::Status;

use super::metrics::working_set;
use super::{filter, show};
use crate::pod::life::record::ContainerRecord;
use crate::pod::readings::rates::CpuUse;
use crate::pod::readings::{
    CgroupStatistics, ContainerReading, Depth, HostPressure, Pressure, PressureLine, Reading,
    Stall, StallLine,
};
use crate::pod::{Pods, View};

/// The agent reports this number for a cgroup without a limit.
const NO_LIMIT: u64 = u64::MAX;

pub async fn container(
    pods: &Pods,
    request: cri::ContainerStatsRequest,
) -> Result<cri::ContainerStatsResponse, Status> {
    let (view, record) = pods.container(&request.container_id)?;
    let reading = if view.guest.is_some() {
        Some(pods.read(Arc::clone(&view), Depth::Usage).await?)
    } else {
        None
    };
    Ok(cri::ContainerStatsResponse {
        stats: Some(container_stats(
            &record,
            reading.as_ref(),
            pods.scratch_directory(),
        )),
    })
}

/// Lists statistics of containers. A container whose guest does not answer is left out. A container of a stopped pod
/// has only attributes.
pub async fn list_containers(
    pods: &Pods,
    wanted: Option<cri::ContainerStatsFilter>,
) -> Vec<cri::ContainerStats> {
    let views: Vec<_> = pods
        .all()
        .into_iter()
        .filter(|view| {
            let mut records = view.containers.values();
            records.any(|one| filter::container_stats(wanted.as_ref(), one))
        })
        .collect();
    let (live, stopped): (Vec<_>, Vec<_>) =
        views.into_iter().partition(|view| view.guest.is_some());
    let readings = pods.read_all(live, Depth::Usage).await;
    let directory = pods.scratch_directory();
    let of_view =
        |view: &Arc<View>, reading: Option<&Reading>| -> Vec<(i64, cri::ContainerStats)> {
            let records = view.containers.values();
            records
                .filter(|one| filter::container_stats(wanted.as_ref(), one))
                .map(|one| (one.created_at, container_stats(one, reading, directory)))
                .collect()
        };
    let mut stats: Vec<_> = readings
        .iter()
        .flat_map(|reading| of_view(&reading.view, Some(reading)))
        .chain(stopped.iter().flat_map(|view| of_view(view, None)))
        .collect();
    stats.sort_by_key(|(created_at, _)| *created_at);
    stats.into_iter().map(|(_, stats)| stats).collect()
}

pub async fn pod(
    pods: &Pods,
    request: cri::PodSandboxStatsRequest,
) -> Result<cri::PodSandboxStatsResponse, Status> {
    let view = pods.pod(&request.pod_sandbox_id)?;
    let reading = pods.read(view, Depth::Usage).await?;
    Ok(cri::PodSandboxStatsResponse {
        stats: Some(pod_stats(&reading, pods.scratch_directory())),
    })
}

pub async fn list_pods(
    pods: &Pods,
    wanted: Option<cri::PodSandboxStatsFilter>,
) -> Vec<cri::PodSandboxStats> {
    let mut views = pods.all();
    views.retain(|view| filter::pod_stats(wanted.as_ref(), &view.pod));
    let mut readings = pods.read_all(views, Depth::Usage).await;
    readings.sort_by_key(|reading| reading.view.pod.created_at);
    let directory = pods.scratch_directory();
    readings
        .iter()
        .map(|reading| pod_stats(reading, directory))
        .collect()
}

fn container_stats(
    record: &ContainerRecord,
    reading: Option<&Reading>,
    directory: &Path,
) -> cri::ContainerStats {
    let mut stats = cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: record.id.clone(),
            metadata: Some(show::container_metadata(record)),
            labels: record.spec.labels.clone().into_iter().collect(),
            annotations: record.spec.annotations.clone().into_iter().collect(),
        }),
        ..Default::default()
    };
    let found = reading.and_then(|reading| Some((reading.at, reading.container(&record.id)?)));
    let Some((at, found)) = found else {
        return stats;
    };
    stats.writable_layer = found
        .statistics
        .writable_layer
        .map(|layer| cri::FilesystemUsage {
            timestamp: at,
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: directory.display().to_string(),
            }),
            used_bytes: value(layer.bytes),
            inodes_used: value(layer.inodes),
        });
    if record.state.is_running() {
        add_usage(&mut stats, found, at);
    }
    stats
}

fn add_usage(stats: &mut cri::ContainerStats, found: &ContainerReading, at: i64) {
    let empty = CgroupStatistics::default();
    let cgroup = found.statistics.cgroup.as_ref().unwrap_or(&empty);
    let memory = cgroup.memory.unwrap_or_default();
    let working_set = working_set(&memory);
    let limited = memory.limit_bytes != NO_LIMIT;
    stats.cpu = Some(cpu(found.cpu, at, cgroup.cpu_pressure.as_ref().map(psi)));
    stats.memory = Some(cri::MemoryUsage {
        timestamp: at,
        working_set_bytes: value(working_set),
        available_bytes: if limited {
            value(memory.limit_bytes.saturating_sub(working_set))
        } else {
            None
        },
        usage_bytes: value(memory.current_bytes),
        rss_bytes: value(memory.anon_bytes),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: cgroup.memory_pressure.as_ref().map(psi),
    });
    // Guests have no swap device, so none is available.
    stats.swap = Some(cri::SwapUsage {
        timestamp: at,
        swap_available_bytes: value(0),
        swap_usage_bytes: value(memory.swap_bytes),
    });
    stats.io = Some(cri::IoUsage {
        timestamp: at,
        psi: cgroup.io_pressure.as_ref().map(psi),
    });
}

fn pod_stats(reading: &Reading, directory: &Path) -> cri::PodSandboxStats {
    let Reading { view, at, host, .. } = reading;
    let at = *at;
    let pressure = |of: fn(&HostPressure) -> &Stall| {
        host.pressure
            .as_ref()
            .map(|pressure| host_psi(of(pressure)))
    };
    let containers = &reading.containers;
    let records = view.containers.values();
    let linux = cri::LinuxPodSandboxStats {
        cpu: Some(cpu(reading.cpu, at, pressure(|host| &host.cpu))),
        memory: Some(cri::MemoryUsage {
            timestamp: at,
            working_set_bytes: value(host.working_set_bytes()),
            available_bytes: None,
            usage_bytes: value(host.memory_bytes),
            rss_bytes: value(host.anon_bytes),
            page_faults: value(host.page_faults),
            major_page_faults: value(host.major_page_faults),
            psi: pressure(|host| &host.memory),
        }),
        network: reading
            .network
            .as_ref()
            .map(|(name, counters)| network(name, counters, at)),
        process: Some(cri::ProcessUsage {
            timestamp: at,
            process_count: value(containers.iter().map(|one| one.statistics.processes).sum()),
        }),
        containers: records
            .filter(|record| record.state.is_running())
            .map(|record| container_stats(record, Some(reading), directory))
            .collect(),
        io: Some(cri::IoUsage {
            timestamp: at,
            psi: pressure(|host| &host.io),
        }),
    };
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: view.pod.id.clone(),
            metadata: Some(show::pod_metadata(&view.pod)),
            labels: view.pod.spec.labels.clone().into_iter().collect(),
            annotations: view.pod.spec.annotations.clone().into_iter().collect(),
        }),
        linux: Some(linux),
        windows: None,
    }
}

fn cpu(cpu: CpuUse, timestamp: i64, psi: Option<cri::PsiStats>) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(cpu.total_ns),
        usage_nano_cores: value(cpu.nano_cores),
        psi,
    }
}

fn network(name: &str, counters: &Counters, timestamp: i64) -> cri::NetworkUsage {
    let usage = cri::NetworkInterfaceUsage {
        name: name.to_owned(),
        rx_bytes: value(counters.received.bytes),
        rx_errors: value(counters.received.errors),
        tx_bytes: value(counters.sent.bytes),
        tx_errors: value(counters.sent.errors),
    };
    cri::NetworkUsage {
        timestamp,
        default_interface: Some(usage),
        // CRI wants all interfaces except the default one here, and a guest has no other.
        interfaces: Vec::new(),
    }
}

fn psi(pressure: &Pressure) -> cri::PsiStats {
    let line = |line: PressureLine| cri::PsiData {
        total: line.total_us.saturating_mul(1000),
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    cri::PsiStats {
        some: pressure.some.map(line),
        full: pressure.full.map(line),
    }
}

fn host_psi(stall: &Stall) -> cri::PsiStats {
    let line = |line: &StallLine| {
        let [avg10, avg60, avg300] = line.averages;
        Some(cri::PsiData {
            total: line.total_us.saturating_mul(1000),
            avg10,
            avg60,
            avg300,
        })
    };
    cri::PsiStats {
        some: line(&stall.some),
        full: line(&stall.full),
    }
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "CRI's numbers are optional messages"
)]
fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}
