// SPDX-License-Identifier: Apache-2.0
//! The volumes that an image declares: for each, a directory of the scratch disk beside what the container writes, with
//! a copy of what the image has at its path. So it is a plain directory of ext4, in which a container can have an
//! overlay of its own (Docker in a pod), it is writable also if the root is not, and it ends with the container.
//!
//! Called when the root file system is mounted and nothing runs in it. Blocks.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_proto::agent::Ownership;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::mounts::{self, MountError};
use super::ownership;
use crate::disk::copy::{CopyError, copy_tree};
use crate::disk::overlay::Overlay;
use crate::init::config::BindMount;
use crate::users::PodUsers;

/// An image may declare fewer.
const MAX_VOLUMES: usize = 1024;
/// How long the copies of one container may take. The daemon waits a little longer.
const COPY_TIME: Duration = Duration::from_secs(75);
const DIRECTORY_MODE: u32 = 0o755;

#[derive(Debug, thiserror::Error)]
pub enum DeclaredError {
    #[error("the image declares {0} volumes, at most {MAX_VOLUMES} are possible")]
    TooMany(usize),
    #[error("volume that the image declares")]
    Target(#[from] MountError),
    #[error("volume {target} that the image declares: find it in the image")]
    Find { target: String, source: io::Error },
    #[error("volume {target} that the image declares: make its directory on the scratch disk")]
    Make { target: String, source: io::Error },
    #[error(
        "volume {target} that the image declares: copy what the image has there; a volume of the pod mounted at this \
         path needs no copy"
    )]
    Copy { target: String, source: CopyError },
}

/// Makes the volumes at `paths`. If that fails, what has been made is removed with the overlay.
pub fn make(
    overlay: &Overlay,
    paths: &[String],
    users: &PodUsers,
) -> Result<Vec<BindMount>, DeclaredError> {
    if paths.len() > MAX_VOLUMES {
        return Err(DeclaredError::TooMany(paths.len()));
    }
    let deadline = Instant::now() + COPY_TIME;
    let place = |number: usize| overlay.volumes().join(number.to_string());
    let one = |(number, path): (usize, &String)| {
        let target = mounts::target(path)?;
        make_one(&overlay.rootfs(), &target, &place(number), users, deadline)
    };
    paths.iter().enumerate().map(one).collect()
}

fn make_one(
    root: &Path,
    target: &str,
    directory: &Path,
    users: &PodUsers,
    deadline: Instant,
) -> Result<BindMount, DeclaredError> {
    let target = target.to_owned();
    let content = match find(root, &target) {
        Ok(content) => content,
        Err(source) => return Err(DeclaredError::Find { target, source }),
    };
    if let Err(source) = make_empty(directory, users) {
        return Err(DeclaredError::Make { target, source });
    }
    if let Some(content) = content {
        // The directory itself, wherever it is. What is in it cannot change while it is read by path.
        let source = PathBuf::from(format!("/proc/self/fd/{}/", content.as_raw_fd()));
        if let Err(source) = copy_tree(&source, directory, deadline) {
            return Err(DeclaredError::Copy { target, source });
        }
    }
    Ok(BindMount {
        source: directory.to_string_lossy().into_owned(),
        target,
        ..BindMount::default()
    })
}

/// Opens the directory at `target` in the container's root. Links of the image are followed inside the root only.
/// `None` if the image has nothing there.
fn find(root: &Path, target: &str) -> io::Result<Option<OwnedFd>> {
    let location = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat2(
        CWD,
        root,
        location,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match openat2(&root, target, location, Mode::empty(), inside) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Makes an empty directory that belongs to the pod's root.
fn make_empty(directory: &Path, users: &PodUsers) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let (uid, gid) = users.in_guest(0, 0)?;
    let owner = Ownership {
        mode: DIRECTORY_MODE,
        uid,
        gid,
    };
    ownership::set_at(directory, &owner)
}

impl DeclaredError {
    pub fn is_full(&self) -> bool {
        match self {
            Self::Make { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            Self::Copy { source, .. } => source.is_full(),
            Self::TooMany(_) | Self::Target(_) | Self::Find { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_path_of_the_image_is_found_inside_its_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap().join("root");
        fs::create_dir_all(root.join("etc/inside")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        for (name, to) in [
            ("up", "../../../etc"),
            ("absolute", "/etc"),
            ("dangling", "/no/such"),
            ("loop", "loop"),
            ("out", "../outside"),
        ] {
            symlink(to, root.join(name)).unwrap();
        }
        for found in ["/etc/inside", "/up/inside", "/absolute/inside"] {
            let place = find(&root, found).unwrap().expect(found);
            let place = fs::read_link(format!("/proc/self/fd/{}", place.as_raw_fd())).unwrap();
            assert_eq!(place, root.join("etc/inside"), "{found}");
        }
        for absent in ["/no/such", "/dangling", "/out"] {
            assert!(find(&root, absent).unwrap().is_none(), "{absent}");
        }
        for wrong in ["/file", "/file/below", "/loop"] {
            assert!(find(&root, wrong).is_err(), "{wrong}");
        }
    }
}
