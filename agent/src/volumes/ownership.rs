// SPDX-License-Identifier: Apache-2.0
//! Owner, group and permission bits of files and directories, set without following links.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;

use bulkhead_proto::agent::Ownership;
use rustix::fs::{CWD, Mode, OFlags, openat};

/// All that chmod(2) sets.
const PERMISSIONS: u32 = 0o7777;

/// Of what is at `path`, which is not a link.
pub fn set_at(path: &Path, ownership: &Ownership) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::empty())?;
    set(file.as_fd(), ownership)
}

/// The owner first: a change of it takes the set-id bits away.
pub fn set(file: impl AsFd, ownership: &Ownership) -> io::Result<()> {
    let file = File::from(file.as_fd().try_clone_to_owned()?);
    fchown(&file, Some(ownership.uid), Some(ownership.gid))?;
    file.set_permissions(Permissions::from_mode(ownership.mode & PERMISSIONS))
}
