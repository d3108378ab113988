// SPDX-License-Identifier: Apache-2.0
//! Gives up what the process no longer needs once everything is open: capabilities, the chance to
//! get new ones, the user. Runs on the main thread, before there are others.
//!
//! The empty root, the namespaces and the seccomp filters of each thread belong here too.

use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::config::RunAs;

/// A privilege that could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("become user {} and group {}", .run_as.uid, .run_as.gid)]
    User {
        run_as: RunAs,
        source: nix::errno::Errno,
    },
    #[error("drop capabilities")]
    Capabilities(#[source] io::Error),
    #[error("set no_new_privs")]
    NoNewPrivileges(#[source] io::Error),
    #[error("forbid core dumps")]
    Dumpable(#[source] io::Error),
}

/// Enters the jail; there is no way back.
pub fn enter(run_as: Option<RunAs>) -> Result<(), JailError> {
    raise_file_limit();
    drop_bounding_set();
    if let Some(run_as) = run_as {
        become_user(run_as).map_err(|source| JailError::User { run_as, source })?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(|e| JailError::Capabilities(e.into()))?;
    rustix::thread::set_no_new_privs(true).map_err(|e| JailError::NoNewPrivileges(e.into()))?;
    // A core dump would hold the guest's memory; nobody of the same user may trace us either.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|e| JailError::Dumpable(e.into()))
}

/// Every vsock stream is a descriptor.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Without it there are fewer streams.
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}

/// Needs CAP_SETPCAP; without it there is nothing to bound.
fn drop_bounding_set() {
    for capability in CapabilitySet::all().iter() {
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    let _ = rustix::thread::clear_ambient_capability_set();
}

fn become_user(run_as: RunAs) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(run_as.uid), Gid::from_raw(run_as.gid));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}
