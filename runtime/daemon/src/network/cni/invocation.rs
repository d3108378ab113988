// SPDX-License-Identifier: Apache-2.0
//! What every plugin of a pod's chain is told: who the pod is, and the capabilities that it may declare.
//!
//! Sources: the CNI specification 1.1.0, "Parameters" and "Deriving runtimeConfig"; CNI's CONVENTIONS.md for the
//! capabilities' forms; kubelet's runtimes for `CNI_ARGS` and the annotations of pods.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::conflist::Plugin;
use crate::network::{AttachRequest, INTERFACE, NetworkError, bandwidth};

/// The capability by which containerd and CRI-O pass a pod's annotations on.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    pub(super) container_id: String,
    pub(super) netns: PathBuf,
    pub(super) arguments: String,
    /// By name; a plugin gets those that it declares.
    #[serde(default)]
    capabilities: Map<String, Value>,
}

impl Invocation {
    /// `ip_ranges`: the subnets that addresses come from, where the node's configuration says so.
    pub fn new(
        request: &AttachRequest,
        ip_ranges: &[String],
        netns: &Path,
    ) -> Result<Self, NetworkError> {
        // A ';' or '=' in a value would end it; names in Kubernetes have neither.
        let clean = |text: &str| text.replace([';', '='], "_");
        Ok(Self {
            container_id: request.pod_id.clone(),
            netns: netns.to_owned(),
            arguments: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
                clean(&request.namespace),
                clean(&request.name),
                request.pod_id,
                clean(&request.uid)
            ),
            capabilities: capabilities(request, ip_ranges)?,
        })
    }

    /// `runtimeConfig` of a plugin: of what there is, what it declares.
    pub(super) fn runtime_config(&self, plugin: &Plugin) -> Map<String, Value> {
        let declared = plugin.configuration.get("capabilities");
        let declares = |name: &str| {
            let value = declared.and_then(|declared| declared.get(name));
            value == Some(&Value::Bool(true))
        };
        let wanted = self.capabilities.iter().filter(|(name, _)| declares(name));
        wanted
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }

    /// How `GC` names this attachment.
    pub fn attachment(&self) -> Value {
        json!({ "containerID": self.container_id, "ifname": INTERFACE })
    }
}

fn capabilities(
    request: &AttachRequest,
    ip_ranges: &[String],
) -> Result<Map<String, Value>, NetworkError> {
    let mut found = Map::new();
    // Port 0 of the host: the container's port is declared, not published.
    let published = request.port_mappings.iter();
    let published: Vec<_> = published.filter(|one| one.host_port != 0).collect();
    if !published.is_empty() {
        found.insert("portMappings".to_owned(), json!(published));
    }
    if let Some(bandwidth) = bandwidth::of_annotations(&request.annotations)? {
        found.insert("bandwidth".to_owned(), json!(bandwidth));
    }
    if !ip_ranges.is_empty() {
        // Each is a set of its own: a pod gets an address of every set.
        let sets: Vec<_> = ip_ranges
            .iter()
            .map(|subnet| json!([{ "subnet": subnet }]))
            .collect();
        found.insert("ipRanges".to_owned(), json!(sets));
    }
    if let Some(dns) = &request.dns {
        let dns =
            json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
        found.insert("dns".to_owned(), dns);
    }
    if !request.annotations.is_empty() {
        found.insert(ANNOTATIONS.to_owned(), json!(request.annotations));
    }
    Ok(found)
}
