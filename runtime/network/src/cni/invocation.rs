// SPDX-License-Identifier: Apache-2.0
//! What every plugin of a pod's chain is told: who the pod is, and the capabilities that it may declare.
//!
//! Sources: the CNI specification 1.1.0, "Parameters" and "Deriving runtimeConfig"; kubelet's runtimes for `CNI_ARGS`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::conflist::Plugin;
use crate::link::INTERFACE;
use crate::request::AttachRequest;

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
    pub fn new(request: &AttachRequest, capabilities: Map<String, Value>, netns: &Path) -> Self {
        // A ';' or '=' in a value would end it; names in Kubernetes have neither.
        let clean = |text: &str| text.replace([';', '='], "_");
        Self {
            container_id: request.pod_id.clone(),
            netns: netns.to_owned(),
            arguments: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
                clean(&request.namespace),
                clean(&request.name),
                request.pod_id,
                clean(&request.uid)
            ),
            capabilities,
        }
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
