// SPDX-License-Identifier: Apache-2.0
//! The jail of a file server: its own namespaces, a root that contains only the shares and a `/proc` with
//! only its own processes, and no more capabilities than a file server needs ([`kept`]).
//!
//! The server stays user 0, because files have many owners. It switches to a user of the guest when it
//! creates a file for that user. Runs on the only thread of its process.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::fs::Mode;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

use super::{SHARES, ShareError};
use crate::sys;

/// Every file that the guest's kernel knows is an open descriptor in the server.
const OPEN_FILES: u64 = 1 << 20;
/// Limit of heap and stacks together.
const MEMORY_BYTES: u64 = 512 << 20;
/// A directory that exists on every host. The new root is mounted there first.
const PLACE: &str = "/proc";
/// The root holds only the mount points of shares, so it is small.
const ROOT_OPTIONS: &std::ffi::CStr = c"size=256k,nr_inodes=1024,mode=755";
const QUIET: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

pub(super) fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> ShareError {
    move |source| ShareError::Jail {
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

/// Leaves the host's namespaces. The new PID namespace holds only children that are created from now on.
pub(super) fn separate() -> Result<(), ShareError> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(flags).map_err(failed("create namespaces"))
}

/// Runs the outer process: waits for the server and ends with the same result. If it is killed, the server
/// dies, too.
pub(super) fn guard(child: i32) -> Result<(), ShareError> {
    let step = "give up privileges of the outer process";
    give_up(CapabilitySet::empty(), step)?;
    // Close the pipe's write end here. Then who waits for the server's "ready" sees the server's end at once.
    rustix::stdio::dup2_stdout(rustix::stdio::stderr()).map_err(failed(step))?;
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
    make_root().map_err(failed("create an empty root"))?;
    // The guest's kernel has already applied the umask of its process.
    rustix::process::umask(Mode::empty());
    limit(Resource::Core, 0);
    limit(Resource::Data, MEMORY_BYTES);
    limit(Resource::Nofile, OPEN_FILES);
    // Keep the capabilities when switching to another user: the guest's kernel has checked permissions, and
    // it knows groups of the user that the server is not told.
    let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED;
    rustix::thread::set_capabilities_secure_bits(bits).map_err(failed("set secure bits"))?;
    give_up(kept(), "give up privileges")
}

fn give_up(kept: CapabilitySet, step: &'static str) -> Result<(), ShareError> {
    for capability in (CapabilitySet::all() - kept).iter() {
        // Fails for capabilities that this kernel does not have.
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    rustix::thread::clear_ambient_capability_set().map_err(failed(step))?;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed(step))?;
    rustix::thread::set_no_new_privs(true).map_err(failed(step))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed(step))
}

/// Replaces the root by a small read-only tmpfs and detaches everything else from the mount namespace.
fn make_root() -> io::Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?;
    mount("none", PLACE, "tmpfs", QUIET, ROOT_OPTIONS)?;
    let place = Path::new(PLACE);
    fs::create_dir(place.join("proc"))?;
    let shares = place.join(SHARES.trim_start_matches('/'));
    fs::create_dir(&shares)?;
    // Users of containers look up names in it, whatever the daemon's umask is.
    fs::set_permissions(&shares, Permissions::from_mode(0o755))?;
    // It shows this PID namespace, and of it only processes.
    let options = c"subset=pid,hidepid=invisible";
    mount("proc", place.join("proc"), "proc", QUIET, options)?;
    std::env::set_current_dir(place)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | QUIET, c"")?;
    Ok(())
}

/// Sets a limit. If that is not allowed, sets the nearest value that is.
fn limit(resource: Resource, value: u64) {
    let set = |value| {
        let limit = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        rustix::process::setrlimit(resource, limit)
    };
    if set(value).is_err() {
        let most = rustix::process::getrlimit(resource).maximum;
        let _ = set(most.map_or(value, |most| most.min(value)));
    }
}
