// SPDX-License-Identifier: Apache-2.0
//! Gives up privileges once everything is open: capabilities, the chance to get new ones, and the
//! user. Runs on the main thread, before there are other threads.
//!
//! Not done yet: an empty root, namespaces, and a seccomp filter for each thread (docs/threat-model.md).

use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::config::RunAs;

/// Which privilege could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("change to user {} and group {}", .run_as.uid, .run_as.gid)]
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

/// Gives up all privileges. There is no way back.
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
    // A core dump would contain the guest's memory. This also keeps processes of the same user from tracing us.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|e| JailError::Dumpable(e.into()))
}

/// Raises the limit of open files as far as possible: every vsock stream needs a file descriptor.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // If this fails, fewer streams are possible.
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}

/// Empties the bounding set. This needs CAP_SETPCAP; without it the process cannot gain capabilities anyway.
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
