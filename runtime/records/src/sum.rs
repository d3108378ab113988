// SPDX-License-Identifier: Apache-2.0
//! Tells whether a file is as it was when it was made.
//!
//! A sum is a length and a digest of all blocks that are not zeroes, so it does not depend on where a file has holes.
//! A file is read again only if it was changed since it was last found intact, by what its file system says.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What is left out if it is all zeroes.
const BLOCK_BYTES: u64 = 4096;
const BUFFER_BLOCKS: u64 = 256;

/// What a file contained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    pub bytes: u64,
    /// A SHA-256 digest of the blocks and their numbers.
    blocks: [u8; 32],
}

impl Sum {
    /// Reads the whole file, but not its holes.
    pub fn of(file: &File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; usize::try_from(BUFFER_BLOCKS * BLOCK_BYTES).unwrap_or_default()];
        let mut at = 0;
        while at < bytes {
            let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                // Blocks are counted from the start of the file, wherever data begin.
                Ok(start) => (start - start % BLOCK_BYTES).max(at),
                // There is only a hole up to the end.
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(e.into()),
            };
            let hole = rustix::fs::seek(file, SeekFrom::Hole(start.max(at)))?;
            at = hole
                .next_multiple_of(BLOCK_BYTES)
                .max(start + BLOCK_BYTES)
                .min(bytes);
            add_range(file, start, at, &mut buffer, &mut hasher)?;
        }
        Ok(Self {
            bytes,
            blocks: hasher.finalize().into(),
        })
    }
}

fn add_range(
    file: &File,
    mut at: u64,
    end: u64,
    buffer: &mut [u8],
    hasher: &mut Sha256,
) -> io::Result<()> {
    while at < end {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        let part = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(part, at)?;
        for block in part.chunks(usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX)) {
            if block.iter().any(|byte| *byte != 0) {
                hasher.update(at.to_le_bytes());
                hasher.update(block);
            }
            at += block.len() as u64;
        }
    }
    Ok(())
}

/// Which file it is, and when it was changed last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    file: (u64, u64),
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// As the file is now.
    pub fn of(file: &File) -> io::Result<Self> {
        let of = file.metadata()?;
        Ok(Self {
            file: (of.dev(), of.ino()),
            bytes: of.len(),
            modified: (of.mtime(), of.mtime_nsec()),
            changed: (of.ctime(), of.ctime_nsec()),
        })
    }
}

/// Files that were found intact, and how they were then.
#[derive(Debug, Default)]
pub struct Intact(Mutex<HashMap<PathBuf, Stamp>>);

impl Intact {
    /// Whether the file has this sum. It is open at `path`.
    pub fn is(&self, path: &Path, file: &File, sum: &Sum) -> io::Result<bool> {
        // Before it is read, so that a change meanwhile is noticed next time.
        let stamp = Stamp::of(file)?;
        if stamp.bytes != sum.bytes {
            return Ok(false);
        }
        if self.known().get(path) == Some(&stamp) {
            return Ok(true);
        }
        let is_it = Sum::of(file)? == *sum;
        if is_it {
            self.known().insert(path.to_owned(), stamp);
        }
        Ok(is_it)
    }

    /// Takes the file at `path` as intact as it is now, because this process has just made or changed it.
    pub fn trust(&self, path: &Path) -> io::Result<()> {
        let stamp = Stamp::of(&File::open(path)?)?;
        self.known().insert(path.to_owned(), stamp);
        Ok(())
    }

    /// Forgets a file that was removed.
    pub fn forget(&self, path: &Path) {
        self.known().remove(path);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<PathBuf, Stamp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_depends_on_every_byte_and_the_length_and_not_on_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut bytes = vec![0; 3_000_001];
        bytes[4097] = 1;
        bytes[2_999_999] = 2;
        let sum_of = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Sum::of(&File::open(&path).unwrap()).unwrap()
        };
        let sum = sum_of(&bytes);
        let sparse = File::create(directory.path().join("sparse")).unwrap();
        sparse.set_len(3_000_001).unwrap();
        sparse.write_all_at(&[1], 4097).unwrap();
        sparse.write_all_at(&[2], 2_999_999).unwrap();
        let sparse = File::open(directory.path().join("sparse")).unwrap();
        assert_eq!(Sum::of(&sparse).unwrap(), sum);
        for at in [0, 4095, 4096, 8192, 2_999_998, 3_000_000] {
            let mut other = bytes.clone();
            other[at] ^= 4;
            assert_ne!(sum_of(&other), sum, "{at}");
        }
        assert_ne!(sum_of(&bytes[..3_000_000]), sum);
        let mut moved = vec![0; 3_000_001];
        moved[4097 + 4096] = 1;
        moved[2_999_999] = 2;
        assert_ne!(sum_of(&moved), sum);
        assert_ne!(sum_of(b""), sum);
    }

    #[test]
    fn a_stamp_tells_that_a_file_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["kernel", "vmm"].map(|name| directory.path().join(name));
        let stamps = || -> io::Result<Vec<_>> {
            let stamp = |path| Stamp::of(&File::open(path)?);
            paths.iter().map(stamp).collect()
        };
        assert!(stamps().is_err());
        for path in &paths {
            std::fs::write(path, "1").unwrap();
        }
        let before = stamps().unwrap();
        assert_eq!(stamps().unwrap(), before);
        std::fs::write(&paths[1], "12").unwrap();
        assert_ne!(stamps().unwrap(), before);
    }

    #[test]
    fn a_file_is_read_again_only_if_it_was_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"as it was").unwrap();
        let open = || File::open(&path).unwrap();
        let sum = Sum::of(&open()).unwrap();
        let intact = Intact::default();
        assert!(intact.is(&path, &open(), &sum).unwrap());
        let other = Sum {
            blocks: [0; 32],
            ..sum.clone()
        };
        assert!(intact.is(&path, &open(), &other).unwrap(), "not read again");
        // The clock of a file system may tick only a hundred times in a second.
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, b"as it waS").unwrap();
        assert!(!intact.is(&path, &open(), &sum).unwrap());
        std::fs::write(&path, b"as it was, and more").unwrap();
        assert!(!intact.is(&path, &open(), &sum).unwrap());
    }
}
