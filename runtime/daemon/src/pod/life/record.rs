// SPDX-License-Identifier: Apache-2.0
//! What is stored of a pod and a container.
//!
//! A pod's [`Held`] stack lists the host resources that it has taken. It is used to undo a boot that failed and to
//! release everything when the pod is removed. An entry is written before its resource is taken, so that after a crash
//! the next daemon knows what to look for. Processes are the exception, because their identity is known only once they
//! exist. But a new process does nothing until it gets its configuration, and it ends if the daemon ends before that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bulkhead_guest::user::ProcessUser;
use bulkhead_host::control::Extent;
use bulkhead_host::process::Identity;
use bulkhead_host::shares::mounts::{Access, Propagation, SourceId};
use bulkhead_network::NetworkRecord;
use bulkhead_records::Stamp;
use bulkhead_share::name::ShareName;
use serde::{Deserialize, Serialize};

use super::spec::{ContainerSpec, PodSpec};
use super::state::{ContainerState, PodState};
use super::volume::VolumeMount;

/// A pod as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    /// 64 hex digits.
    pub id: String,
    pub spec: PodSpec,
    pub state: PodState,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// The oldest first. Resources are released in reverse order.
    pub held: Vec<Held>,
    /// In CIDR notation, the primary address first.
    pub addresses: Vec<String>,
    /// Layers that are on the image disk, by diff id.
    pub layers: BTreeMap<String, Extent>,
    /// The size of its VM; zeros while it is not known yet.
    #[serde(default)]
    pub size: VmSize,
    /// What its containers may use together.
    #[serde(default)]
    pub allowance: Allowance,
    /// Volumes of the guest that mirror a directory of the host, by their name in the guest.
    #[serde(default)]
    pub mirrors: BTreeMap<String, MirrorSource>,
    /// Directories and files of the host that are mounted in the guest.
    #[serde(default)]
    pub shares: Vec<ShareRecord>,
    /// The number of the last share that was made.
    #[serde(default)]
    pub shares_made: u16,
    /// Block devices of the host that containers use.
    #[serde(default)]
    pub blocks: Vec<BlockRecord>,
    /// EmptyDirs that are on the volume disk, by their name in the guest. `None` if the VM is of an earlier version,
    /// which keeps emptyDirs on its scratch disk.
    #[serde(default)]
    pub disks: Option<BTreeMap<String, DiskRecord>>,
    /// The files that its VM was started from, as they were: VMM, kernel, initramfs, modules. Empty in records of an
    /// earlier version.
    #[serde(default)]
    pub made_from: Vec<Stamp>,
}

/// The file of a pod's scratch disk, in its state directory.
pub fn scratch_file(state_directory: &Path) -> PathBuf {
    state_directory.join("scratch.ext4")
}

/// Something on the host that belongs to the pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Held {
    /// For sockets, the console's log and the VMM's reports.
    RunDirectory(PathBuf),
    /// For the scratch disk.
    StateDirectory(PathBuf),
    Network(Box<NetworkRecord>),
    /// The user that the VM has for itself.
    User(u32),
    Cgroup(PathBuf),
    Vmm(Identity),
    /// The process that serves host directories to the VM.
    FileServer(Identity),
}

/// What a VM was booted with, and what it can get at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// The most CPUs that it can have.
    pub vcpus: u8,
    /// The CPUs that its kernel booted with. 0 in records of an earlier version, where it booted with all of them.
    #[serde(default)]
    pub boot_vcpus: u8,
    /// Memory at the boot.
    pub memory_mib: u32,
    /// The most memory that it can have. 0 in records of an earlier version, where it is what the VM was booted with.
    #[serde(default)]
    pub memory_max_mib: u32,
    pub scratch_bytes: u64,
    /// Whether it was forked from a template: then "at the boot" means what the template has, and the guest got the rest
    /// when it was configured.
    #[serde(default)]
    pub is_forked: bool,
}

impl VmSize {
    /// The size of a VM of this size that is forked from a template with so much memory and one CPU.
    pub fn forked(self, memory_mib: u32) -> Self {
        Self {
            boot_vcpus: 1,
            memory_mib,
            is_forked: true,
            ..self
        }
    }
}

/// What the containers of a pod may use together. `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// Not including huge pages.
    pub memory_bytes: Option<u64>,
    pub cpu_millis: Option<u64>,
    /// Read from the cgroup that kubelet makes for the pod, because CRI does not tell it.
    #[serde(default)]
    pub hugepage_bytes: u64,
}

/// A share as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShareRecord {
    /// Its name in the guest and in the file server, as text.
    pub name: String,
    pub path: PathBuf,
    pub access: Access,
    pub source: SourceId,
    /// Ids of the containers that mount it.
    pub users: BTreeSet<String>,
}

impl ShareRecord {
    /// The name, parsed.
    pub fn name(&self) -> Option<ShareName> {
        ShareName::parse(&self.name)
    }

    /// Whether this share serves a mount of `source` with this access and propagation.
    pub fn is(&self, access: Access, propagation: Propagation, source: SourceId) -> bool {
        let name = self.name();
        self.source == source
            && self.access == access
            && name.is_some_and(|name| name.propagation == propagation)
    }
}

/// A block device of the host that is attached to the volume disk, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockRecord {
    pub path: PathBuf,
    /// The device number (`st_rdev`). It cannot be reused for another device while the VMM has this one open.
    pub device: u64,
    pub writable: bool,
    pub extent: Extent,
    /// Ids of the containers that use it.
    pub users: BTreeSet<String>,
}

