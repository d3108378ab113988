// SPDX-License-Identifier: Apache-2.0
//! Block devices of the host: which ones a container may use, and how they are opened.
//!
//! Devices are not claimed (O_EXCL), because kubelet may give one device to several containers and, if it is
//! ReadWriteMany, to several pods. Writes are synchronous (O_DSYNC), so that what the guest was told is written, really
//! is on the device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_guest::protocol;
use bulkhead_host::HostPath;
use rustix::fs::{OFlags, major, minor};

use crate::pod::life::spec::BlockDevice;

/// An error about a device of the host.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("open block device {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "{path} is not a block device but {what}: only block devices of the host can be given to a container"
    )]
    Kind { path: PathBuf, what: &'static str },
    #[error(
        "{path} is a character device of the host: a pod has its own kernel, which does not have this device"
    )]
    Character { path: PathBuf },
    #[error("block device {path} has no sectors: is anything behind it?")]
    Empty { path: PathBuf },
    #[error(
        "block device {path} is {found}, but {wanted} was asked for: is its CDI specification out of date?"
    )]
    Number {
        path: PathBuf,
        found: String,
        wanted: String,
    },
}

/// An opened device, for a container that asked for it.
#[derive(Debug)]
pub struct OpenBlock {
    pub file: File,
    /// The device number (`st_rdev`).
    pub device: u64,
    pub writable: bool,
    pub ownership: protocol::Ownership,
    pub wanted: BlockDevice,
}

impl OpenBlock {
    /// Opens a device. Blocks for as long as its driver does.
    fn open(wanted: &BlockDevice) -> Result<Self, BlockError> {
        let path = &wanted.path;
        let failed = |source| BlockError::Open {
            path: path.clone(),
            source,
        };
        // Find out what it is before opening it: opening alone can have an effect, or block.
        let found = HostPath::find(path).map_err(failed)?;
        let metadata = found.metadata().map_err(failed)?;
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
        let number = (major(metadata.rdev()), minor(metadata.rdev()));
        if let Some(wanted) = wanted.number.filter(|wanted| *wanted != number) {
            let text = |(major, minor)| format!("{major}:{minor}");
            return Err(BlockError::Number {
                path: path.clone(),
                found: text(number),
                wanted: text(wanted),
            });
        }
        let (mut file, writable) = open_device(&found.place(), wanted.writes()).map_err(failed)?;
        if file.seek(SeekFrom::End(0)).map_err(failed)? == 0 {
            return Err(BlockError::Empty { path: path.clone() });
        }
        Ok(Self {
            file,
            device: metadata.rdev(),
            writable,
            ownership: protocol::Ownership {
                mode: wanted.owner.mode.unwrap_or(metadata.mode()) & 0o777,
                uid: wanted.owner.uid.unwrap_or(metadata.uid()),
                gid: wanted.owner.gid.unwrap_or(metadata.gid()),
            },
            wanted: wanted.clone(),
        })
    }
}

/// Opens a device for writing if `write` is set and the device is not read-only. Returns whether it is writable.
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
        // A read-only device cannot be opened for writing, even by root.
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

/// Opens all block devices of a container. Call this before anything else is made for the container.
pub fn open(wanted: &[BlockDevice]) -> Result<Vec<OpenBlock>, BlockError> {
    tokio::task::block_in_place(|| wanted.iter().map(OpenBlock::open).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::life::spec::NodeOwner;

    fn open_one(path: &Path) -> BlockError {
        let wanted = BlockDevice {
            path: path.to_owned(),
            container_path: "/dev/xvda".into(),
            permissions: "rwm".into(),
            owner: NodeOwner::default(),
            number: None,
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
