// SPDX-License-Identifier: Apache-2.0
//! Block volumes: devices of the host that containers of a pod have as block devices. The owner's part.
//!
//! A device goes to the VMM as a descriptor and becomes a range of the volume disk. Containers that have the same
//! device with the same access have the same range; it is given back when the last of them is removed. Devices are not
//! claimed (O_EXCL): kubelet gives one to several containers, and one that is ReadWriteMany to several pods. Writes are
//! synchronous (O_DSYNC): what the guest was told is written, is on the device.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::control::{self, Extent};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::PodError;
use super::owner::Owner;
use super::spec::BlockDevice;

/// An error about a device of the host.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("open block device {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "{path} is no block device but {what}: only block devices of the host can be a container's"
    )]
    Kind { path: PathBuf, what: &'static str },
    #[error("character device {path} of the host: a pod has a kernel of its own, which lacks it")]
    Character { path: PathBuf },
    #[error("block device {path} has no sectors: is anything behind it?")]
    Empty { path: PathBuf },
}

/// A device of the host that is on the volume disk, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockRecord {
    pub path: PathBuf,
    /// `st_rdev`; it stays the device's while the VMM has it open.
    device: u64,
    writable: bool,
    extent: Extent,
    /// Ids of the containers that have it.
    users: BTreeSet<String>,
}

/// A device that was found and opened, for a container that is to have it.
#[derive(Debug)]
pub struct OpenBlock {
    file: File,
    device: u64,
    writable: bool,
    ownership: protocol::Ownership,
    wanted: BlockDevice,
}

impl OpenBlock {
    /// Blocks as long as the device's driver does.
    fn open(wanted: &BlockDevice) -> Result<Self, BlockError> {
        let path = &wanted.path;
        let failed = |source| BlockError::Open {
            path: path.clone(),
            source,
        };
        // What it is must be known before it is opened: that alone can change something, or wait.
        let place = OpenOptions::new()
            .read(true)
            .custom_flags(flags(OFlags::PATH))
            .open(path)
            .map_err(failed)?;
        let metadata = place.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if kind.is_char_device() {
            return Err(BlockError::Character { path: path.clone() });
        }
        if !kind.is_block_device() {
            return Err(BlockError::Kind {
                path: path.clone(),
                what: match kind {
                    _ if kind.is_dir() => "a directory",
                    _ if kind.is_file() => "a file",
                    _ => "a socket or a pipe",
                },
            });
        }
        let same = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
        let (mut file, writable) = open_device(&same, wanted.writes()).map_err(failed)?;
        if file.seek(SeekFrom::End(0)).map_err(failed)? == 0 {
            return Err(BlockError::Empty { path: path.clone() });
        }
        Ok(Self {
            file,
            device: metadata.rdev(),
            writable,
            ownership: protocol::Ownership {
                mode: metadata.mode() & 0o777,
                uid: metadata.uid(),
                gid: metadata.gid(),
            },
            wanted: wanted.clone(),
        })
    }
}

/// Opens for writing if that is wanted and the device is not read-only; says whether it did.
fn open_device(path: &Path, write: bool) -> io::Result<(File, bool)> {
    let open = |write: bool| {
        let mut options = OpenOptions::new();
        options.read(true).write(write);
        if write {
            options.custom_flags(flags(OFlags::DSYNC));
        }
        options.open(path)
    };
    match open(write) {
        Ok(file) => Ok((file, write)),
        // A read-only device refuses root as well.
        Err(e)
            if write
                && matches!(
                    e.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                ) =>
        {
            Ok((open(false)?, false))
        }
        Err(e) => Err(e),
    }
}

fn flags(flags: OFlags) -> i32 {
    i32::try_from(flags.bits()).unwrap_or(0)
}

/// Finds and opens what a container is to have, before anything is made for it.
pub fn open(wanted: &[BlockDevice]) -> Result<Vec<OpenBlock>, BlockError> {
    tokio::task::block_in_place(|| wanted.iter().map(OpenBlock::open).collect())
}

