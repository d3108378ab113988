// SPDX-License-Identifier: Apache-2.0
//! The container's volumes: their sources are opened before the pivot and mounted after it.
//!
//! A source is looked up within its volume and a target within the container's root, both by descriptor. So no
//! symbolic link in a volume or an image can lead out of it. Over `/proc` nothing is mounted except the few files
//! that runc allows, too: otherwise a volume could decide what the kernel seems to report.

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
/// Files of procfs over which may be mounted, as with runc. Tools use it to show a container its own limits.
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

/// A detached mount of a source.
#[derive(Debug)]
pub struct Taken<'a> {
    view: OwnedFd,
    mount: &'a BindMount,
}

/// Opens all sources. Call it in the new mount namespace, before the pivot.
pub fn take_along(mounts: &[BindMount]) -> Result<Vec<Taken<'_>>, Failure> {
    let take = |mount| {
        let view = view(mount).stage_on("open the source of the mount at", &mount.target)?;
        Ok(Taken { view, mount })
    };
    mounts.iter().map(take).collect()
}

fn view(mount: &BindMount) -> std::io::Result<OwnedFd> {
    let source = open_sub_path(Path::new(&mount.source), &mount.sub_path)?;
    let view = mounts::clone_fd(source, true)?;
    let mut attributes = MountAttrFlags::empty();
    for (attribute, is_wanted) in [
        (MountAttrFlags::MOUNT_ATTR_RDONLY, mount.readonly),
        (MountAttrFlags::MOUNT_ATTR_NOSUID, mount.no_suid),
        (MountAttrFlags::MOUNT_ATTR_NODEV, mount.no_devices),
        (MountAttrFlags::MOUNT_ATTR_NOEXEC, mount.no_execution),
    ] {
        attributes.set(attribute, is_wanted);
    }
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

/// Mounts all sources at their targets. Call it after the pivot, when the kernel's file systems are mounted.
pub fn place(taken: Vec<Taken<'_>>) -> Result<(), Failure> {
    taken.into_iter().try_for_each(place_one)
}

/// Mounts one source. Creates the mount point if the image has none.
fn place_one(taken: Taken<'_>) -> Result<(), Failure> {
    let target = taken.mount.target.as_str();
    let path = Path::new(target);
    let is_directory =
        mounts::is_directory(&taken.view).stage_on("examine the source of", target)?;
    let place = if is_directory {
        paths::ensure_directory(path)
    } else {
        paths::ensure_file(path)
    };
    let place = place.stage_on("create the mount point", target)?;
    let on_proc = fstatfs(&place).stage_on("examine the mount point", target)?;
    if on_proc.f_type == PROC_SUPER_MAGIC && !COVERABLE.contains(&target) {
        return Err(Failure::other(format!(
            "mount at {target:?}: nothing may be mounted over /proc"
        )));
    }
    if !is_directory && mounts::is_directory(&place).stage_on("examine the mount point", target)? {
        return Err(Failure::other(format!(
            "mount at {target:?}: the source is a file and the image has a directory there"
        )));
    }
    mounts::attach(taken.view, place).stage_on("mount", target)
}
