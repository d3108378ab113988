// SPDX-License-Identifier: Apache-2.0
//! Namespaces of a process's own. See namespaces(7).

use std::io;

use rustix::thread::UnshareFlags;

use crate::{JailError, failed, sys};

/// What [`fork`] returns in each of the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Parent { child: i32 },
    Child,
}

/// Leaves the host's namespaces for mounts, processes, network, IPC, names and cgroups. The new PID namespace holds only
/// children that are created from now on, so [`fork`] follows.
pub fn separate() -> Result<(), JailError> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(flags).map_err(failed("create namespaces"))
}

/// Forks the process, which must have one thread.
pub fn fork() -> Result<Side, JailError> {
    match sys::fork().map_err(failed("fork"))? {
        Some(child) => Ok(Side::Parent { child }),
        None => Ok(Side::Child),
    }
}

/// Enters a user namespace in which nobody is root, so that a capability that the process might gain is one over nothing.
/// Returns false where the host does not allow such namespaces. Call it as the process's last user.
pub fn enter_user_namespace() -> Result<bool, JailError> {
    let step = "create a user namespace";
    match sys::unshare(UnshareFlags::NEWUSER) {
        Ok(()) => Ok(true),
        // Forbidden by a setting (EPERM), by a limit (ENOSPC, EUSERS), or not in the kernel (EINVAL).
        Err(e) if is_refused(&e) => Ok(false),
        Err(e) => Err(failed(step)(e)),
    }
}

fn is_refused(error: &io::Error) -> bool {
    let refused = [libc::EPERM, libc::ENOSPC, libc::EUSERS, libc::EINVAL];
    error
        .raw_os_error()
        .is_some_and(|code| refused.contains(&code))
}

/// Leads a session of its own, with a keyring of its own: no terminal, and no keys of the daemon.
pub fn own_session() -> Result<(), JailError> {
    // Fails for the leader of a process group, which has no terminal of its own either.
    let _ = rustix::process::setsid();
    sys::join_new_session_keyring().map_err(failed("create a session keyring"))
}
