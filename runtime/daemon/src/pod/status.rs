// SPDX-License-Identifier: Apache-2.0
//! What the node says of its pods as a whole: whether they can run here, and what they are made with.

use std::path::Path;

use bulkhead_host::launch::Launcher;
use bulkhead_network::{NetworkError, NetworkRecord};
use bulkhead_text::Problem;

use super::Pods;
use super::plan::sizing::Defaults;

impl Pods {
    /// Whether a VM can run here.
    pub async fn can_run(&self) -> Result<(), Problem> {
        self.shared.host.probe.ready().await
    }

    /// Whether a pod would get a network; says which.
    pub async fn has_network(&self) -> Result<String, Problem> {
        self.shared.host.network.ready().await
    }

    /// For plugins that take their subnets from the runtime.
    pub fn set_pod_cidr(&self, pod_cidr: &str) -> Result<(), NetworkError> {
        self.shared.host.network.set_pod_cidr(pod_cidr)
    }

    /// What a pod has of the network, for people.
    pub fn describe_network(&self, record: &NetworkRecord) -> serde_json::Value {
        self.shared.host.network.describe(record)
    }

    /// Removes now and then what pods left behind in the network.
    pub async fn tidy_network(&self) {
        self.shared.host.network.tidy().await;
    }

    /// Where the scratch disks of pods are.
    pub fn scratch_directory(&self) -> &Path {
        &self.shared.host.state_pods
    }

    /// What VMs are started with.
    pub fn launcher(&self) -> &Launcher {
        &self.shared.host.launcher
    }

    /// The VM of a pod that asks for nothing.
    pub fn vm_defaults(&self) -> &Defaults {
        &self.shared.host.sizing
    }

    pub fn parallel_boots(&self) -> usize {
        self.shared.host.admission.parallel()
    }
}
