// SPDX-License-Identifier: Apache-2.0
//! A pod in others' words: what CNI is told of it, and the guest of what CNI made and of the pod's users.

use bulkhead_guest::protocol;
use bulkhead_network::{self as network, AttachRequest, Attachment};

use super::spec::{IdRange, PodSpec, Protocol, UserNamespace};

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

/// `None`: loopback only.
pub fn interface(attachment: &Attachment) -> Option<protocol::Interface> {
    attachment.tap.as_ref()?;
    let routes = attachment.routes.iter();
    let neighbors = attachment.neighbors.iter();
    Some(protocol::Interface {
        mac: mac(attachment.mac),
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
                mac: mac(neighbor.mac),
            })
            .collect(),
    })
}

fn mac([a, b, c, d, e, f]: [u8; 6]) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

pub fn user_namespace(users: UserNamespace) -> protocol::UserNamespace {
    let range = |range: IdRange| protocol::IdRange {
        first: range.first,
        length: range.length,
    };
    protocol::UserNamespace {
        uids: Some(range(users.uids)),
        gids: Some(range(users.gids)),
    }
}
