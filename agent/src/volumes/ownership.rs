// SPDX-License-Identifier: Apache-2.0
//! Sets owner, group and permission bits of files and directories, without following links.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;

use bulkhead_proto::agent::Ownership;
use rustix::fs::{CWD, Mode, OFlags, openat};

/// All bits that chmod(2) sets.
const PERMISSIONS: u32 = 0o7777;

/// Sets the ownership of the file at `path`, which must not be a symbolic link.
pub fn set_at(path: &Path, ownership: &Ownership) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::empty())?;
    set(file.as_fd(), ownership)
}

/// Sets the ownership of an open file. The owner comes first, because changing it clears the set-id bits.
pub fn set(file: impl AsFd, ownership: &Ownership) -> io::Result<()> {
    let file = File::from(file.as_fd().try_clone_to_owned()?);
    fchown(&file, Some(ownership.uid), Some(ownership.gid))?;
    file.set_permissions(Permissions::from_mode(ownership.mode & PERMISSIONS))
}
