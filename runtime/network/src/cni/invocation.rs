// SPDX-License-Identifier: Apache-2.0
//! What every plugin of a pod's chain gets: the pod's identity, and the capabilities that the plugin declares.
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
    /// All capabilities of the pod by name. A plugin gets those that it declares.
    #[serde(default)]
    capabilities: Map<String, Value>,
}

impl Invocation {
    pub fn new(request: &AttachRequest, capabilities: Map<String, Value>, netns: &Path) -> Self {
        // A ';' or '=' would end a value. Names in Kubernetes contain neither.
        let clean = |text: &str| text.replace([';', '='], "_");
        let pairs = [
            ("K8S_POD_NAMESPACE", &request.namespace),
            ("K8S_POD_NAME", &request.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &request.pod_id),
            ("K8S_POD_UID", &request.uid),
        ];
        // A network that is made before its pod is known has no names.
        let known = pairs.iter().filter(|(_, value)| !value.is_empty());
        let known = known.map(|(name, value)| format!(";{name}={}", clean(value)));
        Self {
            container_id: request.pod_id.clone(),
            netns: netns.to_owned(),
            arguments: format!("IgnoreUnknown=1{}", known.collect::<String>()),
            capabilities,
        }
    }

    /// The same in another network namespace.
    pub fn moved_to(self, netns: &Path) -> Self {
        Self {
            netns: netns.to_owned(),
            ..self
        }
    }

    /// Whether a plugin would get the same for `other`, but for the pod's identity.
    pub(super) fn asks_the_same(&self, other: &Self, plugin: &Plugin) -> bool {
        self.runtime_config(plugin) == other.runtime_config(plugin)
    }

    /// The `runtimeConfig` for a plugin: those of the pod's capabilities that it declares.
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

    /// This attachment in the form for `GC`.
    pub fn attachment(&self) -> Value {
        json!({ "containerID": self.container_id, "ifname": INTERFACE })
    }
}