impl Owner {
    /// Puts devices on the volume disk that are not there yet, and says in the request where they are.
    pub(super) async fn attach_blocks(
        &mut self,
        guest: &Guest,
        opened: Vec<OpenBlock>,
        request: &mut protocol::CreateContainerRequest,
    ) -> Result<(), PodError> {
        for block in opened {
            let OpenBlock {
                device, writable, ..
            } = block;
            let (ownership, wanted) = (block.ownership, block.wanted);
            let is = |one: &BlockRecord| one.device == device && one.writable == writable;
            let extent = match self.pod.blocks.iter().position(is) {
                Some(at) => {
                    self.change_pod(|pod| {
                        if let Some(known) = pod.blocks.get_mut(at) {
                            known.users.insert(request.id.clone());
                        }
                    })?;
                    self.pod.blocks.get(at).map(|known| known.extent)
                }
                None => {
                    let socket = guest.files.control();
                    let extent = control::attach_volume(&socket, block.file).await?;
                    // A daemon that dies in between leaves the device open until the VM ends.
                    let stored = self.change_pod(|pod| {
                        pod.blocks.push(BlockRecord {
                            path: wanted.path.clone(),
                            device,
                            writable,
                            extent,
                            users: BTreeSet::from([request.id.clone()]),
                        });
                    });
                    if let Err(error) = stored {
                        let _ = control::detach_volume(&socket, extent).await;
                        return Err(error.into());
                    }
                    tracing::info!(pod = self.pod.id, path = %wanted.path.display(), "attached");
                    Some(extent)
                }
            };
            let place = extent.map(|extent| protocol::BlockDevice {
                container_path: wanted.container_path,
                first_sector: extent.first_sector,
                sectors: extent.sectors,
                readonly: !writable,
                permissions: wanted.permissions,
                ownership: Some(ownership),
            });
            request.block_devices.extend(place);
        }
        Ok(())
    }

    /// Takes note that a container has no devices any more; gives back what only it had. Call once the guest has
    /// removed the container.
    pub(super) async fn detach_blocks(&mut self, container: &str) {
        let of_it = |block: &BlockRecord| block.users.contains(container);
        if !self.pod.blocks.iter().any(of_it) {
            return;
        }
        let mut unused = Vec::new();
        let changed = self.change_pod(|pod| {
            for block in &mut pod.blocks {
                block.users.remove(container);
            }
            unused = pod
                .blocks
                .extract_if(.., |block| block.users.is_empty())
                .collect();
        });
        if let Err(error) = changed {
            return self.complain("forget the block devices of a container", &error);
        }
        // They went with the VM, if it ended.
        let Some(socket) = self.guest.as_ref().map(|guest| guest.files.control()) else {
            return;
        };
        for block in unused {
            if let Err(error) = control::detach_volume(&socket, block.extent).await {
                self.complain("close a block device", &error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_one(path: &Path) -> BlockError {
        let wanted = BlockDevice {
            path: path.to_owned(),
            container_path: "/dev/xvda".into(),
            permissions: "rwm".into(),
        };
        OpenBlock::open(&wanted).unwrap_err()
    }

    #[test]
    fn what_is_no_block_device_is_refused_before_it_is_opened() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let _listener =
            std::os::unix::net::UnixListener::bind(directory.path().join("socket")).unwrap();
        for (path, expected) in [
            (directory.path().to_owned(), "a directory"),
            (file, "a file"),
            (link, "a file"),
            (directory.path().join("socket"), "a socket or a pipe"),
        ] {
            match open_one(&path) {
                BlockError::Kind { path: named, what } => {
                    assert_eq!((named, what), (path, expected));
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(
            open_one(Path::new("/dev/null")),
            BlockError::Character { .. }
        ));
        match open_one(&directory.path().join("none")) {
            BlockError::Open { source, .. } => {
                assert_eq!(source.kind(), io::ErrorKind::NotFound);
            }
            other => panic!("{other:?}"),
        }
    }
}
