// SPDX-License-Identifier: Apache-2.0
//! What was asked for: pods and containers in our own words, checked, as they are stored.
//!
//! `cri` makes these from CRI's messages and shows them again; nothing here knows protobuf.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub type Labels = BTreeMap<String, String>;

/// What makes a pod unique for Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodName {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub attempt: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodSpec {
    pub name: PodName,
    pub hostname: String,
    pub log_directory: String,
    /// `None`: what the network says, else what the host has.
    pub dns: Option<Dns>,
    pub port_mappings: Vec<PortMapping>,
    pub labels: Labels,
    pub annotations: Labels,
    pub runtime_handler: String,
    pub pid: PidMode,
    /// Whether it may have privileged containers. Pods of earlier versions were not asked, and may.
    #[serde(default = "yes")]
    pub privileged: bool,
    #[serde(default)]
    pub users: Option<UserNamespace>,
    pub sysctls: BTreeMap<String, String>,
    #[serde(default)]
    pub limits: PodLimits,
}

fn yes() -> bool {
    true
}

/// What a pod may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodLimits {
    /// All containers together, as kubelet sums it up.
    pub resources: Resources,
    /// What the RuntimeClass adds for the VM.
    pub overhead: Resources,
    /// The host cgroup that kubelet made for the pod.
    pub cgroup_parent: String,
    /// The size of its disk; `None`: the default.
    pub scratch_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    pub host_ip: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// Whose processes a container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidMode {
    Pod,
    Container,
    /// The guest's own: what CRI calls the node is the VM here.
    Node,
    /// Those of the container with this id.
    Target(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub name: String,
    pub attempt: u32,
    /// A reference or an image id, as CRI gave it.
    pub image: String,
    /// What the user wrote, where CRI says so.
    pub user_image: String,
    #[serde(default)]
    pub image_words: ImageWords,
    pub command: Vec<String>,
    pub args: Vec<String>,
    pub working_directory: String,
    /// Values may be any bytes but NUL.
    pub environment: Vec<(String, Vec<u8>)>,
    pub labels: Labels,
    pub annotations: Labels,
    pub log_path: String,
    #[serde(default)]
    pub mounts: Vec<Mount>,
    #[serde(default)]
    pub devices: Vec<Device>,
    #[serde(default)]
    pub block_devices: Vec<BlockDevice>,
    pub stdin: bool,
    /// Its input ends when the first client that is attached to it goes.
    #[serde(default)]
    pub stdin_once: bool,
    pub tty: bool,
    pub security: Security,
    pub resources: Resources,
    pub stop_signal: Option<i32>,
}

/// What CRI says of an image beyond its name. Shown again, and without effect: all handlers have the same images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageWords {
    pub annotations: Labels,
    pub runtime_handler: String,
}

/// Something that is to be mounted in a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute.
    pub container_path: String,
    pub source: MountSource,
    pub readonly: bool,
    /// With everything that is mounted below it.
    pub recursive_readonly: bool,
    pub propagation: Propagation,
    /// Whose the files are, where the pod's users are its own.
    #[serde(default)]
    pub users: Option<UserNamespace>,
    #[serde(default)]
    pub words: MountWords,
}

/// What CRI says of a mount that is only shown again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountWords {
    /// The container's path as it was written; empty: as it is.
    pub container_path: String,
    pub selinux_relabel: bool,
    pub user_image: String,
    pub image: ImageWords,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A path of the host's, which may be one of kubelet's volumes.
    Host(PathBuf),
    /// What is at `sub_path` in an image; empty: all of it.
    Image {
        image: String,
        sub_path: String,
        /// Which image that was when the container was created.
        #[serde(default)]
        id: String,
    },
}

/// A device of the guest that a container gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Absolute.
    pub container_path: String,
    pub guest_path: String,
    /// Some of `r`, `w`, `m`.
    pub permissions: String,
}

/// A block device of the host that a container gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDevice {
    /// Absolute, on the host.
    pub path: PathBuf,
    /// Absolute.
    pub container_path: String,
    /// Some of `r`, `w`, `m`.
    pub permissions: String,
}

impl BlockDevice {
    pub fn writes(&self) -> bool {
        self.permissions.contains('w')
    }
}

