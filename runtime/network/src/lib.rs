// SPDX-License-Identifier: Apache-2.0
//! A pod's network: a network namespace, what CNI puts into it, and a TAP that the guest sees instead.
//!
//! CNI plugins know nothing of VMs: they make an interface in a namespace and give it addresses. We connect that
//! interface to a TAP by tc redirects in both directions, below the namespace's own network stack. The guest gets the
//! MAC address, the addresses, the routes and the MTU. So every plugin works unchanged.
//!
//! ```text
//! bridge ── veth ──[ eth0 ── tc redirect ── tap0 ]── bulkhead-vmm ── guest's eth0
//!                  └── namespace of the pod ────┘
//! ```
//! The entrance is [`Network`]. It attaches a pod with [`cni`], [`netns`] and [`tap`]. Before that it writes a
//! [`record`], with which the network can be torn down later. [`ready`] decides whether pods get an address, [`sweep`]
//! tears down networks that belong to no pod, and [`counters`] reads the traffic of an interface.
//!
//! The configuration directory is read for every use. A pod keeps the configuration with which it was attached.

mod bandwidth;
mod capabilities;
mod cni;
mod config;
mod counters;
mod failure;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
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
pub use network::{Ahead, Attachment, Network};
pub use ranges::check as subnets;
pub use record::NetworkRecord;
pub use request::{AttachRequest, Dns, PortMapping, Protocol};
pub use tap::alone as lone_tap;

#[cfg(test)]
mod tests;
