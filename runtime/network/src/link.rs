// SPDX-License-Identifier: Apache-2.0
//! A pod's interface: its name, and the ways that it knows, which are routes and neighbours.

/// CNI's name of the interface in the namespace.
pub const INTERFACE: &str = "eth0";
/// Of an interface that does not say, and of a guest without a network.
pub const DEFAULT_MTU: u16 = 1500;

/// A route of the pod; 0 and empty: not said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// CIDR.
    pub destination: String,
    /// Empty: on link.
    pub gateway: String,
    /// The source address that it prefers.
    pub source: String,
    pub priority: u32,
    pub mtu: u32,
    /// The largest TCP segment that is advertised.
    pub advmss: u32,
}

/// A neighbour whose address on the link is known without asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbor {
    pub address: String,
    pub mac: [u8; 6],
}
