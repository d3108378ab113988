// SPDX-License-Identifier: Apache-2.0
//! Turns a copy of the agent's binary into a container's program.
//!
//! There is one process with one thread. The agent has created it, in its PID namespace, and waits on the report
//! channel. All other steps are done here, in the only order that works:
//!
//! ```text
//! container: cgroup -> namespaces -> rootfs -> terminal -> limits -> credentials -> hooks -> exec
//! exec:      cgroup -> setns ----------------> terminal -> limits -> credentials ----------> exec
//! ```
//!
//! After the pivot no path leads to a file of the guest, so an image's symbolic links cannot lead out of it.
//! The only exception would be magic links in `/proc`; [`paths`] does not follow them.

mod binds;
mod caps;
pub mod config;
mod credentials;
mod devices;
mod exec;
mod hooks;
pub mod limits;
pub mod mounts;
mod paths;
mod report;
mod rootfs;
mod terminal;
pub mod user;

use std::ffi::CStr;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use prost::Message;
use rustix::process::{DumpableBehavior, set_dumpable_behavior, setsid};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces};

use self::config::{Failure, InitConfig, Stage};
use self::report::Reporter;
use crate::sys;

pub const CONTAINER_ROLE: &str = "container-init";
pub const CONTAINER_ROLE_ARG: &CStr = c"container-init";
pub const EXEC_ROLE: &str = "container-exec";
pub const EXEC_ROLE_ARG: &CStr = c"container-exec";

/// Whether the process becomes a container's first process or an additional command in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Container,
    Exec,
}

/// Runs such a process until the exec, or until a step fails.
pub fn run(role: Role) -> ExitCode {
    let Ok(reporter) = sys::inherited_fd(config::REPORT_FD).map(Reporter::new) else {
        return ExitCode::FAILURE;
    };
    let failure = match become_program(role, &reporter) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let code = u8::try_from(failure.exit_code).unwrap_or(1);
    reporter.failed(failure);
    ExitCode::from(code)
}

/// Takes the steps to the exec, in the order that the head of this file shows.
fn become_program(role: Role, reporter: &Reporter) -> Result<std::convert::Infallible, Failure> {
    // Before the exec, other processes of the container could reach the agent's file tree through this process.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).stage("make the process undumpable")?;
    let config = read_config().stage("read the configuration")?;
    let process = config
        .process
        .clone()
        .ok_or_else(|| Failure::other("no process configured"))?;
    if !config.own_users {
        fs::write(&config.cgroup_procs, "0").stage_on("join cgroup", &config.cgroup_procs)?;
        limits::set_oom_score_adj(process.oom_score_adj)?;
    }
    match role {
        Role::Container => {
            sys::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWCGROUP)
                .stage("create namespaces")?;
            rootfs::enter(&config)?;
        }
        Role::Exec => {
            let target =
                sys::inherited_fd(config::TARGET_FD).stage("take over the container's pidfd")?;
            join(&target).stage("join the container's namespaces")?;
        }
    }
    setsid().stage("start a session")?;
    if process.terminal {
        terminal::attach(role, reporter)?;
    }
    if role == Role::Container {
        // Later the root may be read-only.
        exec::working_directory(&process.cwd)?;
        rootfs::seal(&config)?;
    }
    limits::set_rlimits(&process.rlimits)?;
    exec::execute(&process, &config, reporter)
}

fn read_config() -> std::io::Result<InitConfig> {
    let mut file = fs::File::from(sys::inherited_fd(config::CONFIG_FD)?);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    InitConfig::decode(bytes.as_slice()).map_err(std::io::Error::other)
}

fn join(target: &OwnedFd) -> rustix::io::Result<()> {
    move_into_thread_name_spaces(
        target.as_fd(),
        ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::CONTROL_GROUP,
    )
}
