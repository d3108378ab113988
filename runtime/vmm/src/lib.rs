// SPDX-License-Identifier: Apache-2.0
//! One microVM: a KVM virtual machine with a fixed set of virtio devices, in a process of its own.
//!
//! [`config`] (with [`foreseen`]), [`inherited`], [`control`] (with [`extent`] and [`statistics`]) and [`report`] are the whole interface to
//! the parent process: a configuration on standard input, open files beside it, a control socket, and a report at the
//! end. Everything else belongs to the `bulkhead-vmm` binary.
//!
//! ```text
//!  main thread        vCPU threads (one per vCPU)      disk worker     io worker     files worker
//!  control socket,    KVM_RUN, MMIO registers,         image disk,     vsock, net,   shared
//!  end of the VM      serial port                      scratch disk    rng, balloon  directories
//! ```
//! One more thread looks now and then whether the guest has halted for good.
//!
//! [`state`] saves a VM and brings it back, apart from its memory and its disks; [`vm`] writes checkpoints, which have all of
//! it.
//!
//! Dependencies point one way: `vm -> {vcpu, boot, devices} -> memory`. A device never knows the VM.

pub mod boot;
mod bounded;
mod bus;
pub mod config;
pub mod control;
pub mod cpu;
pub mod devices;
pub mod extent;
pub mod foreseen;
#[cfg(test)]
mod guest;
mod halt;
pub mod inherited;
pub mod jail;
pub mod memory;
mod msr;
pub mod probe;
pub mod report;
pub mod slot;
mod sparse;
pub mod start;
pub mod state;
pub mod statistics;
mod surface;
#[allow(unsafe_code)]
mod sys;
pub mod syscalls;
pub mod vcpu;
pub mod vm;

/// Prepares the process. Has to run before the process creates threads.
pub fn prepare_process() {
    sys::use_one_malloc_arena();
}

#[cfg(test)]
mod tests {
    /// A program cannot ask how it was compiled, so this reads what Cargo reads.
    #[test]
    fn sums_that_overflow_end_the_release_build_too() {
        let manifest = include_str!("../../../Cargo.toml");
        let profile = manifest.split("[profile.release.package]").nth(1);
        let profile = profile.and_then(|rest| rest.split("\n[").next());
        for name in [
            "bulkhead-vmm",
            "bulkhead-share",
            "virtio-queue",
            "vm-memory",
        ] {
            let line = format!("\n{name}.overflow-checks = true");
            assert!(profile.is_some_and(|text| text.contains(&line)), "{name}");
        }
    }
}
