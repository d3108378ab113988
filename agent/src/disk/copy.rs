// SPDX-License-Identifier: Apache-2.0
//! Copies a tree of files that nobody changes meanwhile: directories, files with their second names and their holes,
//! links, devices and pipes, each with its owner, permissions, extended attributes and times. Blocks.
//!
//! An image's author has made the tree, so the number of its files and the time are limited; the target's file system
//! limits their size. No link in it is followed.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::attributes;

/// The most files of one tree, as many as a layer of an image may have.
const MAX_FILES: usize = 1 << 20;
/// How many files with several names are remembered, so that their copies have several names, too.
const MAX_LINKED: usize = 1 << 16;
const BUFFER_BYTES: usize = 128 << 10;

/// Why a tree was not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("copy {path:?}")]
    File { path: PathBuf, source: io::Error },
    #[error("it has more than {MAX_FILES} files")]
    TooMany,
    #[error("it took too long")]
    TooLate,
}

impl CopyError {
    /// Whether the target's file system is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::File { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Self::TooMany | Self::TooLate => false,
        }
    }
}

/// What is still to be done; paths are relative to the tree.
enum Step {
    Enter(PathBuf),
    /// Its content is complete, and no longer changes its time.
    Leave(PathBuf),
}

/// Copies what is in the directory `source` to the empty directory `target`, and makes that like `source`.
pub fn copy_tree(source: &Path, target: &Path, deadline: Instant) -> Result<(), CopyError> {
    let mut copy = Copy {
        source,
        target,
        deadline,
        files: 0,
        linked: HashMap::new(),
        buffer: vec![0; BUFFER_BYTES],
    };
    let mut steps = vec![Step::Enter(PathBuf::new())];
    while let Some(step) = steps.pop() {
        match step {
            Step::Leave(path) => copy.attributes(&path)?,
            Step::Enter(path) => {
                steps.push(Step::Leave(path.clone()));
                for name in copy.names(&path)? {
                    let path = path.join(name);
                    if copy.one(&path)? {
                        steps.push(Step::Enter(path));
                    }
                }
            }
        }
    }
    Ok(())
}

/// A copy that is being made.
struct Copy<'a> {
    source: &'a Path,
    target: &'a Path,
    deadline: Instant,
    files: usize,
    /// The copies of files with several names, by the file system and the inode of the original.
    linked: HashMap<(u64, u64), PathBuf>,
    buffer: Vec<u8>,
}

impl Copy<'_> {
    /// The names in a directory of the source.
    fn names(&mut self, path: &Path) -> Result<Vec<OsString>, CopyError> {
        let mut names = Vec::new();
        let entries = fs::read_dir(self.source.join(path)).map_err(failed(path))?;
        for entry in entries {
            names.push(entry.map_err(failed(path))?.file_name());
            self.files += 1;
            if self.files > MAX_FILES {
                return Err(CopyError::TooMany);
            }
        }
        Ok(names)
    }

    /// Copies one file. Returns true if it is a directory, of which only an empty one has been made.
    fn one(&mut self, path: &Path) -> Result<bool, CopyError> {
        let (source, target) = (self.source.join(path), self.target.join(path));
        self.check_time()?;
        let found = fs::symlink_metadata(&source).map_err(failed(path))?;
        if found.is_dir() {
            fs::create_dir(&target).map_err(failed(path))?;
            return Ok(true);
        }
        let key = (found.dev(), found.ino());
        if found.nlink() > 1 {
            if let Some(first) = self.linked.get(&key) {
                fs::hard_link(first, &target).map_err(failed(path))?;
                return Ok(false);
            }
            if self.linked.len() < MAX_LINKED {
                self.linked.insert(key, target.clone());
            }
        }
        if found.is_file() {
            self.data(path, &source, &target)?;
        } else {
            make_special(&found, &source, &target).map_err(failed(path))?;
        }
        self.attributes(path)?;
        Ok(false)
    }

    /// Copies the data of a file. Blocks of zeroes become holes, so a sparse file stays one.
    fn data(&mut self, path: &Path, source: &Path, target: &Path) -> Result<(), CopyError> {
        let mut from = File::open(source).map_err(failed(path))?;
        let mut options = File::options();
        let to = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(target);
        let to = to.map_err(failed(path))?;
        let mut at = 0u64;
        loop {
            let count = from.read(&mut self.buffer).map_err(failed(path))?;
            let data = self.buffer.get(..count).unwrap_or_default();
            if data.is_empty() {
                return to.set_len(at).map_err(failed(path));
            }
            if data.iter().any(|byte| *byte != 0) {
                to.write_all_at(data, at).map_err(failed(path))?;
            }
            at = at.saturating_add(count as u64);
            self.check_time()?;
        }
    }

    fn attributes(&self, path: &Path) -> Result<(), CopyError> {
        attributes::copy(&self.source.join(path), &self.target.join(path)).map_err(failed(path))
    }

    fn check_time(&self) -> Result<(), CopyError> {
        if Instant::now() > self.deadline {
            return Err(CopyError::TooLate);
        }
        Ok(())
    }
}

/// Makes a link, a device, a pipe or a socket.
fn make_special(found: &Metadata, source: &Path, target: &Path) -> io::Result<()> {
    let kind = found.file_type();
    if kind.is_symlink() {
        return symlink(fs::read_link(source)?, target);
    }
    let kind = if kind.is_char_device() {
        FileType::CharacterDevice
    } else if kind.is_block_device() {
        FileType::BlockDevice
    } else if kind.is_fifo() {
        FileType::Fifo
    } else {
        FileType::Socket
    };
    Ok(mknodat(
        CWD,
        target,
        kind,
        Mode::from_raw_mode(0o600),
        found.rdev(),
    )?)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CopyError {
    let path = path.to_owned();
    move |source| CopyError::File { path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_tree_is_copied_with_all_that_its_files_are_like() {
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(source.join("a/b")).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(source.join("a/b/file"), "content").unwrap();
        fs::set_permissions(source.join("a/b/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::hard_link(source.join("a/b/file"), source.join("second")).unwrap();
        symlink("../../etc", source.join("a/link")).unwrap();
        mknodat(CWD, source.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let sparse = File::create(source.join("sparse")).unwrap();
        sparse.write_all_at(b"end", 64 << 20).unwrap();
        fs::set_permissions(source.join("a"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o2750)).unwrap();
        copy_tree(&source, &target, soon()).unwrap();
        for path in [
            "", "a", "a/b", "a/b/file", "a/link", "second", "pipe", "sparse",
        ] {
            let of = |root: &Path| {
                let found = fs::symlink_metadata(root.join(path)).unwrap();
                let times = (found.mtime(), found.mtime_nsec());
                let length = if found.is_dir() { 0 } else { found.len() };
                (
                    found.mode(),
                    found.uid(),
                    found.gid(),
                    times,
                    found.nlink(),
                    length,
                )
            };
            assert_eq!(of(&source), of(&target), "{path}");
        }
        assert_eq!(fs::read(target.join("second")).unwrap(), b"content");
        let to = fs::read_link(target.join("a/link")).unwrap();
        assert_eq!(to, Path::new("../../etc"));
        let sparse = fs::metadata(target.join("sparse")).unwrap();
        assert!(sparse.blocks() < 4096, "{} blocks", sparse.blocks());
    }

    #[test]
    fn a_copy_that_takes_too_long_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(source.join("a")).unwrap();
        fs::create_dir(&target).unwrap();
        let past = Instant::now() - Duration::from_secs(1);
        let error = copy_tree(&source, &target, past).unwrap_err();
        assert!(matches!(error, CopyError::TooLate), "{error}");
    }
}
