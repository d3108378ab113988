// SPDX-License-Identifier: Apache-2.0
//! A pod's network: a network namespace, what CNI puts into it, and a TAP that the guest sees instead.
//!
//! CNI plugins know nothing of VMs: they make an interface in a namespace and give it addresses. We join that
//! interface to a TAP with tc redirects, both ways, below the namespace's own network stack, and tell the guest the
//! MAC, addresses, routes and MTU. So any plugin works unchanged.
//!
//! ```text
//! bridge ── veth ──[ eth0 ── tc redirect ── tap0 ]── bulkhead-vmm ── guest's eth0
//!                  └── namespace of the pod ────┘
//! ```
//! [`Network`] is the way in. It attaches a pod with [`cni`], [`netns`] and [`tap`], and writes a [`record`] first, by
//! which the network can be taken down later. [`ready`] says whether pods get an address, [`sweep`] takes down what
//! belongs to no pod, [`counters`] reads what an interface has carried.
//! The configuration directory is read on every use. A pod keeps the configuration that it was attached with.

mod bandwidth;
mod capabilities;
mod cni;
mod config;
mod counters;
mod failure;
mod interface;
mod leftovers;
mod link;
mod netns;
mod network;
mod ranges;
mod ready;
mod record;
mod request;
mod status;
mod sweep;
#[allow(unsafe_code)]
mod sys;
mod tap;

pub use cni::CniError;
pub use config::NetworkConfig;
pub use counters::{Counters, Direction};
pub use failure::NetworkError;
pub use link::{Neighbor, Route};
pub use network::{Attachment, Network};
pub use ranges::check as subnets;
pub use record::NetworkRecord;
pub use request::{AttachRequest, Dns, PortMapping, Protocol};

#[cfg(test)]
mod tests;
