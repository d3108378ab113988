// SPDX-License-Identifier: Apache-2.0
//! Gives up privileges, in an order in which each step is still allowed.

use rustix::fs::{FileType, Gid, Uid, fchown, fstat};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::caps;
use super::config::{Failure, InitConfig, Stage};
use super::user::Identity;
use crate::seccomp;
use crate::sys;

/// The capability sets of the program.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The bounding, permitted and effective set.
    pub granted: u64,
    pub ambient: u64,
}

/// Changes to the user. [`confine`] removes the privileges of root that are left.
pub fn become_user(identity: &Identity, capabilities: Capabilities) -> Result<(), Failure> {
    own_standard_streams(identity.uid);
    for bit in caps::each(caps::ALL_BITS & !capabilities.granted) {
        // Fails for a capability that this kernel does not know, which nobody can hold then.
        let _ = remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(bit));
    }
    set_keep_capabilities(true).stage("keep capabilities")?;
    let groups: Vec<Gid> = identity
        .groups
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    set_thread_groups(&groups).stage("set groups")?;
    let gid = Gid::from_raw(identity.gid);
    set_thread_res_gid(gid, gid, gid).stage("set the group")?;
    let uid = Uid::from_raw(identity.uid);
    set_thread_res_uid(uid, uid, uid).stage("set the user")?;
    set_keep_capabilities(false).stage("stop keeping capabilities")
}

/// The last steps before the container's programs. After the filter is loaded, only capset, prctl and execve are
/// called, and if the container has hooks, what these need.
pub fn confine(
    config: &InitConfig,
    no_new_privileges: bool,
    capabilities: Capabilities,
) -> Result<(), Failure> {
    if no_new_privileges {
        set_no_new_privs(true).stage("set no_new_privs")?;
    }
    if !config.seccomp.is_empty() {
        // Without no_new_privs, loading a filter needs CAP_SYS_ADMIN. The change of user made it ineffective, so raise
        // the permitted capabilities again.
        let permitted = rustix::thread::capabilities(None)
            .stage("read capabilities")?
            .permitted;
        set(permitted, permitted, CapabilitySet::empty()).stage("raise capabilities")?;
        let mut program = seccomp::decode(&config.seccomp);
        sys::load_seccomp(&mut program, config.seccomp_flags).stage("load the seccomp filter")?;
    }
    let granted = CapabilitySet::from_bits_retain(capabilities.granted);
    let ambient = CapabilitySet::from_bits_retain(capabilities.ambient & capabilities.granted);
    set(granted, granted, ambient).stage("set capabilities")?;
    clear_ambient_capability_set().stage("clear ambient capabilities")?;
    for bit in caps::each(ambient.bits()) {
        configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(bit), true)
            .stage("set ambient capabilities")?;
    }
    Ok(())
}

fn set(
    effective: CapabilitySet,
    permitted: CapabilitySet,
    inheritable: CapabilitySet,
) -> rustix::io::Result<()> {
    set_capabilities(
        None,
        CapabilitySets {
            effective,
            permitted,
            inheritable,
        },
    )
}

/// Gives the standard streams to the user, so that a program without privileges can open `/dev/stdout`. If this
/// fails, only that does not work.
fn own_standard_streams(uid: u32) {
    let own = |fd: std::os::fd::BorrowedFd<'_>| {
        let Ok(stat) = fstat(fd) else { return };
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        let is_terminal = rustix::termios::isatty(fd);
        if !is_device || is_terminal {
            let _ = fchown(fd, Some(Uid::from_raw(uid)), None);
        }
    };
    own(rustix::stdio::stdin());
    own(rustix::stdio::stdout());
    own(rustix::stdio::stderr());
}
