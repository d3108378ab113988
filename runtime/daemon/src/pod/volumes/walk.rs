// SPDX-License-Identifier: Apache-2.0
//! Reads one state of a host directory for a mirror, record by record. Blocks.
//!
//! kubelet keeps each state of a volume in its own directory and switches between them by the link `..data`. Only the
//! state that the link names is read. If the link names another state at the end, or a file has vanished meanwhile, the
//! walk fails with [`WalkError::Changed`], because it may have read parts of two states.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_guest::protocol::{MirrorEntry, mirror_entry::Kind, mirror_record::Record};

use super::ownership;

const CURRENT: &str = "..data";
/// The prefix of kubelet's names for state directories and the link to them.
const HIDDEN: &[u8] = b"..";
const CHUNK_BYTES: u64 = 64 << 10;
/// A batch ends when it has reached this size, so it may be larger by up to one chunk.
const BATCH_BYTES: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    #[error("{0} does not exist")]
    Gone(PathBuf),
    #[error("{0} changed while it was read")]
    Changed(PathBuf),
    #[error("read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{0:?} has a name that is not UTF-8")]
    Name(OsString),
}

/// A walk that has begun.
#[derive(Debug)]
pub struct Walk {
    root: PathBuf,
    /// What the link named when the walk began.
    current: Option<PathBuf>,
    /// Relative paths that are still to be read. The next one is last.
    ahead: Vec<PathBuf>,
    /// The file whose content is being read.
    file: Option<File>,
}

impl Walk {
    /// Begins at a directory or a single file.
    pub fn begin(root: &Path) -> Result<Self, WalkError> {
        if root.symlink_metadata().is_err() {
            return Err(WalkError::Gone(root.to_owned()));
        }
        Ok(Self {
            current: fs::read_link(root.join(CURRENT)).ok(),
            root: root.to_owned(),
            ahead: vec![PathBuf::new()],
            file: None,
        })
    }

