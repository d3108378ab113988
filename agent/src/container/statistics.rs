// SPDX-License-Identifier: Apache-2.0
//! `Statistics`: what each container uses. Blocks. No lock is held while files are read.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_proto::agent::{ContainerStatistics, StatisticsRequest, StatisticsResponse};

use super::state::State;
use super::{Container, Containers};
use crate::cgroup::{POD, ROOT};
use crate::statistics::{self, Descriptors};

/// How long counting files and descriptors of all containers may take. The daemon does not wait much longer.
const COUNT_TIME: Duration = Duration::from_secs(2);

impl Containers {
    pub fn statistics(&self, request: &StatisticsRequest) -> StatisticsResponse {
        let wanted: Vec<Arc<Container>> = if request.container_ids.is_empty() {
            self.known().containers.values().cloned().collect()
        } else {
            let ids = request.container_ids.iter();
            ids.filter_map(|id| self.get(id).ok()).collect()
        };
        let deadline = Instant::now() + COUNT_TIME;
        let of_one = |container: &Arc<Container>| container.statistics(request.processes, deadline);
        StatisticsResponse {
            containers: wanted.iter().map(of_one).collect(),
            guest: Some(statistics::guest(Path::new(ROOT), Path::new(POD))),
        }
    }
}

impl Container {
    fn statistics(&self, with_descriptors: bool, deadline: Instant) -> ContainerStatistics {
        let written = {
            let overlay = self.overlay.lock().unwrap_or_else(PoisonError::into_inner);
            overlay.as_ref().map(|overlay| overlay.written())
        };
        let pids = self.cgroup.pids();
        let first = match self.snapshot().0 {
            State::Running { pid, .. } => Some(pid),
            State::Created | State::Restored { .. } | State::Exited(_) => None,
        };
        let descriptors = if with_descriptors {
            statistics::descriptors(&pids, deadline)
        } else {
            Descriptors::default()
        };
        ContainerStatistics {
            id: self.id(),
            cgroup: Some(statistics::cgroup(self.cgroup.path())),
            writable_layer: written.map(|places| self.written.count(&places, deadline)),
            processes: pids.len() as u64,
            file_descriptors: descriptors.open,
            sockets: descriptors.sockets,
            open_files_limit: first.map_or(0, statistics::open_files_limit),
        }
    }
}
