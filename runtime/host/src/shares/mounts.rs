// SPDX-License-Identifier: Apache-2.0
//! Mounts for a file server: copies a mount of the host, sets its attributes, and moves it into the server's mount
//! namespace.
//!
//! A thread can switch to another mount namespace. So what is done in the server's namespace is done by a new thread,
//! which then ends. The server itself can neither mount anything nor reach the host's files.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_faults::{self as faults, Step};
use bulkhead_share::SHARES;
pub use bulkhead_share::name::Propagation;
use bulkhead_share::name::ShareName;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags, mkdirat, openat, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use serde::{Deserialize, Serialize};

use super::ShareError;
use crate::host_path::HostPath;
use crate::process::Identity;
use crate::sys::{MountChange, set_mount};

/// What a guest may do with a share. The host's kernel enforces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    Write,
    Read,
    /// Read-only together with the mounts below it.
    ReadRecursive,
}

/// Identifies the file of the host that a path leads to, and the mount that it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceId {
    major: u32,
    minor: u32,
    inode: u64,
    mount: u64,
}

/// An opened directory or file of the host.
#[derive(Debug)]
pub struct Source {
    file: HostPath,
    id: SourceId,
    is_directory: bool,
}

impl Source {
    /// Checks that a guest can have what was found. The path is not looked up again, here and later.
    pub fn of(file: HostPath) -> Result<Self, ShareError> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let found = statx(&file, "", AtFlags::EMPTY_PATH, wanted);
        let found = found.map_err(|e| ShareError::Source {
            path: file.path().to_owned(),
            source: e.into(),
        })?;
        let what = match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::Directory | FileType::RegularFile => None,
            FileType::Socket => Some("a socket"),
            FileType::Fifo => Some("a pipe"),
            FileType::BlockDevice | FileType::CharacterDevice => Some("a device"),
            _ => Some("something else"),
        };
        if let Some(what) = what {
            return Err(ShareError::Kind {
                path: file.path().to_owned(),
                what,
            });
        }
        Ok(Self {
            file,
            id: SourceId {
                major: found.stx_dev_major,
                minor: found.stx_dev_minor,
                inode: found.stx_ino,
                mount: found.stx_mnt_id,
            },
            is_directory: FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory,
        })
    }

    /// The path, without links, that led here when it was found.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn id(&self) -> SourceId {
        self.id
    }

    /// Makes the mount for the server. It is not attached anywhere yet, and is removed if it is dropped.
    pub fn copy(&self, access: Access, propagation: Propagation) -> Result<Share, ShareError> {
        let path = || self.path().to_owned();
        if propagation == Propagation::Slave {
            if access == Access::ReadRecursive {
                return Err(ShareError::Contradiction { path: path() });
            }
            if !self.is_propagated().map_err(|source| ShareError::Source {
                path: path(),
                source,
            })? {
                return Err(ShareError::NotPropagated { path: path() });
            }
        }
        let tree = self.copy_tree(access, propagation);
        Ok(Share {
            tree: tree.map_err(|source| ShareError::Source {
                path: path(),
                source,
            })?,
            is_directory: self.is_directory,
        })
    }

    fn copy_tree(&self, access: Access, propagation: Propagation) -> io::Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(&self.file, "", flags)?;
        let propagation = match propagation {
            Propagation::Private => libc::MS_PRIVATE,
            Propagation::Slave => libc::MS_SLAVE,
        };
        let all = MountChange {
            // The server executes nothing and opens no devices, so this costs nothing and is safer.
            set: libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
            propagation,
            recursive: true,
            ..MountChange::default()
        };
        set_mount(tree.as_fd(), all)?;
        if access != Access::Write {
            let read_only = MountChange {
                set: libc::MOUNT_ATTR_RDONLY,
                recursive: access == Access::ReadRecursive,
                ..MountChange::default()
            };
            set_mount(tree.as_fd(), read_only)?;
        }
        Ok(tree)
    }

    fn is_propagated(&self) -> io::Result<bool> {
        let table = std::fs::read_to_string("/proc/self/mountinfo")?;
        Ok(is_propagated(&table, self.id.mount))
    }
}