    /// The next records. An empty batch means that the state is complete.
    pub fn next_batch(&mut self) -> Result<Vec<Record>, WalkError> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES {
            let Some(record) = self.next_record()? else {
                break;
            };
            bytes += match &record {
                Record::Data(data) => data.len(),
                Record::Entry(entry) => entry.path.len() + 64,
                Record::Restart(_) | Record::Commit(_) => 0,
            };
            batch.push(record);
        }
        Ok(batch)
    }

    fn next_record(&mut self) -> Result<Option<Record>, WalkError> {
        if let Some(data) = self.next_data()? {
            return Ok(Some(data));
        }
        while let Some(path) = self.ahead.pop() {
            let entry = self.entry(&path);
            if let Some(entry) = entry.map_err(|source| self.failed(&path, source))? {
                let Some(name) = path.to_str() else {
                    return Err(WalkError::Name(self.root.join(&path).into()));
                };
                let path = name.to_owned();
                return Ok(Some(Record::Entry(MirrorEntry { path, ..entry })));
            }
        }
        if fs::read_link(self.root.join(CURRENT)).ok() != self.current {
            return Err(WalkError::Changed(self.root.clone()));
        }
        Ok(None)
    }

    fn next_data(&mut self) -> Result<Option<Record>, WalkError> {
        let Some(file) = &mut self.file else {
            return Ok(None);
        };
        let mut data = Vec::new();
        let read = file.take(CHUNK_BYTES).read_to_end(&mut data);
        read.map_err(|source| self.failed(Path::new(""), source))?;
        if data.is_empty() {
            self.file = None;
            return Ok(None);
        }
        Ok(Some(Record::Data(data.into())))
    }

    /// The entry for `path`; the caller fills in its path. `None` if it is something that is not mirrored.
    fn entry(&mut self, path: &Path) -> io::Result<Option<MirrorEntry>> {
        let whole = super::mountinfo::join(&self.root, path);
        let mut metadata = whole.symlink_metadata()?;
        let kind = if metadata.is_dir() {
            self.ahead_of(path, &whole)?;
            Kind::Directory(true)
        } else if metadata.is_symlink() {
            Kind::Link(
                fs::read_link(&whole)?
                    .as_os_str()
                    .as_bytes()
                    .to_vec()
                    .into(),
            )
        } else if metadata.is_file() {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
            let file = options.open(&whole)?;
            metadata = file.metadata()?;
            self.file = Some(file);
            Kind::File(true)
        } else {
            // Sockets, pipes and devices have no content to mirror.
            return Ok(None);
        };
        Ok(Some(MirrorEntry {
            path: String::new(),
            ownership: Some(ownership(&metadata)),
            kind: Some(kind),
        }))
    }

    /// Adds the content of a directory to what is still to be read.
    fn ahead_of(&mut self, path: &Path, whole: &Path) -> io::Result<()> {
        for entry in fs::read_dir(whole)? {
            let name = entry?.file_name();
            if path.as_os_str().is_empty() && self.is_another_state(&name) {
                continue;
            }
            self.ahead.push(path.join(name));
        }
        Ok(())
    }

    fn is_another_state(&self, name: &OsStr) -> bool {
        match &self.current {
            Some(current) => {
                name.as_bytes().starts_with(HIDDEN)
                    && name != CURRENT
                    && name != current.as_os_str()
            }
            None => false,
        }
    }

    fn failed(&self, path: &Path, source: io::Error) -> WalkError {
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                WalkError::Changed(self.root.clone())
            }
            _ if source.raw_os_error() == Some(libc::ELOOP) => {
                WalkError::Changed(self.root.clone())
            }
            _ => WalkError::Read {
                path: super::mountinfo::join(&self.root, path),
                source,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn volume() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir_all(root.join("..1/sub")).unwrap();
        fs::write(root.join("..1/key"), "value").unwrap();
        fs::set_permissions(root.join("..1/key"), fs::Permissions::from_mode(0o400)).unwrap();
        fs::write(root.join("..1/sub/deep"), "").unwrap();
        symlink("..1", root.join(CURRENT)).unwrap();
        symlink("..data/key", root.join("key")).unwrap();
        fs::create_dir(root.join("..2")).unwrap();
        fs::write(root.join("..2/half"), "written").unwrap();
        directory
    }

    fn all(walk: &mut Walk) -> Result<Vec<Record>, WalkError> {
        let mut records = Vec::new();
        loop {
            let batch = walk.next_batch()?;
            if batch.is_empty() {
                return Ok(records);
            }
            records.extend(batch);
        }
    }

    #[test]
    fn a_state_is_read_whole_parents_first_and_no_other() {
        let directory = volume();
        let records = all(&mut Walk::begin(directory.path()).unwrap()).unwrap();
        let mut seen = Vec::new();
        let mut content = Vec::new();
        for record in records {
            match record {
                Record::Entry(entry) => {
                    let parent = Path::new(&entry.path).parent();
                    let parent = parent.map(|parent| parent.to_str().unwrap().to_owned());
                    assert!(parent.is_none_or(|parent| seen.contains(&parent)));
                    if entry.path == "..1/key" {
                        assert_eq!(entry.ownership.unwrap().mode, 0o400);
                    }
                    seen.push(entry.path);
                }
                Record::Data(data) => content.push((seen.last().unwrap().clone(), data)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(content, [("..1/key".to_owned(), "value".into())]);
        seen.sort();
        assert_eq!(
            seen,
            [
                "",
                "..1",
                "..1/key",
                "..1/sub",
                "..1/sub/deep",
                "..data",
                "key"
            ]
        );
    }

    #[test]
    fn a_state_that_is_swapped_or_removed_meanwhile_is_none() {
        let directory = volume();
        let root = directory.path();
        let mut walk = Walk::begin(root).unwrap();
        fs::remove_file(root.join(CURRENT)).unwrap();
        symlink("..2", root.join(CURRENT)).unwrap();
        assert!(matches!(all(&mut walk), Err(WalkError::Changed(_))));
        let mut walk = Walk::begin(root).unwrap();
        fs::remove_dir_all(root).unwrap();
        assert!(matches!(all(&mut walk), Err(WalkError::Changed(_))));
        assert!(matches!(Walk::begin(root), Err(WalkError::Gone(_))));
    }

    #[test]
    fn large_files_come_in_chunks_and_batches_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("big");
        fs::write(&file, vec![7; 1 << 20]).unwrap();
        let mut walk = Walk::begin(&file).unwrap();
        let mut total = 0;
        loop {
            let batch = walk.next_batch().unwrap();
            if batch.is_empty() {
                break;
            }
            let sizes = batch.iter().map(|record| match record {
                Record::Data(data) => data.len(),
                _ => 0,
            });
            assert!(sizes.clone().all(|size| size <= 64 << 10));
            assert!(sizes.clone().sum::<usize>() <= BATCH_BYTES + (64 << 10));
            total += sizes.sum::<usize>();
        }
        assert_eq!(total, 1 << 20);
    }
}
