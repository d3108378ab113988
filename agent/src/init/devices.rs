// SPDX-License-Identifier: Apache-2.0
//! What is in a container's `/dev`, which is a tmpfs of its own.

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
/// What of the agent's `/dev` is a container's own.
const NOT_COPIED: [&str; 4] = ["pts", "shm", "mqueue", "ptmx"];
const MAX_DEPTH: usize = 3;
const MAX_DEVICES: usize = 1024;

/// A device of the guest that a container gets.
#[derive(Debug)]
pub struct Node {
    path: PathBuf,
    kind: FileType,
    mode: Mode,
    number: u64,
    /// The guest's own node, where the container's users may not make one.
    view: Option<OwnedFd>,
}

/// The devices that the container gets: all of the guest's if it is privileged. Call before the pivot.
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
        list(Path::new("/dev"), MAX_DEPTH, &mut nodes);
    }
    if config.own_users {
        for node in &mut nodes {
            let view = mounts::clone_path(&node.path);
            let view = view.stage_on("take along device", &node.path.to_string_lossy())?;
            node.view = Some(view);
        }
    }
    Ok(nodes)
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

/// A device that the container was given.
#[derive(Debug)]
pub struct Given<'a> {
    device: &'a GivenDevice,
    /// The guest's own node, where the container's users may not make one.
    view: Option<OwnedFd>,
}

/// Call before the pivot.
pub fn take_given(config: &InitConfig) -> Result<Vec<Given<'_>>, Failure> {
    let take = |device| {
        let view = config.own_users.then(|| take_one(device)).transpose()?;
        Ok(Given { device, view })
    };
    config.devices.iter().map(take).collect()
}

fn take_one(device: &GivenDevice) -> Result<OwnedFd, Failure> {
    let view = mounts::clone_path(Path::new(&device.guest_path));
    view.stage_on("take along device", &device.path)
}

/// Makes the nodes that the container was given, in place of what the image or a default has there.
pub fn place_given(given: Vec<Given<'_>>) -> Result<(), Failure> {
    for Given { device, view } in given {
        let path = Path::new(&device.path);
        if let Some(view) = view {
            let place = paths::ensure_file(path).stage_on("make a place for", &device.path)?;
            mounts::attach(view, place).stage_on("mount device", &device.path)?;
            continue;
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Failure::other(format!("device {path:?} has no name")));
        };
        let parent = paths::ensure_directory(parent).stage_on("make a place for", &device.path)?;
        match unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e).stage_on("make room for device", &device.path),
        }
        let number = makedev(device.major, device.minor);
        let kind = if device.block {
            FileType::BlockDevice
        } else {
            FileType::CharacterDevice
        };
        let mode = Mode::from_raw_mode(device.mode & 0o777);
        mknodat(&parent, name, kind, mode, number).stage_on("make device", &device.path)?;
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        chownat(
            &parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .stage_on("give device to its owner", &device.path)?;
    }
    Ok(())
}

/// Fills the fresh `/dev`. Call after the pivot, with no umask.
pub fn populate(nodes: Vec<Node>) -> Result<(), Failure> {
    for (target, link) in LINKS {
        symlinkat(target, CWD, link).stage_on("make link", link)?;
    }
    for node in nodes {
        let name = node.path.to_string_lossy().into_owned();
        if let Some(parent) = node.path.parent() {
            paths::ensure_directory(parent).stage("make a directory of /dev")?;
        }
        if let Some(view) = node.view {
            let place = paths::ensure_file(&node.path).stage_on("make device", &name)?;
            mounts::attach(view, place).stage_on("mount device", &name)?;
            continue;
        }
        match mknodat(CWD, &node.path, node.kind, node.mode, node.number) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e).stage_on("make device", &name),
        }
    }
    Ok(())
}
