// SPDX-License-Identifier: Apache-2.0
//! EmptyDirs on disk: each is a file system of the guest in one sparse file, [`IMAGE`], in kubelet's directory of the
//! volume.
//!
//! So kubelet can measure the disk usage of the volume and deletes it with the pod, and the next sandbox of the same
//! pod finds it again. The host never reads the file system. A lock on the file shows that a VM uses it. The lock
//! belongs to the open file, which is passed to the VMM, so it is released when the VMM ends, even if the daemon has
//! died.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_host::open_without_links;
use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags};

use crate::random::random;
use crate::scratch::{Purpose, Scratch, ScratchError};

/// The name of the file. Files that are copied from the guest never get this name.
pub const IMAGE: &str = ".bulkhead.ext4";

/// An error about an emptyDir on disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("make the disk for an emptyDir")]
    Make(#[from] ScratchError),
    #[error("{path}, the disk of an emptyDir")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} is not the disk of an emptyDir but {what}: remove it")]
    Other { path: PathBuf, what: &'static str },
    #[error(
        "{path}, the disk of an emptyDir, is used by another VM: stop the other sandbox of this pod first"
    )]
    InUse { path: PathBuf },
    #[error(transparent)]
    Fault(#[from] Fault),
}

#[derive(Debug)]
pub enum Opened {
    Ours(File),
    /// A VM uses it.
    Locked(File),
}

/// Opens the disk in `directory` and locks it, unless it is locked already. If there is none, makes one with room for
/// `bytes`.
pub fn open(scratch: &Scratch, directory: &Path, bytes: u64) -> Result<Opened, DiskError> {
    let path = directory.join(IMAGE);
    let failed = |source| DiskError::File {
        path: path.clone(),
        source,
    };
    let file = match open_existing(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            make(scratch, directory, &path, bytes)?;
            open_existing(&path)
        }
        found => found,
    };
    let file = file.map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let other = |what| DiskError::Other {
        path: path.clone(),
        what,
    };
    if !metadata.is_file() {
        return Err(other("a special file"));
    }
    if metadata.nlink() != 1 {
        return Err(other("a file with other names"));
    }
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Opened::Ours(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Opened::Locked(file)),
        Err(e) => Err(failed(e.into())),
    }
}

fn open_existing(path: &Path) -> io::Result<File> {
    open_without_links(path, OFlags::RDWR | OFlags::NONBLOCK)
}

/// Makes the disk under a temporary name and renames it. So it is either complete or not there, and it never replaces
/// one that was made meanwhile.
fn make(scratch: &Scratch, directory: &Path, path: &Path, bytes: u64) -> Result<(), DiskError> {
    remove_unfinished(directory);
    let number = u64::from_ne_bytes(random());
    let new = directory.join(format!("{IMAGE}.{number:016x}"));
    faults::within(Step::MakeEmptyDirDisk, || {
        scratch
            .make(Purpose::EmptyDir, &new, bytes)
            .map_err(DiskError::from)
    })?;
    match rustix::fs::renameat_with(CWD, &new, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(e) => {
            let _ = fs::remove_file(&new);
            match e {
                rustix::io::Errno::EXIST => Ok(()),
                e => Err(DiskError::File {
                    path: path.to_owned(),
                    source: e.into(),
                }),
            }
        }
    }
}

/// Removes what a daemon left that died while it made the disk. Nobody else makes one here at the same time.
fn remove_unfinished(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix(IMAGE)?.strip_prefix('.'));
        if number.is_some_and(|number| u64::from_str_radix(number, 16).is_ok()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn host() -> (tempfile::TempDir, Scratch, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(directory.path().join("templates"));
        let volume = directory.path().join("volume");
        fs::create_dir(&volume).unwrap();
        (directory, scratch, volume)
    }

    #[test]
    fn a_disk_is_made_once_and_one_vm_has_it_at_a_time() {
        let (_directory, scratch, volume) = host();
        // A daemon has died here.
        fs::write(volume.join(format!("{IMAGE}.00ff00ff00ff00ff")), "x").unwrap();
        let ours = |bytes| match open(&scratch, &volume, bytes).unwrap() {
            Opened::Ours(file) => Some(file),
            Opened::Locked(_) => None,
        };
        let first = ours(64 << 20).unwrap();
        let inode = |file: &File| file.metadata().unwrap().ino();
        let made = inode(&first);
        // The VMM gets such a duplicate.
        let passed_on = first.try_clone().unwrap();
        drop(first);
        assert!(ours(64 << 20).is_none());
        drop(passed_on);
        assert_eq!(inode(&ours(1).unwrap()), made);
        let names: Vec<_> = fs::read_dir(&volume)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, [IMAGE]);
        let taken = fs::metadata(volume.join(IMAGE)).unwrap().blocks() * 512;
        assert!(taken < 256 << 10, "an empty one takes {taken} bytes");
    }

    #[test]
    fn what_is_no_disk_is_not_given_to_a_vm() {
        let (_directory, scratch, volume) = host();
        let path = volume.join(IMAGE);
        symlink("/etc/passwd", &path).unwrap();
        let error = open(&scratch, &volume, 1).unwrap_err();
        assert!(matches!(error, DiskError::File { .. }), "{error}");
        fs::remove_file(&path).unwrap();
        drop(open(&scratch, &volume, 1).unwrap());
        fs::hard_link(&path, volume.join("other")).unwrap();
        let error = open(&scratch, &volume, 1).unwrap_err();
        assert!(error.to_string().contains("other names"), "{error}");
    }
}
