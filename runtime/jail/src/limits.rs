// SPDX-License-Identifier: Apache-2.0
//! Limits of what a process may use up. See getrlimit(2).

use rustix::process::{DumpableBehavior, Rlimit};

pub use rustix::process::Resource;

use crate::{JailError, failed};

/// The limit of a core dump that lets none be written. Zero does not do that where `core_pattern` names a program: the
/// kernel would run it as root, on the host. This value is the one for which it does not.
pub const NO_CORE: u64 = 1;

/// Sets limits for good. Where that is not allowed, sets the nearest values that are.
pub fn set(limits: &[(Resource, u64)]) {
    for &(resource, value) in limits {
        if try_set(resource, value).is_err() {
            let most = rustix::process::getrlimit(resource).maximum;
            let _ = try_set(resource, most.map_or(value, |most| most.min(value)));
        }
    }
}

fn try_set(resource: Resource, value: u64) -> rustix::io::Result<()> {
    let limit = Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    rustix::process::setrlimit(resource, limit)
}

/// Forbids core dumps, which would contain the guest's memory, and tracing by processes of the same user.
pub fn forbid_dumps() -> Result<(), JailError> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("forbid core dumps"))
}
