// SPDX-License-Identifier: Apache-2.0
//! Gives up users, groups and capabilities, and every way to new ones. See capabilities(7).

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySets};

pub use rustix::thread::CapabilitySet;

use crate::{JailError, failed};

/// Becomes this user and this group, without other groups.
pub fn become_user(uid: u32, gid: u32) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[]).map_err(failed("drop supplementary groups"))?;
    setresgid(gid, gid, gid).map_err(failed("change the group"))?;
    setresuid(uid, uid, uid).map_err(failed("change the user"))
}

/// Keeps the capabilities when the process changes its user later.
pub fn keep_over_users() -> Result<(), JailError> {
    let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED;
    rustix::thread::set_capabilities_secure_bits(bits).map_err(failed("set secure bits"))
}

/// Empties the set of capabilities that the process could ever gain, except for `kept`.
pub fn bound(kept: CapabilitySet) {
    for capability in (CapabilitySet::all() - kept).iter() {
        // Fails for capabilities that this kernel does not have, and for a process that has no right to do this.
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    let _ = rustix::thread::clear_ambient_capability_set();
}

/// Gives up all capabilities but these. No program that the process might start could have more.
pub fn keep(kept: CapabilitySet) -> Result<(), JailError> {
    let step = "give up capabilities";
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed(step))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("set no_new_privs"))
}
