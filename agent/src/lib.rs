// SPDX-License-Identifier: Apache-2.0
//! The Bulkhead guest agent: PID 1 of every pod's virtual machine.
//!
//! One static binary with five roles; its arguments select the role. As PID 1 it boots the guest and serves
//! the daemon ([`boot`], [`service`]). The other three are its own children. It creates them by executing
//! itself again, so that only single-threaded code runs between a fork and an exec: `container-init` and
//! `container-exec` become a container's program ([`init`]), `pause` keeps a pod's shared PID namespace
//! ([`pause`]). The fifth is started by the kernel, to load a module ([`modules`]).
//!
//! All of it is this library, so that fuzz targets can reach the parsers in it (`fuzzing`, with the feature of that
//! name). Its other user is the program in `main.rs`.

mod boot;
mod cgroup;
mod clock;
mod container;
mod disk;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod hotplug;
mod init;
mod modules;
mod network;
mod patience;
mod pause;
mod power;
mod reaper;
mod sandbox;
mod seccomp;
mod server;
mod service;
mod statistics;
mod streams;
#[allow(unsafe_code)]
mod sys;
mod users;
mod volumes;

use std::process::ExitCode;

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let role = std::env::args().nth(1);
    match role.as_deref() {
        Some(init::CONTAINER_ROLE) => init::run(init::Role::Container),
        Some(init::EXEC_ROLE) => init::run(init::Role::Exec),
        Some(pause::ROLE) => pause::run(),
        Some(modules::ROLE) => modules::run(),
        _ if std::process::id() == 1 => boot::run(),
        _ => {
            eprintln!(
                "bulkhead-agent {} runs as PID 1 of a Bulkhead guest",
                env!("CARGO_PKG_VERSION")
            );
            ExitCode::FAILURE
        }
    }
}
