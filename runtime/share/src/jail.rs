// SPDX-License-Identifier: Apache-2.0
//! The jail of a file server: its own namespaces, a root that contains only the shares and a `/proc` with
//! only its own processes, and no more capabilities than a file server needs ([`kept`]).
//!
//! The server stays user 0, because files have many owners. It switches to a user of the guest when it
//! creates a file for that user. Runs on the only thread of its process.

use std::io;

use bulkhead_jail::limits::Resource;
use bulkhead_jail::namespaces::{self, Side};
use bulkhead_jail::privileges::{self, CapabilitySet};
use bulkhead_jail::{limits, root};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::fs::Mode;
use rustix::process::Signal;

use super::{SHARES, ShareError};

/// Every file that the guest's kernel knows is an open descriptor in the server.
const OPEN_FILES: u64 = 1 << 20;
/// Limit of heap and stacks together.
const MEMORY_BYTES: u64 = 512 << 20;

pub(super) fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> ShareError {
    move |source| ShareError::Outside {
        step,
        source: source.into(),
    }
}

/// The capabilities that a server of other users' files needs: to act as the owner of a file, to make hard
/// links, and to ignore permission bits, because the guest's kernel has checked them.
fn kept() -> CapabilitySet {
    CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
}

/// Leaves the daemon's groups and the host's namespaces.
pub(super) fn separate() -> Result<Side, ShareError> {
    privileges::become_user(0, 0)?;
    namespaces::separate()?;
    Ok(namespaces::fork()?)
}

/// Runs the outer process: waits for the server and ends with the same result. If it is killed, the server
/// dies, too.
pub(super) fn guard(child: i32) -> Result<(), ShareError> {
    privileges::bound(CapabilitySet::empty());
    privileges::keep(CapabilitySet::empty())?;
    limits::forbid_dumps()?;
    // Close the pipe's write end here. Then who waits for the server's "ready" sees the server's end at once.
    let closed = rustix::stdio::dup2_stdout(rustix::stdio::stderr());
    closed.map_err(failed("close the outer process's output"))?;
    loop {
        return match waitpid(Pid::from_raw(child), None) {
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            Ok(status) => Err(failed("serve files")(io::Error::other(format!(
                "{status:?}"
            )))),
            Err(e) => Err(failed("wait for the server")(e)),
        };
    }
}

/// Puts the server's process into the jail. There is no way back.
pub(super) fn enter() -> Result<(), ShareError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("tie the server to the outer process"))?;
    namespaces::own_session()?;
    root::with_mounts(SHARES)?;
    // The guest's kernel has already applied the umask of its process.
    rustix::process::umask(Mode::empty());
    limits::set(&[
        (Resource::Core, limits::NO_CORE),
        (Resource::Data, MEMORY_BYTES),
        (Resource::Nofile, OPEN_FILES),
    ]);
    // Keep the capabilities when switching to another user: the guest's kernel has checked permissions, and
    // it knows groups of the user that the server is not told.
    privileges::keep_over_users()?;
    privileges::bound(kept());
    privileges::keep(kept())?;
    Ok(limits::forbid_dumps()?)
}