/// An emptyDir that is on the volume disk, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskRecord {
    /// kubelet's directory of the volume.
    pub directory: PathBuf,
    pub extent: Extent,
}

/// The source of a mirror, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorSource {
    /// A directory or a single file on the host.
    pub path: PathBuf,
}

/// A container as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// 64 hex digits.
    pub id: String,
    pub pod_id: String,
    pub spec: ContainerSpec,
    pub state: ContainerState,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    pub image_id: String,
    /// The name under which CRI shows the image, see [`Self::image_name`].
    #[serde(default)]
    pub image_name: String,
    /// The reference that CRI shows: by digest if the image has one, else the image's id.
    pub image_ref: String,
    /// The signal that is sent to stop it.
    pub stop_signal: i32,
    /// `None` if no log was asked for.
    pub log_path: Option<PathBuf>,
    /// kubelet's file for the container's termination message.
    #[serde(default)]
    pub termination_log: Option<PathBuf>,
    /// The emptyDirs that it mounts: kubelet's directory for each, by the volume's name in the guest.
    #[serde(default)]
    pub empty_dirs: BTreeMap<String, PathBuf>,
    /// The volumes of the guest that it mounts, by their places in the container. Empty in records of an earlier version.
    #[serde(default)]
    pub volumes: BTreeMap<String, VolumeMount>,
    /// The user that its process runs as. Known once it has started.
    pub user: Option<ProcessUser>,
    /// If it was brought back from a checkpoint: the id with which its guest made it. What the guest has named after a
    /// container keeps that name.
    #[serde(default)]
    pub first_id: Option<String>,
    /// Whether no client has asked for it yet, so that none sees it: it came with a warmed pod.
    #[serde(default)]
    pub is_waiting: bool,
}

impl ContainerRecord {
    /// The id with which its guest made it.
    pub fn first_id(&self) -> &str {
        self.first_id.as_deref().unwrap_or(&self.id)
    }

    /// The reference with which the container was created. In records of an earlier version, what CRI sent.
    pub fn image_name(&self) -> &str {
        match self.image_name.as_str() {
            "" => &self.spec.image,
            name => name,
        }
    }
}

impl PodRecord {
    /// A pod that is being created and holds nothing yet. `created_at` is in nanoseconds since 1970.
    pub fn new(id: String, created_at: i64, spec: PodSpec) -> Self {
        Self {
            id,
            spec,
            state: PodState::Creating,
            created_at,
            held: Vec::new(),
            addresses: Vec::new(),
            layers: BTreeMap::new(),
            size: VmSize::default(),
            allowance: Allowance::default(),
            mirrors: BTreeMap::new(),
            shares: Vec::new(),
            shares_made: 0,
            blocks: Vec::new(),
            disks: Some(BTreeMap::new()),
            made_from: Vec::new(),
        }
    }

    pub fn vmm(&self) -> Option<Identity> {
        self.held.iter().find_map(|held| match held {
            Held::Vmm(identity) => Some(*identity),
            _ => None,
        })
    }

    /// The user that its VM has for itself.
    pub fn user(&self) -> Option<u32> {
        self.held.iter().find_map(|held| match held {
            Held::User(user) => Some(*user),
            _ => None,
        })
    }

    pub fn network(&self) -> Option<&NetworkRecord> {
        self.held.iter().find_map(|held| match held {
            Held::Network(record) => Some(record.as_ref()),
            _ => None,
        })
    }

    /// Replaces the planned network on the stack by the one that was made.
    pub fn hold_network(&mut self, record: NetworkRecord) {
        for held in &mut self.held {
            if let Held::Network(known) = held {
                **known = record.clone();
            }
        }
    }

    /// Takes the network off the stack. Call this if it could not be made.
    pub fn release_network(&mut self) {
        self.held.retain(|held| !matches!(held, Held::Network(_)));
    }

    /// Takes the file server off the stack. Call this if it has ended and never had a share.
    pub fn release_file_server(&mut self) {
        self.held
            .retain(|held| !matches!(held, Held::FileServer(_)));
    }

    pub fn file_server(&self) -> Option<Identity> {
        self.held.iter().find_map(|held| match held {
            Held::FileServer(identity) => Some(*identity),
            _ => None,
        })
    }

    /// Its addresses, as long as it has its network.
    pub fn held_addresses(&self) -> &[String] {
        match self.network() {
            Some(_) => &self.addresses,
            None => &[],
        }
    }

    /// The VMM's cgroup on the host.
    pub fn cgroup(&self) -> Option<&Path> {
        self.held.iter().find_map(|held| match held {
            Held::Cgroup(path) => Some(path.as_path()),
            _ => None,
        })
    }

    pub fn run_directory(&self) -> Option<&PathBuf> {
        self.held.iter().find_map(|held| match held {
            Held::RunDirectory(path) => Some(path),
            _ => None,
        })
    }

    pub fn state_directory(&self) -> Option<&PathBuf> {
        self.held.iter().find_map(|held| match held {
            Held::StateDirectory(path) => Some(path),
            _ => None,
        })
    }

    /// The file of its scratch disk.
    pub fn scratch_file(&self) -> Option<PathBuf> {
        self.state_directory()
            .map(|directory| scratch_file(directory))
    }
}
