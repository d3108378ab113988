// SPDX-License-Identifier: Apache-2.0
//! The kinds of volumes, and how to create and remove those that are not on a disk of their own. Blocks.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use bulkhead_proto::agent::volume::Kind as WantedKind;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::mirror;
use crate::disk::extent::{BadExtent, Extent};

/// The kind of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Disk(Extent),
    Memory { size_bytes: u64 },
    HugePages { page_size_bytes: u64 },
    File,
    Mirror { single_file: bool, in_memory: bool },
}

impl TryFrom<WantedKind> for Kind {
    type Error = BadExtent;

    fn try_from(wanted: WantedKind) -> Result<Self, BadExtent> {
        Ok(match wanted {
            WantedKind::Directory(extent) => Self::Disk(extent.try_into()?),
            WantedKind::Memory(memory) => Self::Memory {
                size_bytes: memory.size_bytes,
            },
            WantedKind::HugePages(huge) => Self::HugePages {
                page_size_bytes: huge.page_size_bytes,
            },
            WantedKind::File(_) => Self::File,
            WantedKind::Mirror(mirror) => Self::Mirror {
                single_file: mirror.single_file,
                in_memory: mirror.in_memory,
            },
        })
    }
}

impl Kind {
    /// Whether its home is a file system in memory.
    pub fn is_in_memory(self) -> bool {
        matches!(
            self,
            Self::Memory { .. }
                | Self::HugePages { .. }
                | Self::Mirror {
                    in_memory: true,
                    ..
                }
        )
    }

    /// Creates an empty volume at `home`. Not for volumes on disk, which `super::disks` mounts.
    pub fn make(self, home: &Path) -> io::Result<()> {
        if let Some(parent) = home.parent() {
            fs::create_dir_all(parent)?;
        }
        if self == Self::File {
            return File::create_new(home).map(drop);
        }
        fs::create_dir(home)?;
        if self.is_in_memory() {
            let (filesystem, size) = match self {
                Self::Memory { size_bytes } if size_bytes > 0 => {
                    (c"tmpfs", format!(",size={size_bytes}"))
                }
                // The kernel refuses a page size for which it has no pool.
                Self::HugePages { page_size_bytes } => {
                    (c"hugetlbfs", format!(",pagesize={page_size_bytes}"))
                }
                _ => (c"tmpfs", String::new()),
            };
            let options = std::ffi::CString::new(format!("mode=0755{size}"))?;
            let options = Some(options.as_c_str());
            mount(filesystem, home, filesystem, MountFlags::empty(), options)?;
        }
        match self {
            Self::Mirror { single_file, .. } => mirror::prepare(home, single_file),
            _ => Ok(()),
        }
    }

    /// Removes a volume. It is no error if it was created only in part or not at all.
    pub fn unmake(self, home: &Path) -> io::Result<()> {
        if self.is_in_memory() {
            // Fails if the file system could not be mounted at all.
            let _ = unmount(home, UnmountFlags::DETACH);
        }
        let removed = match self {
            Self::File => fs::remove_file(home),
            _ => fs::remove_dir_all(home),
        };
        match removed {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}
