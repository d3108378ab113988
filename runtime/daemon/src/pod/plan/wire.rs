// SPDX-License-Identifier: Apache-2.0
//! Converts a pod's settings to the messages of others: the request for a CNI network, and the guest's configuration,
//! which includes what CNI has made.

use std::collections::HashMap;

use bulkhead_guest::protocol;
use bulkhead_network::{self as network, AttachRequest, Attachment};
use bulkhead_vmm::config::MacAddress;

use super::dns;
use crate::pod::life::spec::{ContainerSpec, IdRange, PidMode, PodSpec, Protocol, UserNamespace};

/// The request for a pod's network.
pub fn attach_request(id: &str, spec: &PodSpec) -> AttachRequest {
    let protocol = |protocol| match protocol {
        Protocol::Tcp => network::Protocol::Tcp,
        Protocol::Udp => network::Protocol::Udp,
        Protocol::Sctp => network::Protocol::Sctp,
    };
    let mappings = spec.port_mappings.iter();
    AttachRequest {
        pod_id: id.to_owned(),
        name: spec.name.name.clone(),
        namespace: spec.name.namespace.clone(),
        uid: spec.name.uid.clone(),
        port_mappings: mappings
            .map(|mapping| network::PortMapping {
                protocol: protocol(mapping.protocol),
                container_port: mapping.container_port,
                host_port: mapping.host_port,
                host_ip: mapping.host_ip.clone(),
            })
            .collect(),
        annotations: spec.annotations.clone(),
        dns: spec.dns.as_ref().map(|dns| network::Dns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        }),
    }
}

/// The pod's hostname, or the beginning of its id if it has none.
pub fn hostname(id: &str, spec: &PodSpec) -> String {
    if spec.hostname.is_empty() {
        return id.get(..12).unwrap_or(id).to_owned();
    }
    spec.hostname.clone()
}

/// The guest's configuration. The sender fills in the time, the entropy and the machine id.
pub fn configuration(
    id: &str,
    spec: &PodSpec,
    attachment: &Attachment,
    resolv_conf: &str,
) -> protocol::ConfigureSandboxRequest {
    let hostname = hostname(id, spec);
    let dns = dns::of_pod(spec, attachment, resolv_conf);
    let address = attachment
        .addresses
        .first()
        .and_then(|cidr| cidr.split('/').next());
    protocol::ConfigureSandboxRequest {
        hosts: address
            .map(|address| protocol::HostEntry {
                address: address.to_owned(),
                names: vec![hostname.clone()],
            })
            .into_iter()
            .collect(),
        hostname,
        dns: Some(protocol::Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        interface: interface(attachment),
        sysctls: spec.sysctls.clone().into_iter().collect(),
        shared_pid_namespace: spec.pid == PidMode::Pod,
        user_namespace: spec.users.map(user_namespace),
        ..Default::default()
    }
}

/// The guest's network interface. `None` if the pod has loopback only.
fn interface(attachment: &Attachment) -> Option<protocol::Interface> {
    attachment.tap.as_ref()?;
    let routes = attachment.routes.iter();
    let neighbors = attachment.neighbors.iter();
    Some(protocol::Interface {
        mac: MacAddress(attachment.mac).to_string(),
        name: "eth0".to_owned(),
        mtu: attachment.mtu.into(),
        addresses: attachment.addresses.clone(),
        routes: routes
            .map(|route| protocol::Route {
                destination: route.destination.clone(),
                gateway: route.gateway.clone(),
                source: route.source.clone(),
                priority: route.priority,
                mtu: route.mtu,
                advmss: route.advmss,
            })
            .collect(),
        neighbors: neighbors
            .map(|neighbor| protocol::Neighbor {
                address: neighbor.address.clone(),
                mac: MacAddress(neighbor.mac).to_string(),
            })
            .collect(),
    })
}

/// What a container's hooks read of it: annotations with the names that containerd gives them.
pub fn hook_annotations(
    pod_id: &str,
    pod: &PodSpec,
    container: &ContainerSpec,
) -> HashMap<String, String> {
    let image = match container.user_image.as_str() {
        "" => &container.image,
        image => image,
    };
    let pairs = [
        ("container-type", "container"),
        ("container-name", &container.name),
        ("image-name", image),
        ("sandbox-id", pod_id),
        ("sandbox-name", &pod.name.name),
        ("sandbox-namespace", &pod.name.namespace),
        ("sandbox-uid", &pod.name.uid),
    ];
    let named = |(name, value): (&str, &str)| {
        let name = format!("io.kubernetes.cri.{name}");
        (name, value.to_owned())
    };
    pairs.into_iter().map(named).collect()
}

fn user_namespace(users: UserNamespace) -> protocol::UserNamespace {
    let range = |range: IdRange| protocol::IdRange {
        first: range.first,
        length: range.length,
    };
    protocol::UserNamespace {
        uids: Some(range(users.uids)),
        gids: Some(range(users.gids)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_hostname_is_called_by_its_id() {
        let mut spec = crate::pod::fixtures::pod_spec();
        assert_eq!(hostname("0123456789abcdef", &spec), "host");
        spec.hostname.clear();
        assert_eq!(hostname("0123456789abcdef", &spec), "0123456789ab");
    }
}
