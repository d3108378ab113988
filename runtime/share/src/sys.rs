// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this crate: system calls that have no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

fn check(ret: libc::c_int) -> io::Result<()> {
    match ret {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The attributes of an open file, in the type that fuse-backend-rs uses.
pub fn stat(file: &File) -> io::Result<libc::stat64> {
    // SAFETY: `stat64` is plain data for which all zeroes is a valid value.
    let mut found: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is of the size that the call writes.
    check(unsafe { libc::fstat64(file.as_raw_fd(), &raw mut found) })?;
    Ok(found)
}
