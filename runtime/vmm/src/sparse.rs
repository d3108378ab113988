// SPDX-License-Identifier: Apache-2.0
//! Sparse files: which parts of a file have data, and copies that have neither holes nor pages of zeroes. Used for guest
//! memory and for disks, on the main thread.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// What is read at once. Between two such steps the time limit is checked.
const CHUNK_BYTES: usize = 1 << 20;
/// What is left out if it is zero.
const PAGE_BYTES: usize = 4096;
const ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Why a copy is not complete.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("look for data")]
    Find(#[source] io::Error),
    #[error("read {len} bytes at {at:#x}")]
    Read {
        at: u64,
        len: usize,
        source: io::Error,
    },
    #[error("write {len} bytes at {at:#x}")]
    Write {
        at: u64,
        len: usize,
        source: io::Error,
    },
    #[error("the time limit has passed, after {written} bytes were written")]
    Late { written: u64 },
}

/// The first part of a range of a file that has data. `None` if the rest is a hole.
pub fn next_data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(start) if start < range.end => start,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        // A block device does not know of holes.
        Err(Errno::INVAL) => return Ok(Some(range)),
        Err(e) => return Err(e.into()),
    };
    let hole = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    match hole > start {
        true => Ok(Some(start..hole.min(range.end))),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Copies into a file that reads as zeroes.
#[derive(Debug)]
pub struct Copier<'f> {
    to: &'f File,
    /// `None`: whoever waits for it ends the process.
    until: Option<Instant>,
    buffer: Vec<u8>,
    written: u64,
}

impl<'f> Copier<'f> {
    #[must_use]
    pub fn new(to: &'f File, until: Option<Instant>) -> Self {
        Self {
            to,
            until,
            buffer: vec![0; CHUNK_BYTES],
            written: 0,
        }
    }

    /// How many bytes were written, without those that were left out.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Copies the first `bytes` of a file to the same place.
    pub fn file(&mut self, from: &File, bytes: u64) -> Result<(), CopyError> {
        let mut at = 0;
        while let Some(data) = next_data(from, at..bytes).map_err(CopyError::Find)? {
            at = data.end;
            self.part(data, 0, |buffer, at| from.read_exact_at(buffer, at))?;
        }
        Ok(())
    }

    /// Copies a part of something that `read` reads from, to a place that is `shift` bytes behind it.
    pub fn part(
        &mut self,
        range: Range<u64>,
        shift: u64,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<(), CopyError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut at = range.start;
        let done = loop {
            let left = usize::try_from(range.end.saturating_sub(at)).unwrap_or(usize::MAX);
            let len = left.min(buffer.len());
            let Some(chunk) = buffer.get_mut(..len).filter(|chunk| !chunk.is_empty()) else {
                break Ok(());
            };
            if self.until.is_some_and(|until| Instant::now() >= until) {
                let written = self.written;
                break Err(CopyError::Late { written });
            }
            let got = read(chunk, at).map_err(|source| CopyError::Read { at, len, source });
            if let Err(e) = got.and_then(|()| self.put(chunk, at.saturating_add(shift))) {
                break Err(e);
            }
            at = at.saturating_add(len as u64);
        };
        self.buffer = buffer;
        done
    }

    /// Writes what is not zero.
    fn put(&mut self, chunk: &[u8], at: u64) -> Result<(), CopyError> {
        let is_zero = |page: &[u8]| ZEROES.get(..page.len()) == Some(page);
        let (mut rest, mut at) = (chunk, at);
        while !rest.is_empty() {
            let wanted = is_zero(rest.get(..PAGE_BYTES).unwrap_or(rest));
            // Neighbours of the same kind are written, or left out, together.
            let alike = rest.chunks(PAGE_BYTES);
            let alike = alike.take_while(|page| is_zero(page) == wanted);
            let (run, behind) = rest.split_at(alike.map(<[u8]>::len).sum());
            let len = run.len();
            if !wanted {
                let wrote = self.to.write_all_at(run, at);
                wrote.map_err(|source| CopyError::Write { at, len, source })?;
                self.written = self.written.saturating_add(len as u64);
            }
            at = at.saturating_add(len as u64);
            rest = behind;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    /// A file of so many pages, with these bytes at the beginning of these pages.
    fn file(pages: u64, content: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE).unwrap();
        for (page, bytes) in content {
            file.write_all_at(bytes, page * PAGE).unwrap();
        }
        file
    }

    fn bytes_of(file: &File) -> Vec<u8> {
        let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn blocks(file: &File) -> u64 {
        file.metadata().unwrap().blocks()
    }

    #[test]
    fn a_copy_has_the_same_bytes_and_neither_holes_nor_pages_of_zeroes() {
        let many = vec![7; 3 * CHUNK_BYTES + 5];
        let zeroes = vec![0; 2 * CHUNK_BYTES];
        let from = file(
            5000,
            &[
                (0, b"first"),
                (3, &zeroes),
                (1000, &many),
                (3000, &zeroes),
                (3001, b"in zeroes"),
                (4999, b"last"),
            ],
        );
        let to = file(5000, &[]);
        let mut copier = Copier::new(&to, None);
        copier.file(&from, 5000 * PAGE).unwrap();
        assert_eq!(bytes_of(&to), bytes_of(&from));
        let pages = 3 + 3 * (CHUNK_BYTES / PAGE_BYTES) + 1;
        assert_eq!(copier.written(), pages as u64 * PAGE);
        assert!(blocks(&to) < blocks(&from), "zeroes take no space");
        let before = blocks(&from);
        assert_eq!(next_data(&from, 1..2).unwrap(), Some(1..2));
        assert_eq!(blocks(&from), before, "holes stay holes");
    }

    #[test]
    fn what_ends_within_a_page_is_copied_to_its_end() {
        let from = file(0, &[(0, &[1; 5000])]);
        let to = file(0, &[]);
        to.set_len(5000).unwrap();
        let mut copier = Copier::new(&to, None);
        copier.file(&from, 5000).unwrap();
        assert_eq!(bytes_of(&to), [1; 5000]);
        assert_eq!(copier.written(), 5000);
        let missing = copier.part(0..1, 0, |_, _| Err(io::ErrorKind::NotFound.into()));
        assert!(matches!(missing, Err(CopyError::Read { .. })));
    }

    #[test]
    fn a_copy_ends_when_its_time_is_up() {
        let from = file(4, &[(2, b"x")]);
        let to = file(4, &[]);
        let passed = Instant::now().checked_sub(Duration::from_millis(1));
        let mut copier = Copier::new(&to, passed);
        let late = copier.file(&from, 4 * PAGE).unwrap_err();
        assert!(matches!(late, CopyError::Late { written: 0 }), "{late}");
        let mut copier = Copier::new(&to, Some(Instant::now() + Duration::from_secs(60)));
        copier.file(&from, 4 * PAGE).unwrap();
        assert_eq!(bytes_of(&to), bytes_of(&from));
    }
}
