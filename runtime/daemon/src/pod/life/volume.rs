// SPDX-License-Identifier: Apache-2.0
//! What is stored of a container's mounts whose volumes its guest has. A container that is brought back has the same ones,
//! so they are what it is compared with.

use std::fmt;

use bulkhead_guest::protocol::volume::Kind;
use serde::{Deserialize, Serialize};

/// A volume of the guest at a path of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Its name in the guest.
    pub volume: String,
    /// The part of it that is mounted; empty for all of it.
    pub sub_path: String,
    pub kind: VolumeKind,
}

/// What a volume of the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeKind {
    Disk,
    Memory { size_bytes: u64 },
    HugePages { page_size_bytes: u64 },
    TerminationLog,
    Mirror { single_file: bool, in_memory: bool },
}

impl From<&Kind> for VolumeKind {
    fn from(kind: &Kind) -> Self {
        match kind {
            Kind::Directory(_) => Self::Disk,
            Kind::Memory(memory) => Self::Memory {
                size_bytes: memory.size_bytes,
            },
            Kind::HugePages(huge) => Self::HugePages {
                page_size_bytes: huge.page_size_bytes,
            },
            Kind::File(_) => Self::TerminationLog,
            Kind::Mirror(mirror) => Self::Mirror {
                single_file: mirror.single_file,
                in_memory: mirror.in_memory,
            },
        }
    }
}

impl fmt::Display for VolumeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk => f.write_str("an emptyDir on disk"),
            Self::Memory { size_bytes } => {
                write!(f, "an emptyDir in memory of {size_bytes} bytes")
            }
            Self::HugePages { page_size_bytes } => {
                write!(f, "an emptyDir of huge pages of {page_size_bytes} bytes")
            }
            Self::TerminationLog => f.write_str("a termination log"),
            Self::Mirror {
                single_file: true, ..
            } => f.write_str("a file of kubelet"),
            Self::Mirror {
                in_memory: true, ..
            } => f.write_str("a Secret, projected or downwardAPI volume"),
            Self::Mirror { .. } => f.write_str("a ConfigMap"),
        }
    }
}
