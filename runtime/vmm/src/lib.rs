// SPDX-License-Identifier: Apache-2.0
//! One microVM: a KVM virtual machine with a fixed set of virtio devices, in a process of its own.
//!
//! [`config`], [`control`] (with [`extent`] and [`statistics`]) and [`report`] are the whole interface to the
//! parent process: a configuration on standard input, a control socket, and a report at the end. Everything
//! else belongs to the `bulkhead-vmm` binary.
//!
//! ```text
//!  main thread        vCPU threads (one per vCPU)      disk worker     io worker     files worker
//!  control socket,    KVM_RUN, MMIO registers,         image disk,     vsock, net,   shared
//!  end of the VM      serial port                      scratch disk    rng, balloon  directories
//! ```
//! One more thread looks now and then whether the guest has halted for good.
//!
//! Dependencies point one way: `vm -> {vcpu, boot, devices} -> memory`. A device never knows the VM.

pub mod boot;
mod bus;
pub mod config;
pub mod control;
pub mod cpu;
pub mod devices;
pub mod extent;
mod halt;
pub mod jail;
pub mod memory;
mod msr;
pub mod probe;
pub mod report;
pub mod slot;
pub mod statistics;
mod surface;
#[allow(unsafe_code)]
mod sys;
pub mod vcpu;
pub mod vm;

/// Prepares the process. Has to run before the process creates threads.
pub fn prepare_process() {
    sys::use_one_malloc_arena();
}
