// SPDX-License-Identifier: Apache-2.0
//! What pods are made with ([`Host`]), and what all pods of one daemon share ([`Shared`]).

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bulkhead_host::cgroup::Cgroups;
use bulkhead_host::clock::HostClock;
use bulkhead_host::launch::Launcher;
use bulkhead_host::probe::Probe;
use bulkhead_host::saved::KernelSum;
use bulkhead_network::Network;
use bulkhead_records::Sum;

use super::admission::Admission;
use super::notices::Notices;
use super::outputs::Outputs;
use super::plan::sizing;
use super::readings::Readings;
use super::registry::Registry;
use super::spares::Spares;
use super::templates::{Sources, Templates};
use super::users::Users;
use super::volumes::Volumes;
use super::warmed::Warmed;
use crate::scratch::Scratch;
use crate::store::Store;

/// The parts of the daemon that pods are made with. `Pods` takes it, and owners use it; nobody else has access to it.
#[derive(Debug)]
pub struct Host {
    pub run_pods: PathBuf,
    pub state_pods: PathBuf,
    /// The size of the VM if the pod has no requests or limits.
    pub sizing: sizing::Defaults,
    pub admission: Admission,
    pub store: Arc<Store>,
    pub network: Network,
    pub images: bulkhead_image::Store,
    pub launcher: Launcher,
    pub templates: Templates,
    pub warmed: Warmed,
    pub cgroups: Cgroups,
    pub users: Users,
    pub scratch: Scratch,
    /// How fast a container may write to its log. Zero: as it likes.
    pub log_bytes_per_second: u64,
    pub probe: Probe,
    pub clock: HostClock,
    pub volumes: Volumes,
}

/// What [`super::Pods`] and the owners of all pods have in common.
#[derive(Debug)]
pub struct Shared {
    pub host: Host,
    pub registry: Arc<Registry>,
    pub readings: Readings,
    pub outputs: Outputs,
    pub notices: Arc<Notices>,
    /// The sums of the guest's kernel and its modules, and the files that they are of.
    pub guest_sums: Mutex<Option<(Sources, KernelSum, Sum)>>,
    /// VMs that are ready for pods to come.
    pub spares: Spares,
}

impl Shared {
    /// `spares` is how many VMs are kept ready for pods to come.
    pub fn new(host: Host, spares: usize) -> Self {
        Self {
            host,
            registry: Arc::default(),
            readings: Readings::default(),
            outputs: Outputs::default(),
            notices: Arc::default(),
            guest_sums: Mutex::default(),
            spares: Spares::new(spares),
        }
    }
}