/// Whether what the host mounts below a source later appears in the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    Private,
    HostToContainer,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Security {
    pub privileged: bool,
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    pub ambient_capabilities: Vec<String>,
    pub user: User,
    pub no_new_privileges: bool,
    pub readonly_root: bool,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub seccomp: Seccomp,
    pub pid: PidMode,
    #[serde(default)]
    pub users: Option<UserNamespace>,
}

/// Users that are a pod's own: 0 and up in its containers are these in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    pub uids: IdRange,
    pub gids: IdRange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    pub first: u32,
    pub length: u32,
}

/// Who to be, beyond what the image says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub name: String,
    pub supplemental_groups: Vec<i64>,
    /// Do not add the groups that the image's /etc/group lists.
    pub strict_groups: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seccomp {
    RuntimeDefault,
    Unconfined,
    /// The text of a profile of the host's.
    Profile(Vec<u8>),
}

/// Limits; 0 and empty mean none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpu_period_us: i64,
    pub cpu_quota_us: i64,
    pub cpu_shares: i64,
    pub memory_limit_bytes: i64,
    pub memory_swap_limit_bytes: i64,
    pub oom_score_adj: i64,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    /// Page size and bytes.
    pub hugepage_limits: Vec<(String, u64)>,
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// Thousandths of a CPU; 0: none.
    pub fn cpu_limit_millis(&self) -> u64 {
        if self.cpu_quota_us <= 0 || self.cpu_period_us <= 0 {
            return 0;
        }
        let millis = i128::from(self.cpu_quota_us) * 1000 / i128::from(self.cpu_period_us);
        u64::try_from(millis).unwrap_or(u64::MAX)
    }

    /// What the shares were made of: kubelet gives 1024 a CPU, and 2 to who asks for none.
    pub fn cpu_request_millis(&self) -> u64 {
        let shares = u64::try_from(self.cpu_shares).unwrap_or(0);
        if shares <= 2 {
            0
        } else {
            shares.saturating_mul(1000) / 1024
        }
    }

    /// Takes over what `change` says and keeps the rest, as CRI's update means it.
    pub fn update(&mut self, change: &Self) {
        let number = |old: &mut i64, new: i64| {
            if new != 0 {
                *old = new;
            }
        };
        let text = |old: &mut String, new: &String| {
            if !new.is_empty() {
                old.clone_from(new);
            }
        };
        number(&mut self.cpu_period_us, change.cpu_period_us);
        number(&mut self.cpu_quota_us, change.cpu_quota_us);
        number(&mut self.cpu_shares, change.cpu_shares);
        number(&mut self.memory_limit_bytes, change.memory_limit_bytes);
        number(
            &mut self.memory_swap_limit_bytes,
            change.memory_swap_limit_bytes,
        );
        number(&mut self.oom_score_adj, change.oom_score_adj);
        text(&mut self.cpuset_cpus, &change.cpuset_cpus);
        text(&mut self.cpuset_mems, &change.cpuset_mems);
        if !change.hugepage_limits.is_empty() {
            self.hugepage_limits.clone_from(&change.hugepage_limits);
        }
        self.unified.extend(change.unified.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_read_from_quotas_and_shares() {
        for (quota, period, shares, expected) in [
            (150_000, 100_000, 1024, (1500, 1000)),
            (0, 100_000, 2, (0, 0)),
            (-1, 100_000, 0, (0, 0)),
            (5, 0, -7, (0, 0)),
            (i64::MAX, 1, 512, (u64::MAX, 500)),
        ] {
            let resources = Resources {
                cpu_quota_us: quota,
                cpu_period_us: period,
                cpu_shares: shares,
                ..Default::default()
            };
            let found = (resources.cpu_limit_millis(), resources.cpu_request_millis());
            assert_eq!(found, expected, "{quota} {period} {shares}");
        }
    }

    #[test]
    fn an_update_changes_only_what_it_names() {
        let mut resources = Resources {
            cpu_quota_us: 1000,
            memory_limit_bytes: 5,
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        resources.update(&Resources {
            memory_limit_bytes: 7,
            ..Default::default()
        });
        assert_eq!(
            (
                resources.cpu_quota_us,
                resources.memory_limit_bytes,
                resources.cpuset_cpus.as_str()
            ),
            (1000, 7, "0")
        );
    }
}
