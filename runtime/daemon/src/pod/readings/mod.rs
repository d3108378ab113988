// SPDX-License-Identifier: Apache-2.0
//! Statistics: what pods and containers use.
//!
//! There are two sources, on purpose. A **container**'s figures come from its cgroup in the guest, because only the
//! guest knows containers. They are capped at what the VM has ([`bulkhead_guest::statistics`]), and writable layers are
//! not less than what the host counts ([`floor`]). A **pod**'s CPU and
//! memory come from the VM's cgroup on the host. That is what the pod really costs the node, with the guest's kernel
//! and the VMM, and the guest cannot falsify it. Its network counters come from the host as well. So a pod uses more
//! than the sum of its containers.
//!
//! A reading does not wait for the pod's owner. All guests are asked at the same time, each with a time limit. A guest
//! that does not answer is left out of a list, with a warning in the log; if only its pod was asked for, that is an
//! error.

mod floor;
mod peaks;
pub mod rates;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The parts of a [`Reading`], for those who show it.
pub use bulkhead_guest::protocol::{
    CgroupStatistics, CpuStatistics, DeviceIo, FilesystemStatistics, HugepageUsage,
    MemoryStatistics, Pressure, PressureLine,
};
use bulkhead_guest::protocol::{ContainerStatistics, GuestStatistics, StatisticsRequest};
use bulkhead_guest::statistics::Bounds;
use bulkhead_host::control;
pub use bulkhead_host::usage::{HostPressure, Stall, StallLine};
use bulkhead_host::usage::{HostUsage, bytes_on_disk};
use bulkhead_network::{Counters, Network, NetworkRecord};
use bulkhead_text::chain;
use futures_util::future::join_all;

use self::floor::Disk;
use self::peaks::Peaks;
use self::rates::{CpuUse, Rates};
use crate::clock::now;
use crate::pod::errors::PodError;
use crate::pod::life::record::PodRecord;
use crate::pod::life::state::{ContainerState, PodState};
use crate::pod::view::View;

/// How long a guest may take to answer when many pods are read.
const LIST_LIMIT: Duration = Duration::from_secs(5);
/// How long a guest may take to answer when only its pod is read.
const ONE_LIMIT: Duration = Duration::from_secs(15);
/// How much faster a guest may count time than the host, and how coarsely the age of a VM is known.
const CLOCK_SLACK: Duration = Duration::from_secs(2);

/// How much to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    Usage,
    /// Also the number of open file descriptors, which takes longer.
    Descriptors,
}

/// What one pod uses, at one time.
#[derive(Clone, Debug)]
pub struct Reading {
    pub view: Arc<View>,
    /// Nanoseconds since 1970, by the host's clock.
    pub at: i64,
    pub cpu: CpuUse,
    pub host: HostUsage,
    pub guest: GuestStatistics,
    /// Name and counters of the pod's interface.
    pub network: Option<(&'static str, Counters)>,
    pub containers: Vec<ContainerReading>,
}

#[derive(Clone, Debug)]
pub struct ContainerReading {
    pub cpu: CpuUse,
    /// The most bytes in huge pages that were seen, for each page size in the order of the statistics.
    pub hugepage_peaks: Vec<u64>,
    pub statistics: ContainerStatistics,
}

impl Reading {
    pub fn container(&self, id: &str) -> Option<&ContainerReading> {
        let mut containers = self.containers.iter();
        containers.find(|container| container.statistics.id == id)
    }
}

/// What is kept between two readings.
#[derive(Debug, Default)]
pub struct Readings {
    rates: Rates,
    peaks: Peaks,
}

impl Readings {
    /// Reads one pod. It is an error if its guest does not answer.
    pub async fn read(&self, view: Arc<View>, depth: Depth) -> Result<Reading, PodError> {
        self.read_within(view, depth, ONE_LIMIT).await
    }

    /// Reads pods, all at the same time. Pods that are not ready, or whose guest does not answer, are left out.
    pub async fn read_all(&self, views: Vec<Arc<View>>, depth: Depth) -> Vec<Reading> {
        let ready = views
            .into_iter()
            .filter(|view| view.pod.state == PodState::Ready && is_heard(view));
        let readings = ready.map(|view| async move {
            let remarks = view.guest.as_ref().map(|guest| guest.remarks.clone());
            let reading = self.read_within(view, depth, LIST_LIMIT).await;
            if let (Err(error), Some(remarks)) = (&reading, remarks) {
                remarks.warn(format_args!("left out of the statistics: {}", chain(error)));
            }
            reading.ok()
        });
        join_all(readings).await.into_iter().flatten().collect()
    }

