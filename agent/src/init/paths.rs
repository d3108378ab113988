// SPDX-License-Identifier: Apache-2.0
//! Finding and making things in a tree that an image's author arranged.
//!
//! Runs after the pivot, so `/` is the container's root and links cannot climb over it. What is left
//! to refuse are the kernel's magic links (`/proc/1/root`), which would lead to another process's
//! root when the container shares a PID namespace.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2, readlinkat, unlinkat,
};
use rustix::io::{Errno, Result};

/// Deeper than any path that the kernel would take (PATH_MAX / 2 components).
const MAX_COMPONENTS: usize = 2048;
/// As the kernel has it.
const MAX_LINKS: usize = 40;
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);

/// Opens what is at `path` as a place (`O_PATH`), following links inside the root only.
pub fn find(path: &Path) -> Result<OwnedFd> {
    open(path, OFlags::PATH)
}

/// Opens a directory for what is done in it.
fn find_directory(path: &Path) -> Result<OwnedFd> {
    open(path, OFlags::PATH | OFlags::DIRECTORY)
}

/// Opens `path` with `flags`.
pub fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    openat2(
        CWD,
        Path::new("/").join(path),
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )
}

/// Opens a directory, made with its parents if need be. Where a link leads nowhere, what it names is made.
pub fn ensure_directory(path: &Path) -> Result<OwnedFd> {
    ensure_directory_behind(path, 0)
}

fn ensure_directory_behind(path: &Path, links: usize) -> Result<OwnedFd> {
    match find_directory(path) {
        Err(Errno::NOENT) => {}
        found => return found,
    }
    if path.components().count() > MAX_COMPONENTS {
        return Err(Errno::NAMETOOLONG);
    }
    // From the root downwards, so that each step has a parent that exists.
    let mut so_far = std::path::PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                let parent = find_directory(&so_far)?;
                let step = so_far.join(name);
                match mkdirat(&parent, name, DIRECTORY_MODE) {
                    Ok(()) => {}
                    Err(Errno::EXIST) if matches!(find_directory(&step), Err(Errno::NOENT)) => {
                        let target = readlinkat(&parent, name, Vec::new())?;
                        if links == MAX_LINKS {
                            return Err(Errno::LOOP);
                        }
                        let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                        ensure_directory_behind(&so_far.join(target), links + 1)?;
                    }
                    Err(Errno::EXIST) => {}
                    Err(e) => return Err(e),
                }
                so_far = step;
            }
            Component::ParentDir => so_far.push(".."),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    find_directory(path)
}

/// Opens a file as a place, made empty if it is not there. A link that leads nowhere is replaced.
pub fn ensure_file(path: &Path) -> Result<OwnedFd> {
    match find(path) {
        Err(Errno::NOENT) => {}
        found => return found,
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL);
    };
    let parent = ensure_directory(parent)?;
    match unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(e),
    }
    rustix::fs::openat(
        &parent,
        name,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o644),
    )?;
    find(path)
}
