// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this crate: registering a file descriptor with tokio, and system calls that have no safe wrapper.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers `descriptor` with tokio, to wait until it is readable. Call this inside a tokio runtime.
pub fn register(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open until it is dropped, is always the same descriptor, and is owned by the `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    Ok(registered?)
}

/// A change of a mount's attributes, for [`set_mount`].
#[derive(Clone, Copy, Debug, Default)]
pub struct MountChange {
    /// The `MOUNT_ATTR_*` flags to set, and in `clear` those to clear.
    pub set: u64,
    pub clear: u64,
    /// `MS_PRIVATE` or `MS_SLAVE`; 0 leaves it unchanged.
    pub propagation: u64,
    /// Whether to change the mounts below it too.
    pub recursive: bool,
}

/// Calls `mount_setattr(2)` for the mount whose root is `tree`.
pub fn set_mount(tree: BorrowedFd<'_>, change: MountChange) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    let recursive = if change.recursive {
        libc::AT_RECURSIVE
    } else {
        0
    };
    // SAFETY: the path is a literal and the attributes live for the call, which reads as many bytes as it is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How long a file may become to which a process writes. See `prlimit(2)`, `RLIMIT_FSIZE`.
pub fn file_size_limit(pid: i32) -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` lives for the call, which writes to it. No new limit is given.
    let result = unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, ptr::null(), &raw mut limit) };
    match result {
        0 => Ok(limit.rlim_cur),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn set_file_size_limit(pid: i32, bytes: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: `limit` lives for the call, which reads it. The old limit is not asked for.
    let result =
        unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &raw const limit, ptr::null_mut()) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
