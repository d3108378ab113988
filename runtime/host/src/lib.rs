// SPDX-License-Identifier: Apache-2.0
//! What the host does for a pod's microVM: its processes, files and cgroup.
//!
//! [`launch`] starts a VMM and waits for its agent ([`patience`] decides how long), or adopts one that an earlier
//! daemon started; [`template`] keeps what VMs are forked from, [`saved`] what they are restored from. [`process`] identifies processes and notices their end, [`pulse`] a guest that has fallen silent,
//! [`control`] is the client of the VMM's control socket, and [`shares`] starts the file server of a guest with
//! directories of the host. [`cgroup`] limits all of these, with [`systemd`]'s help if that makes the host's cgroups.
//! [`cores`] keeps VMs off each other's CPU cores. [`usage`] reads what a VM uses, and [`probe`] checks whether this
//! host can run VMs, and [`clock`] notices when its clock is set. A [`HostPath`] is a path that was looked up once.
//!
//! The crate `bulkhead-guest`, on which this one depends, talks to the guest's agent. Pods are in the daemon, above
//! both.

pub mod cgroup;
pub mod clock;
pub mod control;
pub mod cores;
mod files;
mod guest;
mod host_path;
pub mod launch;
pub mod patience;
pub mod probe;
pub mod process;
pub mod pulse;
pub mod saved;
pub mod shares;
pub mod strays;
#[allow(unsafe_code)]
mod sys;
pub mod systemd;
pub mod template;
pub mod usage;

pub use files::{Files, open_regular};
pub use guest::Guest;
pub use host_path::{HostPath, open_without_links};
pub use sys::register;
