// SPDX-License-Identifier: Apache-2.0
//! The container's volumes: taken along before the pivot, placed after it.
//!
//! A source is found beneath its volume and a target inside the container's root, both by descriptor, so
//! neither a link in a volume nor one in an image leads anywhere else. Nothing is mounted over `/proc`
//! but the few files that runc allows too: whoever could would choose what the kernel is said to be.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::fstatfs;
use rustix::mount::{MountAttrFlags, MountPropagationFlags};

use super::config::{BindMount, Failure, Stage};
use super::{mounts, paths};
use crate::sys;
use crate::volumes::mounts::open_sub_path;

/// `f_type` of procfs (`linux/magic.h`).
const PROC_SUPER_MAGIC: i64 = 0x9fa0;
/// Files of procfs that may be covered, as with runc: for tools that show a container its own limits.
const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// A view of a source that is mounted nowhere yet.
#[derive(Debug)]
pub struct Taken<'a> {
    view: OwnedFd,
    mount: &'a BindMount,
}

/// Call in the new mount namespace, before the pivot.
pub fn take_along(mounts: &[BindMount]) -> Result<Vec<Taken<'_>>, Failure> {
    let take = |mount| {
        let view = view(mount).stage_on("take along what is mounted at", &mount.target)?;
        Ok(Taken { view, mount })
    };
    mounts.iter().map(take).collect()
}

fn view(mount: &BindMount) -> std::io::Result<OwnedFd> {
    let source = open_sub_path(Path::new(&mount.source), &mount.sub_path)?;
    let view = mounts::clone_fd(source, true)?;
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, mount.readonly);
    if !attributes.is_empty() {
        let attributes = u64::from(attributes.bits());
        sys::set_mount_attributes(view.as_fd(), attributes, mount.recursive_readonly)?;
    }
    let propagation = if mount.follows_host {
        MountPropagationFlags::DOWNSTREAM
    } else {
        MountPropagationFlags::PRIVATE
    };
    sys::set_propagation(view.as_fd(), propagation)?;
    Ok(view)
}

/// Call after the pivot, once the kernel's file systems are mounted.
pub fn place(taken: Vec<Taken<'_>>) -> Result<(), Failure> {
    taken.into_iter().try_for_each(place_one)
}

fn place_one(taken: Taken<'_>) -> Result<(), Failure> {
    let target = taken.mount.target.as_str();
    let path = Path::new(target);
    let is_directory =
        mounts::is_directory(&taken.view).stage_on("look at the source of", target)?;
    let place = if is_directory {
        paths::ensure_directory(path)
    } else {
        paths::ensure_file(path)
    };
    let place = place.stage_on("make the mount point", target)?;
    let on_proc = fstatfs(&place).stage_on("look at the mount point", target)?;
    if on_proc.f_type == PROC_SUPER_MAGIC && !COVERABLE.contains(&target) {
        return Err(Failure::other(format!(
            "mount at {target:?}: nothing may be mounted over /proc"
        )));
    }
    if !is_directory && mounts::is_directory(&place).stage_on("look at the mount point", target)? {
        return Err(Failure::other(format!(
            "mount at {target:?}: the source is a file and the image has a directory there"
        )));
    }
    mounts::attach(taken.view, place).stage_on("mount", target)
}
