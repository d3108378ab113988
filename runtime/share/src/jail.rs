// SPDX-License-Identifier: Apache-2.0
//! The jail of a file server: namespaces of its own, a root in which nothing is but the shares and
//! a `/proc` of its own processes, the capabilities of a file server and no others.
//!
//! It stays user 0, because files keep their owners; it acts as the guest's users when it makes
//! files. What it may is in [`kept`]. Runs on the only thread of its process.

use std::fs;
use std::io;
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

/// Each file that the guest knows is an open descriptor here.
const OPEN_FILES: u64 = 1 << 20;
/// Heap and stacks together.
const MEMORY_BYTES: u64 = 512 << 20;
/// A directory that every host has. The new root is mounted there and becomes the root.
const PLACE: &str = "/proc";
/// Names of shares, and nothing that is large.
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

/// What a server of other people's files needs: to act as their owners, to go and to change what
/// permission bits would forbid (the guest's kernel has checked them), to make hard links.
fn kept() -> CapabilitySet {
    CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
}

/// Leaves the host's namespaces. The new PID namespace begins with the next child.
pub(super) fn separate() -> Result<(), ShareError> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(flags).map_err(failed("make namespaces"))
}

/// The outer process: waits for the server and ends as it does. Killed, it takes the server along.
pub(super) fn guard(child: i32) -> Result<(), ShareError> {
    let step = "give up privileges of the outer process";
    give_up(CapabilitySet::empty(), step)?;
    // Who waits for the server's word waits for the server alone.
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

/// The server itself: there is no way back.
pub(super) fn enter() -> Result<(), ShareError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("end with the outer process"))?;
    make_root().map_err(failed("make an empty root"))?;
    // The guest's kernel has applied the mask already.
    rustix::process::umask(Mode::empty());
    limit(Resource::Core, 0);
    limit(Resource::Data, MEMORY_BYTES);
    limit(Resource::Nofile, OPEN_FILES);
    // Acting as another user keeps the capabilities: the guest's kernel knows of groups that the
    // server is not told of, and has checked them.
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

/// Puts the whole mount namespace away for a small file system in memory.
fn make_root() -> io::Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?;
    mount("none", PLACE, "tmpfs", QUIET, ROOT_OPTIONS)?;
    let place = Path::new(PLACE);
    fs::create_dir(place.join("proc"))?;
    fs::create_dir(place.join(SHARES.trim_start_matches('/')))?;
    // Of this PID namespace, and of processes only.
    let options = c"subset=pid,hidepid=invisible";
    mount("proc", place.join("proc"), "proc", QUIET, options)?;
    std::env::set_current_dir(place)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | QUIET, c"")?;
    Ok(())
}

/// Sets a limit, or the nearest that is allowed.
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
