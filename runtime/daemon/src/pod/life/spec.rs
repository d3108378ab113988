// SPDX-License-Identifier: Apache-2.0
//! What clients asked for: the settings of pods and containers, checked, as they are stored.
//!
//! `cri` makes these from CRI's messages and shows them in its answers. Nothing here depends on protobuf.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub type Labels = BTreeMap<String, String>;

/// The fields that make a pod unique for Kubernetes.
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
    /// `None`: the DNS settings of the network or, if it has none, those of the host.
    pub dns: Option<Dns>,
    pub port_mappings: Vec<PortMapping>,
    pub labels: Labels,
    pub annotations: Labels,
    pub runtime_handler: String,
    pub pid: PidMode,
    /// Whether it may have privileged containers. Records of earlier versions lack this field; those pods may.
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
    /// The sum for all containers, as kubelet calculates it.
    pub resources: Resources,
    /// The RuntimeClass's overhead, for the VM itself.
    pub overhead: Resources,
    /// The host cgroup that kubelet made for the pod.
    pub cgroup_parent: String,
    /// The size of its scratch disk; `None` means the default.
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

/// Which processes a container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidMode {
    Pod,
    Container,
    /// All processes of the guest: what CRI calls the node is the VM here.
    Node,
    /// The processes of the container with this id.
    Target(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub name: String,
    pub attempt: u32,
    /// A reference or an image id, as CRI gave it.
    pub image: String,
    /// The image as the user wrote it, if CRI tells.
    pub user_image: String,
    #[serde(default)]
    pub image_words: ImageWords,
    pub command: Vec<String>,
    pub args: Vec<String>,
    pub working_directory: String,
    /// Values may have any bytes except NUL.
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
    /// Names of CDI devices. What they add is in the other fields.
    #[serde(default)]
    pub cdi_devices: Vec<String>,
    #[serde(default)]
    pub start_hooks: Vec<StartHook>,
    pub stdin: bool,
    /// Its standard input ends when the first attached client detaches.
    #[serde(default)]
    pub stdin_once: bool,
    pub tty: bool,
    pub security: Security,
    pub resources: Resources,
    pub stop_signal: Option<i32>,
}

/// What CRI tells of an image besides its name. It is only shown in answers: all runtime handlers have the same images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageWords {
    pub annotations: Labels,
    pub runtime_handler: String,
}

/// A mount of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute.
    pub container_path: String,
    pub source: MountSource,
    pub readonly: bool,
    /// Read-only with everything that is mounted below it.
    pub recursive_readonly: bool,
    pub propagation: Propagation,
    #[serde(default)]
    pub options: MountOptions,
    /// The ID mapping of the files' owners, if the pod has a user namespace.
    #[serde(default)]
    pub users: Option<UserNamespace>,
    #[serde(default)]
    pub words: MountWords,
}

/// What the container must not do with the files of a mount (`mount_options` of CRI).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountOptions {
    /// Execute them.
    pub no_exec: bool,
    /// Get privileges by set-user-id and set-group-id bits and by capabilities of files.
    pub no_suid: bool,
    /// Use them as devices.
    pub no_dev: bool,
}

/// What CRI tells of a mount and is only shown in answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountWords {
    /// The container's path as the client wrote it; empty if it is the same as [`Mount::container_path`].
    pub container_path: String,
    pub selinux_relabel: bool,
    pub user_image: String,
    pub image: ImageWords,
}

impl Mount {
    /// If it is of an image: its name and its id.
    pub fn image(&self) -> Option<(&str, &str)> {
        match &self.source {
            MountSource::Image { image, id, .. } => Some((image, id)),
            MountSource::Host(_) => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A path of the host, which may be in one of kubelet's volumes.
    Host(PathBuf),
    /// The directory `sub_path` of an image, or the whole image if it is empty.
    Image {
        image: String,
        sub_path: String,
        /// The id that the image had when the container was created.
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
    #[serde(default)]
    pub owner: NodeOwner,
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
    #[serde(default)]
    pub owner: NodeOwner,
    /// The major and minor number that the device must have on the host, if anybody said so.
    #[serde(default)]
    pub number: Option<(u32, u32)>,
}

/// Owner and mode of a device node, as far as they are not to be the usual ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeOwner {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// A program of the container's files that runs before the container's own: OCI's `startContainer` hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartHook {
    /// Absolute, in the container.
    pub path: String,
    /// With the program's name; empty: only the path.
    pub args: Vec<String>,
    /// `NAME=value`. It has no other variables.
    pub environment: Vec<String>,
    pub timeout: Option<Duration>,
}

impl BlockDevice {
    pub fn writes(&self) -> bool {
        self.permissions.contains('w')
    }
}

/// Whether a container sees what the host mounts below the mount's source later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    Private,
    HostToContainer,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// A pod's user namespace. Ids from 0 in its containers are mapped to these ranges in the guest.
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

/// The user of a container's process. What is not set here comes from the image.
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
    /// The content of a profile file on the host.
    Profile(Vec<u8>),
}

/// Requests and limits in CRI's form. 0 and empty mean "not set".
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
    /// Pairs of page size and bytes.
    pub hugepage_limits: Vec<(String, u64)>,
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// The CPU limit in thousandths of a CPU; 0 if there is none.
    pub fn cpu_limit_millis(&self) -> u64 {
        if self.cpu_quota_us <= 0 || self.cpu_period_us <= 0 {
            return 0;
        }
        let millis = i128::from(self.cpu_quota_us) * 1000 / i128::from(self.cpu_period_us);
        u64::try_from(millis).unwrap_or(u64::MAX)
    }

    /// The CPU request in thousandths, calculated back from the shares: kubelet sets 1024 shares for each CPU, and 2 if
    /// there is no request.
    pub fn cpu_request_millis(&self) -> u64 {
        let shares = u64::try_from(self.cpu_shares).unwrap_or(0);
        if shares <= 2 {
            0
        } else {
            shares.saturating_mul(1000) / 1024
        }
    }

    /// Takes over what is set in `change` and keeps the rest, as CRI defines an update.
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
