// SPDX-License-Identifier: Apache-2.0
//! What the host does for a pod's microVM: its processes, files and cgroup.
//!
//! [`launch`] starts a VMM and waits for its agent ([`patience`] says how long), or adopts one that an earlier daemon
//! started. [`process`] is the identity and the end of a process, [`control`] the VMM's control socket, [`shares`] the file
//! server of a guest that has directories of the host. [`cgroup`] bounds all of them, with [`systemd`] where that makes the
//! host's cgroups; [`usage`] reads what a VM costs; [`probe`] says whether this host can run VMs.
//!
//! A guest's agent is spoken to by `bulkhead-guest`, below this; pods are above.

pub mod cgroup;
pub mod control;
mod files;
mod guest;
pub mod launch;
pub mod patience;
pub mod probe;
pub mod process;
pub mod shares;
#[allow(unsafe_code)]
mod sys;
pub mod systemd;
pub mod usage;

pub use files::Files;
pub use guest::Guest;
pub use sys::register;
