// SPDX-License-Identifier: Apache-2.0
//! Harness of the end-to-end tests: one registry, a daemon for each test, a CRI client, and a
//! census of what the host holds. Some tests have a real kubelet ([`node`]), others a whole cluster ([`cluster`]).
//!
//! The tests see what kubelet sees, the CRI socket, and the host from outside. They need working KVM:
//! `scripts/test` runs them on such a host (`scripts/kvm-host`). Elsewhere they fail and say why.

pub mod census;
pub mod certificate;
pub mod cgroups;
pub mod client;
pub mod cluster;
pub mod containerd;
pub mod daemon;
pub mod disk;
pub mod faults;
pub mod kubelet;
pub mod node;
pub mod node_api;
pub mod page;
pub mod registry;
pub mod spdy;
pub mod systemd;
pub mod table;
pub mod wait;
pub mod watch;
pub mod workload;
