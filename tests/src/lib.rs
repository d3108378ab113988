// SPDX-License-Identifier: Apache-2.0
//! Harness of the end-to-end tests: a registry, a daemon of its own for each test, a CRI client and a
//! census of what the host holds; for some, a real kubelet ([`node`]).
//!
//! The tests see only what kubelet sees, the socket, plus the host from outside. They run where KVM
//! works: `scripts/test` carries them there (`scripts/kvm-host`); started anywhere else they fail and
//! say so.

pub mod census;
pub mod certificate;
pub mod cgroups;
pub mod client;
pub mod daemon;
pub mod kubelet;
pub mod kubepods;
pub mod node;
pub mod node_api;
pub mod registry;
pub mod spdy;
pub mod systemd;
pub mod table;
