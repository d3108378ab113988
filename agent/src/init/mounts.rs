// SPDX-License-Identifier: Apache-2.0
//! Mounts by descriptor (`fsopen`, `fsmount`, `open_tree`, `move_mount`). A file system is created before it is
//! mounted, and its mount point is a descriptor that was resolved once. So nobody can swap anything between check
//! and mount. Used by [`super::rootfs`], the boot and the pause process.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD};
use rustix::io::Result;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    open_tree, unmount,
};
use rustix::process::{fchdir, pivot_root};

/// Creates a file system that is not mounted yet. An option with an empty value is a flag.
pub fn new_filesystem(
    kind: &CStr,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        if value.is_empty() {
            fsconfig_set_flag(context.as_fd(), *key)?;
        } else {
            fsconfig_set_string(context.as_fd(), *key, *value)?;
        }
    }
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A detached copy of the mount at `path` in the caller's namespace.
pub fn clone_path(path: &Path) -> Result<OwnedFd> {
    open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
}

/// A detached copy of the mount at an open file or directory, with all mounts below it if `recursive`.
pub fn clone_fd(fd: impl AsFd, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    open_tree(fd, c"", flags)
}

/// Mounts a detached mount over an open file or directory.
pub fn attach(mount: impl AsFd, target: impl AsFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, c"", target, c"", flags)
}

/// Mounts a detached mount at a path of the agent's own tree.
pub fn attach_at(mount: impl AsFd, path: &CStr) -> Result<()> {
    move_mount(
        mount,
        c"",
        CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

/// Makes `root`, a mounted directory, the root of this mount namespace, and detaches everything else.
pub fn pivot_into(root: impl AsFd) -> Result<()> {
    fchdir(root)?;
    // With the same directory for both arguments, the old root is mounted on top of the new one, so the
    // unmount hits the old root.
    pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}

/// Changes the root to an empty, read-only one.
pub fn enter_empty_root() -> Result<()> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let empty = new_filesystem(c"tmpfs", &[("size", "4k")], attributes)?;
    attach_at(&empty, c"/run")?;
    pivot_into(&empty)
}

/// Whether a descriptor is of a directory.
pub fn is_directory(fd: impl AsFd) -> Result<bool> {
    let stat = rustix::fs::statat(fd, c"", AtFlags::EMPTY_PATH)?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory)
}
