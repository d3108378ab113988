// SPDX-License-Identifier: Apache-2.0
//! What is stored of a pod and a container.
//!
//! A pod's [`Held`] stack is both the undo of a start that failed and the list of what a removal gives back. It is written
//! before a thing is taken, so that a daemon that died in between knows what to look for. A process has its entry once it
//! exists, and does nothing before that: it waits for its configuration, and ends when the daemon that was to give it one
//! ends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bulkhead_guest::user::ProcessUser;
use bulkhead_host::control::Extent;
use bulkhead_host::process::Identity;
use bulkhead_host::shares::mounts::{Access, Propagation, SourceId};
use bulkhead_network::NetworkRecord;
use bulkhead_share::name::ShareName;
use serde::{Deserialize, Serialize};

use super::spec::{ContainerSpec, PodSpec};
use super::state::{ContainerState, PodState};

/// A pod as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    /// 64 hex digits.
    pub id: String,
    pub spec: PodSpec,
    pub state: PodState,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Oldest first; given back in reverse.
    pub held: Vec<Held>,
    /// CIDR, the primary one first.
    pub addresses: Vec<String>,
    /// Layers that are on the image disk, by diff id.
    pub layers: BTreeMap<String, Extent>,
    /// Of its VM; zeros before that is known.
    #[serde(default)]
    pub size: VmSize,
    /// What its containers may use together.
    #[serde(default)]
    pub allowance: Allowance,
    /// Volumes of the guest that follow the host's, by their name in the guest.
    #[serde(default)]
    pub mirrors: BTreeMap<String, MirrorSource>,
    /// Directories and files of the host that are mounted in the guest.
    #[serde(default)]
    pub shares: Vec<ShareRecord>,
    /// The number of the last share that was made.
    #[serde(default)]
    pub shares_made: u16,
    /// Block devices of the host that containers have.
    #[serde(default)]
    pub blocks: Vec<BlockRecord>,
    /// EmptyDirs that are on the volume disk, by their name in the guest. `None`: the VM is of a version that keeps them
    /// on its scratch disk.
    #[serde(default)]
    pub disks: Option<BTreeMap<String, DiskRecord>>,
}

/// Something on the host that belongs to the pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Held {
    /// Sockets, console, reports.
    RunDirectory(PathBuf),
    /// The scratch disk.
    StateDirectory(PathBuf),
    Network(Box<NetworkRecord>),
    Cgroup(PathBuf),
    Vmm(Identity),
    /// Serves host directories to the VM.
    FileServer(Identity),
}

/// What a VM was booted with, and what it can get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// All CPUs that it can have.
    pub vcpus: u8,
    /// Those that its kernel started with; 0, of an earlier version: all.
    #[serde(default)]
    pub boot_vcpus: u8,
    /// At the boot.
    pub memory_mib: u32,
    /// At most; 0, of an earlier version: what it was booted with.
    #[serde(default)]
    pub memory_max_mib: u32,
    pub scratch_bytes: u64,
}

/// What the containers of a pod may use together; `None`: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// Without huge pages.
    pub memory_bytes: Option<u64>,
    pub cpu_millis: Option<u64>,
    /// What kubelet's cgroup of the pod allows; CRI does not tell.
    #[serde(default)]
    pub hugepage_bytes: u64,
}

/// A share as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShareRecord {
    /// In the guest and in the file server.
    pub name: String,
    pub path: PathBuf,
    pub access: Access,
    pub source: SourceId,
    /// Ids of the containers that mount it.
    pub users: BTreeSet<String>,
}

impl ShareRecord {
    pub fn name(&self) -> Option<ShareName> {
        ShareName::parse(&self.name)
    }

    pub fn is(&self, access: Access, propagation: Propagation, source: SourceId) -> bool {
        let name = self.name();
        self.source == source
            && self.access == access
            && name.is_some_and(|name| name.propagation == propagation)
    }
}

/// A device of the host that is on the volume disk, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockRecord {
    pub path: PathBuf,
    /// `st_rdev`; it stays the device's while the VMM has it open.
    pub device: u64,
    pub writable: bool,
    pub extent: Extent,
    /// Ids of the containers that have it.
    pub users: BTreeSet<String>,
}

/// An emptyDir that is on the volume disk, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskRecord {
    /// kubelet's, of the volume.
    pub directory: PathBuf,
    pub extent: Extent,
}

/// What a mirror is made from, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorSource {
    /// On the host: a directory or a single file.
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
    /// What CRI shows as the reference: a digest if the image has one.
    pub image_ref: String,
    /// Sent to stop it.
    pub stop_signal: i32,
    /// `None`: nobody wants the log.
    pub log_path: Option<PathBuf>,
    /// kubelet's file for what the container says last.
    #[serde(default)]
    pub termination_log: Option<PathBuf>,
    /// EmptyDirs that it mounts, by their name in the guest, and kubelet's directories of them.
    #[serde(default)]
    pub empty_dirs: BTreeMap<String, PathBuf>,
    /// Known once it has run.
    pub user: Option<ProcessUser>,
}

impl PodRecord {
    pub fn vmm(&self) -> Option<Identity> {
        self.held.iter().find_map(|held| match held {
            Held::Vmm(identity) => Some(*identity),
            _ => None,
        })
    }

    pub fn network(&self) -> Option<&NetworkRecord> {
        self.held.iter().find_map(|held| match held {
            Held::Network(record) => Some(record.as_ref()),
            _ => None,
        })
    }

    /// Takes note of how the network came out that was planned and is on the stack.
    pub fn hold_network(&mut self, record: NetworkRecord) {
        for held in &mut self.held {
            if let Held::Network(known) = held {
                **known = record.clone();
            }
        }
    }

    /// The network was not made, and nothing of it is left.
    pub fn release_network(&mut self) {
        self.held.retain(|held| !matches!(held, Held::Network(_)));
    }

    pub fn file_server(&self) -> Option<Identity> {
        self.held.iter().find_map(|held| match held {
            Held::FileServer(identity) => Some(*identity),
            _ => None,
        })
    }

    /// Its addresses, while they are its own.
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
}
