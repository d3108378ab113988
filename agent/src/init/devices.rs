// SPDX-License-Identifier: Apache-2.0
//! The content of a container's `/dev`, which is a tmpfs of its own.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Uid, chownat, makedev, mknodat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::config::{Failure, GivenDevice, InitConfig, Stage};
use super::{mounts, paths};

const STANDARD: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
    ("pts/ptmx", "/dev/ptmx"),
];
/// Loop devices that a privileged container finds. The kernel makes one when its node is opened.
const LOOPS: u32 = 8;
const LOOP_MAJOR: u32 = 7;
/// Parts of the agent's `/dev` of which each container has its own. Only one with a terminal has a console, as with
/// containerd; the guest's own is the pod's log.
const NOT_COPIED: [&str; 5] = ["pts", "shm", "mqueue", "ptmx", "console"];
const MAX_DEPTH: usize = 3;
const MAX_DEVICES: usize = 1024;

/// A device of the guest that a container gets.
#[derive(Debug)]
pub struct Node {
    path: PathBuf,
    kind: FileType,
    mode: Mode,
    number: u64,
    /// A mount of the guest's own node, for containers whose users may not create device nodes.
    view: Option<OwnedFd>,
}

/// Collects the devices for the container: the default ones, or all of the guest's if it is privileged. Call it before
/// the pivot.
pub fn take_along(config: &InitConfig) -> Result<Vec<Node>, Failure> {
    let standard = STANDARD.into_iter().map(|(name, major, minor)| Node {
        path: Path::new("/dev").join(name),
        kind: FileType::CharacterDevice,
        mode: Mode::from_raw_mode(0o666),
        number: makedev(major, minor),
        view: None,
    });
    let mut nodes: Vec<Node> = standard.collect();
    if config.privileged {
        make_loops()?;
        list(Path::new("/dev"), MAX_DEPTH, &mut nodes);
    }
    if config.own_users {
        for node in &mut nodes {
            let view = mounts::clone_path(&node.path);
            let view = view.stage_on("open device", &node.path.to_string_lossy())?;
            node.view = Some(view);
        }
    }
    Ok(nodes)
}

/// Makes the nodes of loop devices in the guest's own `/dev`, where those that are in use have theirs already. An init
/// that is in a user namespace may not make nodes. It finds those that exist.
fn make_loops() -> Result<(), Failure> {
    for minor in 0..LOOPS {
        let path = format!("/dev/loop{minor}");
        let number = makedev(LOOP_MAJOR, minor);
        let mode = Mode::from_raw_mode(0o660);
        match mknodat(CWD, &path, FileType::BlockDevice, mode, number) {
            Ok(()) | Err(Errno::EXIST | Errno::PERM) => {}
            Err(e) => return Err(e).stage_on("create device", &path),
        }
    }
    Ok(())
}

fn list(directory: &Path, depth: usize, nodes: &mut Vec<Node>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let kind = metadata.file_type();
        if NOT_COPIED.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if kind.is_dir() {
            if depth > 1 {
                list(&entry.path(), depth - 1, nodes);
            }
        } else if (kind.is_char_device() || kind.is_block_device()) && nodes.len() < MAX_DEVICES {
            nodes.push(Node {
                path: entry.path(),
                kind: if kind.is_block_device() {
                    FileType::BlockDevice
                } else {
                    FileType::CharacterDevice
                },
                mode: Mode::from_raw_mode(metadata.mode() & 0o777),
                number: metadata.rdev(),
                view: None,
            });
        }
    }
}

/// A device that the container gets in addition to the default ones.
#[derive(Debug)]
pub struct Given<'a> {
    device: &'a GivenDevice,
    /// A mount of the guest's own node, for containers whose users may not create device nodes.
    view: Option<OwnedFd>,
}

/// Collects the additional devices. Call it before the pivot.
pub fn take_given(config: &InitConfig) -> Result<Vec<Given<'_>>, Failure> {
    let take = |device| {
        let view = config.own_users.then(|| take_one(device)).transpose()?;
        Ok(Given { device, view })
    };
    config.devices.iter().map(take).collect()
}

fn take_one(device: &GivenDevice) -> Result<OwnedFd, Failure> {
    let view = mounts::clone_path(Path::new(&device.guest_path));
    view.stage_on("open device", &device.path)
}

/// Creates the additional devices. They replace files of the image and default devices.
pub fn place_given(given: Vec<Given<'_>>) -> Result<(), Failure> {
    for Given { device, view } in given {
        let path = Path::new(&device.path);
        if let Some(view) = view {
            let place =
                paths::ensure_file(path).stage_on("create a mount point for", &device.path)?;
            mounts::attach(view, place).stage_on("mount device", &device.path)?;
            continue;
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Failure::other(format!("device {path:?} has no name")));
        };
        let parent =
            paths::ensure_directory(parent).stage_on("create the directory of", &device.path)?;
        match unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e).stage_on("remove the file in place of device", &device.path),
        }
        let number = makedev(device.major, device.minor);
        let kind = if device.block {
            FileType::BlockDevice
        } else {
            FileType::CharacterDevice
        };
        let mode = Mode::from_raw_mode(device.mode & 0o777);
        mknodat(&parent, name, kind, mode, number).stage_on("create device", &device.path)?;
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        chownat(
            &parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .stage_on("set the owner of device", &device.path)?;
    }
    Ok(())
}

/// Fills the new `/dev`. Call it after the pivot, with no umask.
pub fn populate(nodes: Vec<Node>) -> Result<(), Failure> {
    for (target, link) in LINKS {
        symlinkat(target, CWD, link).stage_on("create link", link)?;
    }
    for node in nodes {
        let name = node.path.to_string_lossy().into_owned();
        if let Some(parent) = node.path.parent() {
            paths::ensure_directory(parent).stage("create a directory in /dev")?;
        }
        if let Some(view) = node.view {
            let place = paths::ensure_file(&node.path).stage_on("create device", &name)?;
            mounts::attach(view, place).stage_on("mount device", &name)?;
            continue;
        }
        match mknodat(CWD, &node.path, node.kind, node.mode, node.number) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e).stage_on("create device", &name),
        }
    }
    Ok(())
}
