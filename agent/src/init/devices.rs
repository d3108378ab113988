// SPDX-License-Identifier: Apache-2.0
//! What is in a container's `/dev`, which is a tmpfs of its own.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, makedev, mknodat, symlinkat, unlinkat};
use rustix::io::Errno;

use super::config::{Failure, GivenDevice, Stage};
use super::paths;

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
/// Directories of the agent's `/dev` that are file systems of their own in a container.
const NOT_COPIED: [&str; 3] = ["pts", "shm", "mqueue"];
const MAX_DEPTH: usize = 3;
const MAX_DEVICES: usize = 1024;

/// A device of the guest that a privileged container gets.
#[derive(Debug)]
pub struct Node {
    path: PathBuf,
    kind: FileType,
    mode: Mode,
    number: u64,
}

/// Every device node of the guest. Call before the pivot.
pub fn list_all() -> Vec<Node> {
    let mut nodes = Vec::new();
    list(Path::new("/dev"), MAX_DEPTH, &mut nodes);
    nodes
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
        if kind.is_dir() {
            let known = NOT_COPIED.iter().any(|name| entry.file_name() == *name);
            if depth > 1 && !known {
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
            });
        }
    }
}

/// Makes the nodes that the container was given, in place of what the image or a default has there.
pub fn place_given(given: &[GivenDevice]) -> Result<(), Failure> {
    for device in given {
        let path = Path::new(&device.path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Failure::other(format!("device {path:?} has no name")));
        };
        let parent = paths::ensure_directory(parent).stage_on("make a place for", &device.path)?;
        match unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e).stage_on("make room for device", &device.path),
        }
        let mode = Mode::from_raw_mode(0o666);
        let number = makedev(device.major, device.minor);
        mknodat(&parent, name, FileType::CharacterDevice, mode, number)
            .stage_on("make device", &device.path)?;
    }
    Ok(())
}

/// Fills the fresh `/dev`. Call after the pivot, with no umask.
pub fn populate(extra: &[Node]) -> Result<(), Failure> {
    for (name, major, minor) in STANDARD {
        let path = Path::new("/dev").join(name);
        let mode = Mode::from_raw_mode(0o666);
        mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            mode,
            makedev(major, minor),
        )
        .stage_on("make device", name)?;
    }
    for (target, link) in LINKS {
        symlinkat(target, CWD, link).stage_on("make link", link)?;
    }
    for node in extra {
        if let Some(parent) = node.path.parent() {
            paths::ensure_directory(parent).stage("make a directory of /dev")?;
        }
        match mknodat(CWD, &node.path, node.kind, node.mode, node.number) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e).stage_on("make device", &node.path.to_string_lossy()),
        }
    }
    Ok(())
}
