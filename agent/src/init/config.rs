// SPDX-License-Identifier: Apache-2.0
//! What the agent tells the process that is to become a container's program, and what it hears back.
//!
//! Both sides are this same binary, so the encoding is private; protobuf because it is linked anyway.
//! The configuration travels in a memory file (any size, nobody waits), the answers as datagrams.

use bulkhead_proto::agent::{Identity, Process};

/// Descriptors at fixed numbers in the new process; 0, 1 and 2 are the program's own.
pub const CONFIG_FD: i32 = 3;
pub const REPORT_FD: i32 = 4;
/// With the exec role: a pidfd of the container's first process.
pub const TARGET_FD: i32 = 5;

/// Exit code and message for each way in which a start fails, as runc has them.
pub const EXIT_NOT_FOUND: i32 = 127;
pub const EXIT_NOT_EXECUTABLE: i32 = 126;
pub const EXIT_OTHER: i32 = 128;

#[derive(Clone, PartialEq, prost::Message)]
pub struct InitConfig {
    /// The mounted root file system; unused by the exec role.
    #[prost(string, tag = "1")]
    pub rootfs: String,
    /// Directories of the cgroup to join, the first first; each is `cgroup.procs` to be written.
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
    /// A compiled filter; empty: none.
    #[prost(uint64, repeated, tag = "8")]
    pub seccomp: Vec<u64>,
    #[prost(uint32, tag = "9")]
    pub seccomp_flags: u32,
    /// In the order in which they are made.
    #[prost(message, repeated, tag = "10")]
    pub mounts: Vec<BindMount>,
    #[prost(message, repeated, tag = "11")]
    pub devices: Vec<GivenDevice>,
    /// The process is in the pod's own user namespace and in its cgroup already.
    #[prost(bool, tag = "12")]
    pub own_users: bool,
}

/// A device that the container gets beside the usual ones.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GivenDevice {
    /// Absolute, in the container's tree.
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(uint32, tag = "2")]
    pub major: u32,
    #[prost(uint32, tag = "3")]
    pub minor: u32,
    /// As the cgroup's program has it.
    #[prost(uint32, tag = "4")]
    pub access: u32,
    /// Else a character device.
    #[prost(bool, tag = "5")]
    pub block: bool,
    /// Permission bits of the node.
    #[prost(uint32, tag = "6")]
    pub mode: u32,
    #[prost(uint32, tag = "7")]
    pub uid: u32,
    #[prost(uint32, tag = "8")]
    pub gid: u32,
    /// The guest's own node; empty where there is none that a container could have.
    #[prost(string, tag = "9")]
    pub guest_path: String,
}

/// Something of the agent's tree that appears in the container's.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BindMount {
    /// Absolute, in the agent's tree.
    #[prost(string, tag = "1")]
    pub source: String,
    /// Below the source; empty: the source itself.
    #[prost(string, tag = "2")]
    pub sub_path: String,
    /// Absolute, in the container's tree.
    #[prost(string, tag = "3")]
    pub target: String,
    #[prost(bool, tag = "4")]
    pub readonly: bool,
    #[prost(bool, tag = "5")]
    pub recursive_readonly: bool,
    /// What is mounted below the source later appears in the container too.
    #[prost(bool, tag = "6")]
    pub follows_host: bool,
}

/// What the new process says, in order: perhaps `Terminal`, then `Executing`, then either a failure
/// or nothing, because a successful exec closes the channel.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    #[prost(oneof = "Event", tags = "1, 2, 3")]
    pub event: Option<Event>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Event {
    /// Comes with the terminal's controlling side as a descriptor.
    #[prost(bool, tag = "1")]
    Terminal(bool),
    /// The next thing that happens is the exec, as this user.
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

/// Names the stage in which a system call failed.
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
