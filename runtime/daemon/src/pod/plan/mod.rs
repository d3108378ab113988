// SPDX-License-Identifier: Apache-2.0
//! What is to be done for a pod, calculated before anything is done. Pure: nothing here reads files of the host or asks
//! a guest.
//!
//! - [`sizing`]: how large a VM is; [`limits`]: cgroup limits on the host and in the guest; [`hugepages`]: how many
//!   huge pages a guest reserves; [`swap`] and [`io`]: what the host may swap out, and its I/O; [`cpulist`]: lists of
//!   CPUs and NUMA nodes.
//! - [`program`]: what a container runs, with which [`capabilities`]; [`image_name`]: how its image is shown.
//! - [`declared`]: the volumes that its image declares; [`container_path`]: where something may be mounted.
//! - [`wire`]: what CNI and the guest are told of a pod, with its [`dns`] settings.

pub mod capabilities;
pub mod container_path;
pub mod cpulist;
pub mod declared;
pub mod dns;
pub mod hugepages;
pub mod image_name;
pub mod io;
pub mod limits;
pub mod program;
pub mod sizing;
pub mod swap;
pub mod wire;
