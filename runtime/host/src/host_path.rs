// SPDX-License-Identifier: Apache-2.0
//! A path of the host that is looked up once.
//!
//! Whoever may write to a directory can replace what is in it at any time, also by a link to elsewhere. So the links of
//! a path are resolved once, and what is there is opened without following another one. What is checked, and mounted
//! later, is the open file, wherever its path leads by then.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// A file or directory of the host, opened only as a place (`O_PATH`), so that opening it has no effect.
#[derive(Debug)]
pub struct HostPath {
    path: PathBuf,
    file: File,
}

impl HostPath {
    /// Resolves the links of `path` and opens what it leads to.
    pub fn find(path: &Path) -> io::Result<Self> {
        Self::open(path.canonicalize()?)
    }

    /// Opens a path that was found earlier. It is an error if it has links now.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = open_without_links(&path, OFlags::PATH)?;
        Ok(Self { path, file })
    }

    /// The path, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// A path for system calls that lead to the open file, as long as `self` lives.
    pub fn place(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

impl AsFd for HostPath {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens an existing file whose path must have no link, neither at its end nor above.
pub fn open_without_links(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC;
    match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        Ok(file) => Ok(file.into()),
        Err(Errno::LOOP) => Err(io::Error::other(
            "a link has been put into its path since it was looked up; remove the link, or try again to follow it",
        )),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::{RenameFlags, renameat_with};

    use super::*;

    /// A directory with `volume`, a path to it through a link, and `elsewhere`.
    fn host() -> (tempfile::TempDir, PathBuf, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let (volume, elsewhere) = (root.join("real/volume"), root.join("elsewhere"));
        fs::create_dir_all(&volume).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        symlink("real", root.join("link")).unwrap();
        (directory, root.join("link/volume"), volume, elsewhere)
    }

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn links_are_resolved_once_and_what_was_found_stays_whatever_replaces_it() {
        let (_directory, path, volume, elsewhere) = host();
        let found = HostPath::find(&path).unwrap();
        assert_eq!(found.path(), volume);
        let moved = volume.with_extension("moved");
        fs::rename(&volume, &moved).unwrap();
        symlink(&elsewhere, &volume).unwrap();
        assert_eq!(found.metadata().unwrap().ino(), inode(&moved));
        assert_eq!(inode(&found.place()), inode(&moved));
        let error = HostPath::open(volume).unwrap_err().to_string();
        assert!(error.contains("a link"), "{error}");
        assert_eq!(HostPath::find(&path).unwrap().path(), elsewhere);
    }

    #[test]
    fn a_link_that_is_put_above_is_not_followed_either() {
        let (_directory, _path, volume, elsewhere) = host();
        let parent = volume.parent().unwrap();
        fs::rename(parent, parent.with_extension("moved")).unwrap();
        fs::create_dir(elsewhere.join("volume")).unwrap();
        symlink(&elsewhere, parent).unwrap();
        HostPath::open(volume).unwrap_err();
    }

    #[test]
    fn what_is_opened_is_what_the_path_says_while_links_come_and_go() {
        let (_directory, path, volume, elsewhere) = host();
        let link = volume.with_extension("link");
        symlink(&elsewhere, &link).unwrap();
        let inodes = [inode(&volume), inode(&elsewhere)];
        let end = AtomicBool::new(false);
        let mut seen = [0; 2];
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    renameat_with(CWD, &volume, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                }
            });
            for _ in 0..20_000 {
                // An error: the link came after the path had been looked up.
                let Ok(found) = HostPath::find(&path) else {
                    continue;
                };
                let which = usize::from(found.path() == elsewhere);
                assert_eq!(found.metadata().unwrap().ino(), inodes[which]);
                seen[which] += 1;
            }
            end.store(true, Ordering::Relaxed);
        });
        assert!(seen[0] > 0, "{seen:?}");
    }
}
