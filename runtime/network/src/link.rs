// SPDX-License-Identifier: Apache-2.0
//! A pod's interface: its name, routes and neighbours.

/// The name of CNI's interface in the namespace.
pub const INTERFACE: &str = "eth0";
/// The MTU of an interface that has none set, and of a guest without a network.
pub const DEFAULT_MTU: u16 = 1500;

/// A route of the pod. 0 and empty mean "not set".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// In CIDR notation.
    pub destination: String,
    /// Empty if the destination is on the link.
    pub gateway: String,
    /// The preferred source address.
    pub source: String,
    pub priority: u32,
    pub mtu: u32,
    /// The largest TCP segment that is advertised.
    pub advmss: u32,
}

/// A static neighbour: its MAC address is known without ARP or NDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbor {
    pub address: String,
    pub mac: [u8; 6],
}
