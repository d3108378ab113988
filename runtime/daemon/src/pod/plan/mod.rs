// SPDX-License-Identifier: Apache-2.0
//! What is to be done for a pod, worked out before anything is done. Pure: no file of the host is read here, and nothing is
//! asked of a guest.
//!
//! [`sizing`] says how large a VM is, [`limits`] what the cgroups on both sides allow, [`hugepages`] what a guest reserves;
//! [`program`] what a container runs, with [`capabilities`]; [`wire`] and [`dns`] what CNI and the guest are told of a pod.

pub mod capabilities;
pub mod cpulist;
pub mod dns;
pub mod hugepages;
pub mod limits;
pub mod program;
pub mod sizing;
pub mod wire;
