// SPDX-License-Identifier: Apache-2.0
//! The pause process: PID 1 of a PID namespace that a pod's containers share. It does nothing but exist.
//!
//! Containers can see it as `/proc/1`, so first it changes from the agent's file tree to an empty one.

use std::process::ExitCode;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{UnshareFlags, set_name};

use crate::init::mounts;
use crate::sys;

pub const ROLE: &str = "pause";
pub const ROLE_ARG: &std::ffi::CStr = c"pause";

pub fn run() -> ExitCode {
    match isolate() {
        Ok(()) => idle(),
        Err(_) => ExitCode::FAILURE,
    }
}

fn isolate() -> std::io::Result<()> {
    set_name(c"pause")?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    sys::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWCGROUP)?;
    mounts::enter_empty_root()?;
    sys::reset_signals()?;
    // Ignore child exits, so that the kernel collects the namespace's orphans itself.
    sys::ignore_child_exits()
}

fn idle() -> ! {
    loop {
        std::thread::park();
    }
}
