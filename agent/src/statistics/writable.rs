// SPDX-License-Identifier: Apache-2.0
//! How much a container has written: counts the inodes and blocks in the upper directory of its overlay, and in its
//! own volumes.
//!
//! Counting takes time, so a result is reused for twenty times as long as the count took, at least a second. Counting
//! then takes at most a twentieth of a CPU, however many files there are and however often someone asks. A count that
//! is not finished by the deadline is cut and marked as cut, unless there is an older complete one. Blocks. Counts of
//! one container run one after the other.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_proto::agent::WritableLayer;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, open, openat2, statat};

/// The most inodes that are counted.
const MAX_INODES: u64 = 1_000_000;
/// How many inodes with several names are remembered, so that each counts only once.
const MAX_LINKED: usize = 65_536;
const LEAST_AGE: Duration = Duration::from_secs(1);
const AGE_FACTOR: u32 = 20;
/// The unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;

/// The last count of a container's directories.
#[derive(Debug, Default)]
pub struct Counted(Mutex<Option<Last>>);

#[derive(Debug)]
struct Last {
    layer: WritableLayer,
    until: Instant,
}

impl Counted {
    /// Counts the content of `places`, which are on one file system. Returns the last count instead if that is recent,
    /// or if the deadline has passed.
    pub fn count(&self, places: &[PathBuf], deadline: Instant) -> WritableLayer {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let started = Instant::now();
        if let Some(last) = last.as_ref()
            && (started < last.until || started > deadline)
        {
            return last.layer;
        }
        let counted = count(places, deadline);
        let layer = match last.as_ref() {
            Some(whole) if counted.cut && !whole.layer.cut => whole.layer,
            _ => counted,
        };
        let age = LEAST_AGE.max(started.elapsed().saturating_mul(AGE_FACTOR));
        *last = Some(Last {
            layer,
            until: Instant::now() + age,
        });
        layer
    }
}

/// Counts directories. One that cannot be read, for example because it vanished, counts as empty.
fn count(places: &[PathBuf], deadline: Instant) -> WritableLayer {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut layer = WritableLayer::default();
    let mut linked = HashSet::new();
    for place in places {
        let Ok(top) = open(place, flags, Mode::empty()) else {
            continue;
        };
        let mut walk = Walk {
            top,
            layer: &mut layer,
            linked: &mut linked,
            pending: vec![Vec::new()],
        };
        while let Some(directory) = walk.pending.pop() {
            walk.visit(&directory);
            if walk.layer.inodes >= MAX_INODES || Instant::now() > deadline {
                walk.layer.cut = true;
                return layer;
            }
        }
    }
    layer
}

/// A count of one directory that is running.
struct Walk<'a> {
    top: OwnedFd,
    layer: &'a mut WritableLayer,
    linked: &'a mut HashSet<u64>,
    /// Paths below `top` that still have to be read.
    pending: Vec<Vec<u8>>,
}

impl Walk<'_> {
    /// Counts one directory. The container may change names meanwhile, so no symbolic link is followed and nothing
    /// outside `top` is opened.
    fn visit(&mut self, path: &[u8]) {
        let Some(directory) = self.open(path) else {
            return;
        };
        let Ok(mut entries) = Dir::read_from(&directory) else {
            return;
        };
        while let Some(Ok(entry)) = entries.read() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if !self.is_new(
                stat.st_ino,
                stat.st_nlink,
                FileType::from_raw_mode(stat.st_mode),
            ) {
                continue;
            }
            self.layer.inodes += 1;
            let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
            self.layer.bytes += blocks.saturating_mul(BLOCK_BYTES);
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let mut below = path.to_vec();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend(name.to_bytes());
                self.pending.push(below);
            }
            if self.layer.inodes >= MAX_INODES {
                return;
            }
        }
    }

    /// Opens a directory. One whose path is too long is not counted, and the count is marked as cut.
    fn open(&mut self, path: &[u8]) -> Option<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = if path.is_empty() {
            b".".as_slice()
        } else {
            path
        };
        let path = CString::new(path).ok()?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        match openat2(self.top.as_fd(), path, flags, Mode::empty(), resolve) {
            Ok(directory) => Some(directory),
            Err(rustix::io::Errno::NAMETOOLONG) => {
                self.layer.cut = true;
                None
            }
            Err(_) => None,
        }
    }

    fn is_new(&mut self, inode: u64, links: u64, kind: FileType) -> bool {
        if kind == FileType::Directory || links <= 1 || self.linked.len() >= MAX_LINKED {
            return true;
        }
        self.linked.insert(inode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn what_was_written_counts_once_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let places = ["up", "volumes"].map(|name| directory.path().join(name));
        let [upper, volumes] = &places;
        fs::create_dir_all(upper.join("a/b")).unwrap();
        fs::write(upper.join("a/b/file"), vec![7; 1 << 20]).unwrap();
        let before = count(&places, soon());
        assert!((1 << 20..2 << 20).contains(&before.bytes), "{before:?}");
        assert_eq!((before.inodes, before.cut), (3, false));
        fs::hard_link(upper.join("a/b/file"), upper.join("same")).unwrap();
        std::os::unix::fs::symlink("/usr", upper.join("a/link")).unwrap();
        let after = count(&places, soon());
        assert_eq!(
            after.inodes, 4,
            "a symbolic link is an inode, a second name is not"
        );
        assert!(after.bytes < before.bytes + (64 << 10), "{after:?}");
        fs::create_dir_all(volumes.join("0")).unwrap();
        fs::write(volumes.join("0/file"), vec![7; 1 << 20]).unwrap();
        let with_volume = count(&places, soon());
        assert_eq!(with_volume.inodes, 6);
        assert!(
            with_volume.bytes >= after.bytes + (1 << 20),
            "{with_volume:?}"
        );
    }

    #[test]
    fn a_count_that_takes_too_long_says_that_it_is_cut() {
        let directory = tempfile::tempdir().unwrap();
        let place = [directory.path().to_owned()];
        fs::write(directory.path().join("file"), "x").unwrap();
        assert!(count(&place, Instant::now() - LEAST_AGE).cut);
        assert_eq!(
            count(&[directory.path().join("none")], soon()),
            WritableLayer::default()
        );
    }

    #[test]
    fn an_answer_is_kept_for_a_moment() {
        let directory = tempfile::tempdir().unwrap();
        let place = [directory.path().to_owned()];
        let counted = Counted::default();
        assert_eq!(counted.count(&place, soon()).inodes, 0);
        fs::write(directory.path().join("file"), "x").unwrap();
        assert_eq!(counted.count(&place, soon()).inodes, 0);
    }
}
