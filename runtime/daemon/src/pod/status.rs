// SPDX-License-Identifier: Apache-2.0
//! What the node reports about its pods as a whole: whether they can run here, and what they are made with.

use std::path::Path;

use bulkhead_host::launch::Launcher;
use bulkhead_network::{NetworkError, NetworkRecord};
use bulkhead_text::Problem;

use super::Pods;
use super::plan::sizing::Defaults;
use super::{spares, templates, warmed};

impl Pods {
    /// Whether a VM can run here.
    pub async fn can_run(&self) -> Result<(), Problem> {
        self.shared.host.probe.ready().await
    }

    /// Whether pods get a network. The text is a remark about configuration files that were skipped, else empty.
    pub async fn has_network(&self) -> Result<String, Problem> {
        self.shared.host.network.ready().await
    }

    /// Tells the network which addresses this node's pods have, for CNI plugins that take their subnets from the
    /// runtime.
    pub fn set_pod_cidr(&self, pod_cidr: &str) -> Result<(), NetworkError> {
        self.shared.host.network.set_pod_cidr(pod_cidr)
    }

    /// Describes a pod's network for people, in verbose status answers.
    pub fn describe_network(&self, record: &NetworkRecord) -> serde_json::Value {
        self.shared.host.network.describe(record)
    }

    /// Removes, from time to time, what pods left behind in the network. It never returns.
    pub async fn tidy_network(&self) {
        self.shared.host.network.tidy().await;
    }

    /// Where the scratch disks of pods are.
    pub fn scratch_directory(&self) -> &Path {
        &self.shared.host.state_pods
    }

    /// Starts VMs, and knows the programs and files for it.
    pub fn launcher(&self) -> &Launcher {
        &self.shared.host.launcher
    }

    /// What VMs are forked from, and how many were.
    pub fn templates(&self) -> templates::Status {
        self.shared.host.templates.status()
    }

    /// The VMs that are ready for pods to come.
    pub fn spares(&self) -> spares::Status {
        self.shared.spares.status()
    }

    /// The warmed pods as which pods can begin.
    pub fn warmed(&self) -> warmed::Status {
        self.shared.host.warmed.status()
    }

    /// The size of the VM if a pod has no requests or limits.
    pub fn vm_defaults(&self) -> &Defaults {
        &self.shared.host.sizing
    }

    pub fn parallel_boots(&self) -> usize {
        self.shared.host.admission.parallel()
    }
}
