// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this crate: system calls that have no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

fn check(ret: libc::c_int) -> io::Result<()> {
    match ret {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes ownership of a descriptor that the parent passed on purpose.
pub fn inherited(fd: i32) -> io::Result<File> {
    // SAFETY: F_SETFD takes no pointer; it fails if `fd` is not open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: `fd` is open, and the configuration says that it is ours; it is taken once, before
    // the process opens files of its own.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Forks this process. Returns the child's id in the parent and `None` in the child.
pub fn fork() -> io::Result<Option<i32>> {
    // SAFETY: called while there is one thread, so the child's memory is whole.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Some(child.as_raw())),
        nix::unistd::ForkResult::Child => Ok(None),
    }
}

/// Leaves namespaces of the parent.
pub fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: the flags are of namespaces; UNSHARE_FILES, which would take descriptors away from
    // other threads, is not used.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// The attributes of an open file, in the type that fuse-backend-rs uses.
pub fn stat(file: &File) -> io::Result<libc::stat64> {
    // SAFETY: `stat64` is plain data for which all zeroes is a valid value.
    let mut found: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is of the size that the call writes.
    check(unsafe { libc::fstat64(file.as_raw_fd(), &raw mut found) })?;
    Ok(found)
}
