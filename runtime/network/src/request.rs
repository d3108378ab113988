// SPDX-License-Identifier: Apache-2.0
//! The request for a pod's network, in the terms of CNI's plugins.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A pod that needs a network.
#[derive(Clone, Debug, Default)]
pub struct AttachRequest {
    pub pod_id: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub port_mappings: Vec<PortMapping>,
    pub annotations: BTreeMap<String, String>,
    /// The pod's own DNS settings, if it has any.
    pub dns: Option<Dns>,
}

/// A port of the host that leads into the pod (CRI `PodSandboxConfig.port_mappings`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    #[serde(rename = "hostIP")]
    pub host_ip: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// The settings in a pod's `/etc/resolv.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_mappings_are_written_as_the_portmap_plugin_reads_them() {
        let mapping = PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: "127.0.0.1".into(),
        };
        assert_eq!(
            serde_json::to_string(&mapping).unwrap(),
            r#"{"protocol":"tcp","containerPort":80,"hostPort":8080,"hostIP":"127.0.0.1"}"#
        );
    }
}
