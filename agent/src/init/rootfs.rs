// SPDX-License-Identifier: Apache-2.0
//! The container's file tree: pivots into the root file system, then mounts everything that a Linux program
//! expects in it.
//!
//! [`enter`] is the first half. [`seal`] is the second half, after the terminal has been created: masked and
//! read-only paths, and at the very end the read-only root.

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

/// The pod's files that containers see: path in the agent's tree, path in the container.
const POD_FILES: [(&str, &str); 3] = [
    (files::RESOLV_CONF, "/etc/resolv.conf"),
    (files::HOSTS, "/etc/hosts"),
    (files::HOSTNAME, "/etc/hostname"),
];

/// Makes the container's tree the only one that this process can reach.
pub fn enter(config: &InitConfig) -> Result<(), Failure> {
    // Everything from outside must be opened now. After the pivot it cannot be reached any more.
    let volumes = binds::take_along(&config.mounts)?;
    let pod_files = POD_FILES
        .iter()
        .filter(|(source, target)| Path::new(source).exists() && !is_given(config, target))
        .map(|(source, target)| Ok((pod_file(source, config.readonly_rootfs)?, *target)))
        .collect::<std::io::Result<Vec<_>>>()
        .stage("open the pod's files")?;
    let writable = if config.privileged {
        MountAttrFlags::empty()
    } else {
        READ_ONLY
    };
    let kernel = Kernel::take_along(config, writable)?;
    let device_nodes = devices::take_along(config)?;
    let given_devices = devices::take_given(config)?;

    rustix::process::umask(rustix::fs::Mode::empty());
    // A mount in our own namespace: with a user namespace, the agent's mount is locked.
    let root = mounts::clone_path(Path::new(&config.rootfs)).stage("open the root file system")?;
    let path = std::ffi::CString::new(config.rootfs.as_str())
        .stage("encode the path of the root file system")?;
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
        let place = paths::ensure_file(Path::new(target)).stage_on("create", target)?;
        mounts::attach(mount, place).stage_on("mount", target)?;
    }
    binds::place(volumes)?;
    devices::place_given(given_devices)
}

/// A file of the pod, not mounted yet. It is as writable as the root around it.
fn pod_file(source: &str, readonly: bool) -> std::io::Result<OwnedFd> {
    let view = mounts::clone_path(Path::new(source))?;
    if readonly {
        sys::set_mount_attributes(view.as_fd(), read_only_attribute(), false)?;
    }
    Ok(view)
}

/// File systems of the kernel that need access to more than the container, not mounted yet.
struct Kernel {
    proc: OwnedFd,
    sys: OwnedFd,
    mqueue: OwnedFd,
    shm: OwnedFd,
}

impl Kernel {
    /// Opens these file systems. A process in a user namespace may mount procfs only while it sees the guest's. sysfs
    /// and message queues belong to the guest's users. It may not mount them and gets copies of the agent's mounts.
    fn take_along(config: &InitConfig, writable: MountAttrFlags) -> Result<Self, Failure> {
        let plain = NO_SUID | NO_EXEC | NO_DEV;
        let (sys, mqueue) = if config.own_users {
            let open = paths::find(Path::new("/sys")).stage("open /sys")?;
            let view = mounts::clone_fd(open, true).stage("clone the mount of /sys")?;
            sys::set_mount_attributes(view.as_fd(), read_only_attribute(), true)
                .stage("make /sys read-only")?;
            let queues = mounts::clone_path(Path::new(files::MQUEUE));
            (view, queues.stage("clone the mount of message queues")?)
        } else {
            let sys = new(c"sysfs", &[], plain | writable)?;
            (sys, new(c"mqueue", &[], plain)?)
        };
        let shm = mounts::clone_path(Path::new(files::SHM));
        Ok(Self {
            proc: new(c"proc", &[], plain)?,
            sys,
            mqueue,
            shm: shm.stage("clone the mount of the pod's /dev/shm")?,
        })
    }
}

/// Whether one of the container's own mounts replaces a default mount.
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

/// Removes access to what the container must not see or change.
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
    mounts::new_filesystem(kind, options, attributes)
        .stage_on("create a file system of type", &kind.to_string_lossy())
}

fn place(mount: OwnedFd, target: &str) -> Result<(), Failure> {
    let directory =
        paths::ensure_directory(Path::new(target)).stage_on("create directory", target)?;
    mounts::attach(mount, directory).stage_on("mount", target)
}

fn read_only_attribute() -> u64 {
    u64::from(READ_ONLY.bits())
}

/// Makes a path read-only. One that does not exist needs no protection.
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
