// SPDX-License-Identifier: Apache-2.0
//! The container's volumes: their sources are opened before the pivot and mounted after it.
//!
//! A source is looked up within its volume and a target within the container's root, both by descriptor. So no
//! symbolic link in a volume or an image can lead out of it. Over `/proc` nothing is mounted except the few files
//! that runc allows, too: otherwise a volume could decide what the kernel seems to report.
//!
//! Whether a share of the host is read-only is decided on the host. The mount says the same, so that programs find it
//! out before they write: `access`, `statvfs` and mountinfo look at the mount, and never ask the file server.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, fstatfs, openat2};
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
    /// Detached mounts for what is below, each with its path.
    parts: Vec<(OwnedFd, &'a str)>,
}

/// Opens all sources. Call it in the new mount namespace, before the pivot.
pub fn take_along(mounts: &[BindMount]) -> Result<Vec<Taken<'_>>, Failure> {
    let stage = "open the source of the mount at";
    let taken = mounts
        .iter()
        .map(|one| take(one).stage_on(stage, &one.target));
    taken.collect()
}

fn take(mount: &BindMount) -> std::io::Result<Taken<'_>> {
    let source = open_sub_path(Path::new(&mount.source), &mount.sub_path)?;
    let recursive = mount.recursive_readonly;
    let view = view(&source, mount.readonly.then_some(recursive), mount)?;
    let mut parts = Vec::new();
    for part in &mount.parts {
        // The host may have unmounted it since it was listed. Then nothing has to be said about it.
        let Ok(below) = open_below(&source, &part.path) else {
            continue;
        };
        let part_view = self::view(&below, part.readonly.then_some(false), mount)?;
        parts.push((part_view, part.path.as_str()));
    }
    Ok(Taken { view, mount, parts })
}

/// A copy of the mount at `source`. If `readonly` is given, it is read-only, and so is what is mounted below if that is
/// true.
fn view(source: &OwnedFd, readonly: Option<bool>, mount: &BindMount) -> std::io::Result<OwnedFd> {
    let view = mounts::clone_fd(source, true)?;
    if let Some(recursive) = readonly {
        let here = [(true, MountAttrFlags::MOUNT_ATTR_RDONLY)];
        set_attributes(&view, &here, recursive)?;
    }
    let everywhere = [
        (mount.no_exec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (mount.no_suid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (mount.no_dev, MountAttrFlags::MOUNT_ATTR_NODEV),
    ];
    set_attributes(&view, &everywhere, true)?;
    let propagation = if mount.follows_host {
        MountPropagationFlags::DOWNSTREAM
    } else {
        MountPropagationFlags::PRIVATE
    };
    sys::set_propagation(view.as_fd(), propagation)?;
    Ok(view)
}

/// Sets those of `attributes` that are wanted on a mount, and if `recursive` on all mounts below it.
fn set_attributes(
    view: &OwnedFd,
    attributes: &[(bool, MountAttrFlags)],
    recursive: bool,
) -> std::io::Result<()> {
    let mut wanted = MountAttrFlags::empty();
    for (is_wanted, attribute) in attributes {
        wanted.set(*attribute, *is_wanted);
    }
    if wanted.is_empty() {
        return Ok(());
    }
    sys::set_mount_attributes(view.as_fd(), u64::from(wanted.bits()), recursive)
}

/// Opens a place below a mount, without following links.
fn open_below(root: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    openat2(root, path, flags, Mode::empty(), resolve)
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
    mounts::attach(&taken.view, place).stage_on("mount", target)?;
    for (part, path) in &taken.parts {
        // From here on the view is what is mounted at the target, so this finds the place within it.
        let Ok(place) = open_below(&taken.view, path) else {
            continue;
        };
        mounts::attach(part, place).stage_on("mount what is below", target)?;
    }
    Ok(())
}
