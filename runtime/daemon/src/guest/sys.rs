// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this module: a descriptor given to tokio's reactor.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits for `descriptor` to become readable; call inside a tokio runtime.
pub fn register(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open until it is dropped, is always the same descriptor, and is owned by the `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    Ok(registered?)
}