/// Whether the mount with this id receives mounts by propagation, which the optional fields in mountinfo tell
/// (proc(5)).
fn is_propagated(table: &str, mount: u64) -> bool {
    let mut lines = table.lines();
    let line = lines.find(|line| line.split(' ').next() == Some(mount.to_string().as_str()));
    let optional = line.unwrap_or_default().split(' ').skip(6);
    let mut optional = optional.take_while(|field| *field != "-");
    optional.any(|field| field.starts_with("shared:") || field.starts_with("master:"))
}

/// A mount that is not attached anywhere yet.
#[derive(Debug)]
pub struct Share {
    tree: OwnedFd,
    is_directory: bool,
}

/// Mounts a share in the server's directory of shares.
pub async fn attach(server: Identity, share: Share, name: ShareName) -> io::Result<()> {
    let mounted = in_namespace(server, move || {
        let place = place(name);
        // Remove a mount of this name, which a daemon left that was killed before it stored the share.
        let _ = unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let names = writable_names()?;
        remove_place(&names, name)?;
        if share.is_directory {
            mkdirat(&names, name.to_string(), Mode::RWXU)?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            openat(&names, name.to_string(), flags, Mode::RUSR)?;
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&share.tree, "", CWD, &place, flags)?)
    });
    faults::around(Step::AttachShare, mounted).await
}

/// Unmounts a share and removes its mount point, after which the server forgets it. It is no error if it is gone
/// already.
pub async fn detach(server: Identity, name: ShareName) -> io::Result<()> {
    let unmounted = in_namespace(server, move || {
        match unmount(place(name), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
        remove_place(&writable_names()?, name)
    });
    faults::around(Step::DetachShare, unmounted).await
}

fn place(name: ShareName) -> PathBuf {
    Path::new(SHARES).join(name.to_string())
}

/// Opens the directory of the mount points for writing, by a new mount of it. The server's own mount is read-only.
fn writable_names() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let names = open_tree(CWD, SHARES, flags)?;
    let change = MountChange {
        clear: libc::MOUNT_ATTR_RDONLY,
        ..MountChange::default()
    };
    set_mount(names.as_fd(), change)?;
    Ok(names)
}

fn remove_place(names: &OwnedFd, name: ShareName) -> io::Result<()> {
    let name = name.to_string();
    for flags in [AtFlags::REMOVEDIR, AtFlags::empty()] {
        match rustix::fs::unlinkat(names, &name, flags) {
            Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            // A directory: the first attempt has removed it, or it has vanished.
            Err(rustix::io::Errno::ISDIR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Runs `work` on a new thread in the server's mount namespace, with the server's root directory.
async fn in_namespace(
    server: Identity,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let (send, receive) = tokio::sync::oneshot::channel();
    let entered = move || {
        let namespace = File::open(format!("/proc/{}/ns/mnt", server.pid))?;
        // Check the identity after opening: if the process still lives now, the file belongs to it.
        if !server.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        // setns changes the root and current directory, so the thread must not share them with others.
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        work()
    };
    std::thread::Builder::new()
        .name("shares".into())
        .spawn(move || send.send(entered()).is_ok())?;
    receive.await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_follows_others_is_known_by_its_optional_fields() {
        let table = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
23 22 0:5 / /a rw - tmpfs shared:9 rw\n\
24 22 0:6 / /b rw master:3 - tmpfs t rw\n\
25 22 0:7 / /c rw unbindable - tmpfs t rw\n";
        let following: Vec<u64> = (20..30).filter(|id| is_propagated(table, *id)).collect();
        assert_eq!(following, [22, 24]);
    }

    #[test]
    fn sockets_pipes_and_devices_are_refused_by_name_and_another_file_is_another_source() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let source = |path: &Path| Source::of(HostPath::find(path).unwrap());
        let _listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        let error = source(&at("socket")).unwrap_err().to_string();
        assert!(error.contains("a socket"), "{error}");
        let error = source(Path::new("/dev/null")).unwrap_err().to_string();
        assert!(error.contains("a device"), "{error}");
        let file = source(&at("file")).unwrap();
        assert!(!file.is_directory);
        assert_eq!(source(&at("link")).unwrap().id(), file.id());
        std::fs::remove_file(at("file")).unwrap();
        std::fs::write(at("other"), "x").unwrap();
        std::fs::rename(at("other"), at("file")).unwrap();
        assert_ne!(
            source(&at("file")).unwrap().id(),
            file.id(),
            "another file at the same path"
        );
    }
}
