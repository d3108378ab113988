// SPDX-License-Identifier: Apache-2.0
//! The messages between the agent and the process that becomes a container's program: a configuration for it, and its
//! reports.
//!
//! Both sides are this same binary, so the encoding is private. It is protobuf because that is linked anyway. The
//! configuration is in a memory file, which may have any size and blocks nobody; the reports are datagrams.

use std::collections::HashMap;

use bulkhead_proto::agent::{Identity, Process, StartHook};

/// Fixed descriptor numbers in the new process. 0, 1 and 2 belong to the program.
pub const CONFIG_FD: i32 = 3;
pub const REPORT_FD: i32 = 4;
/// With the exec role: a pidfd of the container's first process.
pub const TARGET_FD: i32 = 5;

/// Exit codes for failed starts, the same as runc's.
pub const EXIT_NOT_FOUND: i32 = 127;
pub const EXIT_NOT_EXECUTABLE: i32 = 126;
pub const EXIT_OTHER: i32 = 128;

/// Everything that the new process needs to become a container's program.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InitConfig {
    /// The mounted root file system. Not used by the exec role.
    #[prost(string, tag = "1")]
    pub rootfs: String,
    /// The file `cgroup.procs` of the cgroup to join.
    #[prost(string, tag = "2")]
    pub cgroup_procs: String,
    #[prost(message, optional, tag = "3")]
    pub process: Option<Process>,
    #[prost(bool, tag = "4")]
    pub readonly_rootfs: bool,
    #[prost(bool, tag = "5")]
    pub privileged: bool,
    #[prost(string, repeated, tag = "6")]
    pub masked_paths: Vec<String>,
    #[prost(string, repeated, tag = "7")]
    pub readonly_paths: Vec<String>,
    /// The compiled filter. Empty if there is none.
    #[prost(uint64, repeated, tag = "8")]
    pub seccomp: Vec<u64>,
    #[prost(uint32, tag = "9")]
    pub seccomp_flags: u32,
    /// Mounts, in the order in which they are made.
    #[prost(message, repeated, tag = "10")]
    pub mounts: Vec<BindMount>,
    #[prost(message, repeated, tag = "11")]
    pub devices: Vec<GivenDevice>,
    /// The process is already in the pod's user namespace and in its cgroup.
    #[prost(bool, tag = "12")]
    pub own_users: bool,
    /// What runs before the program. Only with the container role.
    #[prost(message, optional, tag = "13")]
    pub hooks: Option<Hooks>,
}

/// Programs that run in the container before its own, and what they read of it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hooks {
    #[prost(message, repeated, tag = "1")]
    pub programs: Vec<StartHook>,
    #[prost(string, tag = "2")]
    pub container_id: String,
    #[prost(map = "string, string", tag = "3")]
    pub annotations: HashMap<String, String>,
}

/// A device that the container gets in addition to the default ones.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GivenDevice {
    /// Absolute path in the container's tree.
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(uint32, tag = "2")]
    pub major: u32,
    #[prost(uint32, tag = "3")]
    pub minor: u32,
    /// The access bits of the cgroup's device program.
    #[prost(uint32, tag = "4")]
    pub access: u32,
    /// Whether it is a block device. Otherwise it is a character device.
    #[prost(bool, tag = "5")]
    pub block: bool,
    /// Permission bits of the node.
    #[prost(uint32, tag = "6")]
    pub mode: u32,
    #[prost(uint32, tag = "7")]
    pub uid: u32,
    #[prost(uint32, tag = "8")]
    pub gid: u32,
    /// The path of the guest's own node. Empty if there is none that a container may get.
    #[prost(string, tag = "9")]
    pub guest_path: String,
}

/// A part of the agent's tree that is mounted in the container's tree.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BindMount {
    /// Absolute path in the agent's tree.
    #[prost(string, tag = "1")]
    pub source: String,
    /// Path below the source. Empty for the source itself.
    #[prost(string, tag = "2")]
    pub sub_path: String,
    /// Absolute path in the container's tree.
    #[prost(string, tag = "3")]
    pub target: String,
    #[prost(bool, tag = "4")]
    pub readonly: bool,
    #[prost(bool, tag = "5")]
    pub recursive_readonly: bool,
    /// What is mounted below the source later also appears in the container.
    #[prost(bool, tag = "6")]
    pub follows_host: bool,
    /// These hold for what is mounted below the source, too.
    #[prost(bool, tag = "7")]
    pub no_exec: bool,
    #[prost(bool, tag = "8")]
    pub no_suid: bool,
    #[prost(bool, tag = "9")]
    pub no_dev: bool,
    /// Parents come first.
    #[prost(message, repeated, tag = "10")]
    pub parts: Vec<Part>,
}

/// A place below the source that gets a mount of its own, because it is read-only and what is around it is not, or the
/// other way round.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Part {
    /// Relative to the source.
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(bool, tag = "2")]
    pub readonly: bool,
}

/// A report of the new process. Their order: `Terminal` if it has one, then `Executing`, then `Failed` if the exec
/// fails. A successful exec closes the channel instead.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    #[prost(oneof = "Event", tags = "1, 2, 3")]
    pub event: Option<Event>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Event {
    /// Comes with a descriptor, the controlling side of the terminal.
    #[prost(bool, tag = "1")]
    Terminal(bool),
    /// The next step is the exec, as this user.
    #[prost(message, tag = "2")]
    Executing(Identity),
    #[prost(message, tag = "3")]
    Failed(Failure),
}

/// Why the program could not be executed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failure {
    #[prost(string, tag = "1")]
    pub message: String,
    #[prost(int32, tag = "2")]
    pub exit_code: i32,
}

impl Failure {
    pub fn other(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            exit_code: EXIT_OTHER,
        }
    }

    pub fn new(exit_code: i32, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            exit_code,
        }
    }
}

/// Adds the failed stage to the error of a system call.
pub trait Stage<T> {
    fn stage(self, stage: &str) -> Result<T, Failure>;
    fn stage_on(self, stage: &str, object: &str) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Display> Stage<T> for Result<T, E> {
    fn stage(self, stage: &str) -> Result<T, Failure> {
        self.map_err(|e| Failure::other(format!("{stage}: {e}")))
    }

    fn stage_on(self, stage: &str, object: &str) -> Result<T, Failure> {
        self.map_err(|e| Failure::other(format!("{stage} {object:?}: {e}")))
    }
}