    async fn read_within(
        &self,
        view: Arc<View>,
        depth: Depth,
        limit: Duration,
    ) -> Result<Reading, PodError> {
        let id = view.pod.id.clone();
        let guest = view.ready_guest("reading its statistics")?;
        let request = StatisticsRequest {
            container_ids: Vec::new(),
            processes: depth == Depth::Descriptors,
        };
        let asking = async {
            tokio::join!(
                guest
                    .agent
                    .statistics(request, view.containers.len(), limit),
                counters(view.pod.network())
            )
        };
        // If the VM dies, the call ends, even if the connection to it does not break.
        let (answer, network) = tokio::select! {
            answers = asking => answers,
            () = guest.process.ended() => return Err(PodError::Lost { id }),
        };
        let answer = answer.map_err(|source| PodError::Guest {
            id: id.clone(),
            source,
        })?;
        let at = now();
        let instant = Instant::now();
        let vmm = guest.process.identity();
        let host = HostUsage::read(view.pod.cgroup(), vmm.pid);
        // Not by the wall clock: if that was set back, the guest would seem to have used nothing yet.
        let age = vmm.age();
        let bounds = bounds(&view.pod, age);
        let mut answer = bounds.cut(answer, |id| view.containers.contains_key(id));
        if let Some(taken_bytes) = view
            .pod
            .scratch_file()
            .and_then(|file| bytes_on_disk(&file))
        {
            let disk = Disk {
                size_bytes: view.pod.size.scratch_bytes,
                taken_bytes,
            };
            let records = view.containers.values();
            let running = records.filter(|one| one.state.is_running());
            let running: Vec<_> = running.map(|one| one.id.as_str()).collect();
            floor::raise(&mut answer.containers, &running, disk);
        }
        let (rates, peaks) = (&self.rates, &self.peaks);
        let containers = answer.containers.into_iter().map(|statistics| {
            let cgroup = statistics.cgroup.as_ref();
            let used = cgroup.and_then(|cgroup| cgroup.cpu).unwrap_or_default();
            let started = view.containers.get(&statistics.id);
            let started = started.map_or(at, |one| match one.state {
                ContainerState::Running { started_at, .. } => started_at,
                _ => one.created_at,
            });
            let total_ns = used.usage_us.saturating_mul(1000);
            let hugepages = cgroup.into_iter().flat_map(|cgroup| &cgroup.hugepages);
            let peak = |usage: &HugepageUsage| {
                peaks.observe(&statistics.id, &usage.page_size, usage.current_bytes)
            };
            ContainerReading {
                hugepage_peaks: hugepages.map(peak).collect(),
                cpu: rates.observe(&statistics.id, total_ns, self::age(started, at), instant),
                statistics,
            }
        });
        Ok(Reading {
            containers: containers.collect(),
            cpu: rates.observe(&id, host.cpu_ns, age, instant),
            at,
            host,
            guest: answer.guest.unwrap_or_default(),
            network,
            view: Arc::clone(&view),
        })
    }

    /// Forgets all pods and containers except these.
    pub fn keep(&self, ids: &HashSet<&str>) {
        self.rates.keep(ids);
        self.peaks.keep(ids);
    }
}

/// Whether the pod's guest answered when it was last asked whether it lives. The others need not wait for one that did
/// not.
fn is_heard(view: &View) -> bool {
    let guest = view.guest.as_ref();
    guest.is_some_and(|guest| !guest.pulse.is_missed())
}

fn age(since: i64, now: i64) -> Duration {
    Duration::from_nanos(u64::try_from(now.saturating_sub(since)).unwrap_or(0))
}

/// The most that the pod can have used. The record of an earlier version has no size, and so there are no bounds.
fn bounds(pod: &PodRecord, age: Duration) -> Bounds {
    let known = |bytes: u64| if bytes == 0 { u64::MAX } else { bytes };
    let vcpus = match u32::from(pod.size.vcpus) {
        0 => u32::MAX,
        vcpus => vcpus,
    };
    Bounds {
        memory_bytes: known(u64::from(pod.size.memory_max_mib.max(pod.size.memory_mib)) << 20),
        scratch_bytes: known(pod.size.scratch_bytes),
        cpu: (age + CLOCK_SLACK).saturating_mul(vcpus),
    }
}

/// The VMM's own counters, as JSON. `None` if the pod has no running VM, or its VMM does not answer.
pub async fn vmm_counters(view: &View) -> Option<serde_json::Value> {
    let guest = view.guest.as_ref()?;
    control::statistics(&guest.files.control()).await.ok()
}

/// The counters of a pod's network. An error is only logged, because statistics without the network are better than
/// none.
async fn counters(record: Option<&NetworkRecord>) -> Option<(&'static str, Counters)> {
    match Network::counters(record?).await {
        Ok(counters) => counters,
        Err(error) => {
            tracing::debug!("counters of a pod's network: {}", chain(&error));
            None
        }
    }
}
