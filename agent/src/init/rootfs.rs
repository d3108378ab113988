// SPDX-License-Identifier: Apache-2.0
//! The container's file tree: pivot into the root file system, then everything a Linux program
//! expects to find mounted in it.
//!
//! [`enter`] is the first half; [`seal`] the second, once the terminal has been made: masked and
//! read-only paths, and the read-only root last of all.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::config::{Failure, InitConfig, Stage};
use super::{binds, devices, mounts, paths};
use crate::sandbox::files;
use crate::sys;

const NO_SUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NO_EXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const NO_DEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const READ_ONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;

/// What containers see of the pod: (where the agent keeps it, where it appears).
const POD_FILES: [(&str, &str); 3] = [
    (files::RESOLV_CONF, "/etc/resolv.conf"),
    (files::HOSTS, "/etc/hosts"),
    (files::HOSTNAME, "/etc/hostname"),
];

/// Makes the container's tree the whole world of this process.
pub fn enter(config: &InitConfig) -> Result<(), Failure> {
    // What comes from outside must be taken along: after the pivot there is no outside.
    let volumes = binds::take_along(&config.mounts)?;
    let pod_files = POD_FILES
        .iter()
        .filter(|(source, target)| Path::new(source).exists() && !is_given(config, target))
        .map(|(source, target)| Ok((mounts::clone_path(Path::new(source))?, *target)))
        .collect::<rustix::io::Result<Vec<_>>>()
        .stage("take the pod's files along")?;
    let writable = if config.privileged {
        MountAttrFlags::empty()
    } else {
        READ_ONLY
    };
    let kernel = Kernel::take_along(config, writable)?;
    let device_nodes = devices::take_along(config)?;
    let given_devices = devices::take_given(config)?;

    rustix::process::umask(rustix::fs::Mode::empty());
    // A view of our own: the agent's is locked where our users are others than its.
    let root = mounts::clone_path(Path::new(&config.rootfs)).stage("open the root file system")?;
    let path = std::ffi::CString::new(config.rootfs.as_str()).stage("name the root file system")?;
    mounts::attach_at(&root, &path).stage("mount the root file system")?;
    mounts::pivot_into(&root).stage("pivot into the root file system")?;
    drop(root);

    place(kernel.proc, "/proc")?;
    if !is_given(config, "/dev") {
        place_dev(config, kernel.shm, kernel.mqueue, device_nodes)?;
    }
    place(kernel.sys, "/sys")?;
    place(
        new(c"cgroup2", &[], NO_SUID | NO_EXEC | NO_DEV | writable)?,
        "/sys/fs/cgroup",
    )?;
    for (mount, target) in pod_files {
        let place = paths::ensure_file(Path::new(target)).stage_on("make", target)?;
        mounts::attach(mount, place).stage_on("mount", target)?;
    }
    binds::place(volumes)?;
    devices::place_given(given_devices)
}

/// File systems of the kernel that show more than the container's own, mounted nowhere yet.
struct Kernel {
    proc: OwnedFd,
    sys: OwnedFd,
    mqueue: OwnedFd,
    shm: OwnedFd,
}

impl Kernel {
    /// With users of its own, a process may mount processes only while it sees those of the guest, and devices and
    /// message queues, which belong to the guest's users, not at all: it gets a view of the agent's.
    fn take_along(config: &InitConfig, writable: MountAttrFlags) -> Result<Self, Failure> {
        let plain = NO_SUID | NO_EXEC | NO_DEV;
        let (sys, mqueue) = if config.own_users {
            let open = paths::find(Path::new("/sys")).stage("open /sys")?;
            let view = mounts::clone_fd(open, true).stage("take /sys along")?;
            sys::set_mount_attributes(view.as_fd(), read_only_attribute(), true)
                .stage("make /sys read-only")?;
            let queues = mounts::clone_path(Path::new(files::MQUEUE));
            (view, queues.stage("take message queues along")?)
        } else {
            let sys = new(c"sysfs", &[], plain | writable)?;
            (sys, new(c"mqueue", &[], plain)?)
        };
        let shm = mounts::clone_path(Path::new(files::SHM));
        Ok(Self {
            proc: new(c"proc", &[], plain)?,
            sys,
            mqueue,
            shm: shm.stage("take the pod's /dev/shm along")?,
        })
    }
}

/// Whether one of the container's own mounts takes the place of what we would have mounted.
fn is_given(config: &InitConfig, target: &str) -> bool {
    config.mounts.iter().any(|mount| mount.target == target)
}

fn place_dev(
    config: &InitConfig,
    shm: OwnedFd,
    mqueue: OwnedFd,
    device_nodes: Vec<devices::Node>,
) -> Result<(), Failure> {
    let dev = new(c"tmpfs", &[("mode", "755"), ("size", "65536k")], NO_SUID)?;
    place(dev, "/dev")?;
    devices::populate(device_nodes)?;
    let pts = [
        ("newinstance", ""),
        ("ptmxmode", "0666"),
        ("mode", "0620"),
        ("gid", "5"),
    ];
    place(new(c"devpts", &pts, NO_SUID | NO_EXEC)?, "/dev/pts")?;
    if !is_given(config, "/dev/shm") {
        place(shm, "/dev/shm")?;
    }
    if !is_given(config, "/dev/mqueue") {
        place(mqueue, "/dev/mqueue")?;
    }
    Ok(())
}

/// Takes away what the container must not see or change.
pub fn seal(config: &InitConfig) -> Result<(), Failure> {
    for path in &config.readonly_paths {
        make_read_only(Path::new(path)).stage_on("make read-only", path)?;
    }
    for path in &config.masked_paths {
        mask(Path::new(path)).stage_on("mask", path)?;
    }
    if config.readonly_rootfs {
        let root = paths::find(Path::new("/")).stage("open the root")?;
        sys::set_mount_attributes(root.as_fd(), read_only_attribute(), false)
            .stage("make the root file system read-only")?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    Ok(())
}

fn new(
    kind: &std::ffi::CStr,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Failure> {
    mounts::new_filesystem(kind, options, attributes).stage_on("make", &kind.to_string_lossy())
}

fn place(mount: OwnedFd, target: &str) -> Result<(), Failure> {
    let directory =
        paths::ensure_directory(Path::new(target)).stage_on("make directory", target)?;
    mounts::attach(mount, directory).stage_on("mount", target)
}

fn read_only_attribute() -> u64 {
    u64::from(READ_ONLY.bits())
}

/// A path that does not exist needs no protection.
fn make_read_only(path: &Path) -> std::io::Result<()> {
    let place = match paths::find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => found?,
    };
    let view = mounts::clone_fd(&place, true)?;
    sys::set_mount_attributes(view.as_fd(), read_only_attribute(), true)?;
    Ok(mounts::attach(view, place)?)
}

fn mask(path: &Path) -> std::io::Result<()> {
    let place = match paths::find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => found?,
    };
    let cover = if mounts::is_directory(&place)? {
        let options = [("size", "4k"), ("mode", "755")];
        mounts::new_filesystem(c"tmpfs", &options, READ_ONLY | NO_SUID | NO_DEV | NO_EXEC)?
    } else {
        mounts::clone_fd(paths::find(Path::new("/dev/null"))?, false)?
    };
    Ok(mounts::attach(cover, place)?)
}
