// SPDX-License-Identifier: Apache-2.0
//! Finds and creates files in a tree whose content comes from an image's author.
//!
//! Runs after the pivot, so `/` is the container's root and symbolic links cannot lead out of it. Only the
//! kernel's magic links (`/proc/1/root`) could: if containers share a PID namespace, they lead to another
//! process's root. They are refused.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2, readlinkat, unlinkat,
};
use rustix::io::{Errno, Result};

/// More than any path that the kernel accepts can have (PATH_MAX / 2 components).
const MAX_COMPONENTS: usize = 2048;
/// The kernel's own limit.
const MAX_LINKS: usize = 40;
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);

/// Opens `path` as a location (`O_PATH`). Symbolic links are followed within the root.
pub fn find(path: &Path) -> Result<OwnedFd> {
    open(path, OFlags::PATH)
}

/// Opens a directory as a location.
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

/// Opens a directory. Creates it and its parents if necessary. If a symbolic link is dangling, creates its target.
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
    // From the root downwards, so that the parent always exists.
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

/// Opens a file as a location. Creates an empty file if there is none, also in place of a dangling symbolic link.
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
