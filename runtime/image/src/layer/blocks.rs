// SPDX-License-Identifier: Apache-2.0
//! Writes a file block by block, each block once and in order, except the first one.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::limits::Limits;

/// The block size that we use in EROFS: the page size of x86, so every kernel there can mount it.
pub const BLOCK_BYTES: usize = 4096;
const BUFFER_BLOCKS: usize = 64;
/// After this many written bytes the free space of the disk is looked at.
const DISK_CHECK_BYTES: usize = 64 << 20;

/// Collects blocks. Writes those that are not all zeroes; the others become holes.
#[derive(Debug)]
pub struct BlockWriter {
    file: File,
    /// Always of full length, because clearing it for each small file would take longer than everything else.
    buffer: Vec<u8>,
    filled: usize,
    /// The number of the block at which the buffer will be written.
    buffer_block: u32,
    limits: Arc<Limits>,
    /// How many bytes were written since the last look at the disk.
    unchecked_bytes: usize,
}

impl BlockWriter {
    /// Leaves the first block free for [`Self::set_first`].
    pub fn new(file: File, limits: Arc<Limits>) -> Self {
        Self {
            file,
            limits,
            // The first write looks.
            unchecked_bytes: DISK_CHECK_BYTES,
            buffer: vec![0; BUFFER_BLOCKS * BLOCK_BYTES],
            filled: 0,
            buffer_block: 1,
        }
    }

    /// The number of the block in which the next data begin. Call it only at the beginning of a block.
    pub fn next_block(&self) -> io::Result<u32> {
        let buffered = u32::try_from(self.filled / BLOCK_BYTES).map_err(io::Error::other)?;
        self.buffer_block
            .checked_add(buffered)
            .ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = self.room()?;
            let (now, later) = bytes.split_at(room.len().min(bytes.len()));
            let place = room.get_mut(..now.len()).unwrap_or_default();
            place.copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
        }
        Ok(())
    }

    /// Copies `source` to its end directly into the buffer. Returns the number of bytes.
    pub fn copy(&mut self, source: &mut impl Read) -> Result<u64, CopyError> {
        let mut total = 0;
        loop {
            let room = self.room().map_err(CopyError::Write)?;
            match source.read(room) {
                Ok(0) => return Ok(total),
                Ok(count) => {
                    self.filled += count;
                    total += count as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(CopyError::Read(e)),
            }
        }
    }

    /// The free part of the buffer, which is never empty.
    fn room(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        Ok(self.buffer.get_mut(self.filled..).unwrap_or_default())
    }

    /// Fills the rest of an unfinished block with zeroes.
    pub fn pad(&mut self) {
        let padded = self.filled.next_multiple_of(BLOCK_BYTES);
        let rest = self.buffer.get_mut(self.filled..padded);
        rest.unwrap_or_default().fill(0);
        self.filled = padded;
    }

    /// Appends zeroes. Whole blocks of them are not written, but they count as a part of the image.
    pub fn hole(&mut self, bytes: u64) -> io::Result<()> {
        self.limits.count_known(bytes)?;
        const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
        let block = BLOCK_BYTES as u64;
        let zeroes = |count: u64| -> &[u8] {
            let count = usize::try_from(count).unwrap_or(BLOCK_BYTES);
            ZEROES.get(..count).unwrap_or_default()
        };
        let before = (self.filled.next_multiple_of(BLOCK_BYTES) - self.filled) as u64;
        let before = before.min(bytes);
        self.write(zeroes(before))?;
        let rest = bytes - before;
        if rest >= block {
            self.flush()?;
            let whole = u32::try_from(rest / block).ok();
            let next = whole.and_then(|whole| self.buffer_block.checked_add(whole));
            self.buffer_block = next.ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        }
        self.write(zeroes(rest % block))
    }

    /// Writes the block that was left free.
    pub fn set_first(&self, block: &[u8; BLOCK_BYTES]) -> io::Result<()> {
        self.file.write_all_at(block, 0)
    }

    /// Writes the rest. All data are on disk when this returns.
    pub fn finish(mut self) -> io::Result<()> {
        self.pad();
        self.flush()?;
        self.file
            .set_len(u64::from(self.buffer_block) * BLOCK_BYTES as u64)?;
        self.file.sync_all()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.limits.check_given_up()?;
        if self.unchecked_bytes >= DISK_CHECK_BYTES {
            self.limits.check_disk(&self.file)?;
            self.unchecked_bytes = 0;
        }
        let next = self.next_block()?;
        let mut offset = u64::from(self.buffer_block) * BLOCK_BYTES as u64;
        let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let filled = self.buffer.get(..self.filled).unwrap_or_default();
        let blocks: Vec<&[u8]> = filled.chunks(BLOCK_BYTES).collect();
        for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let bytes = run.len() * BLOCK_BYTES;
            if run.first().is_some_and(|block| !is_zero(block)) {
                let from =
                    usize::try_from(offset - u64::from(self.buffer_block) * BLOCK_BYTES as u64)
                        .map_err(io::Error::other)?;
                let data = filled.get(from..from + bytes).unwrap_or_default();
                self.file.write_all_at(data, offset)?;
                self.unchecked_bytes += bytes;
            }
            offset += bytes as u64;
        }
        self.filled = 0;
        self.buffer_block = next;
        Ok(())
    }
}

/// Which side of a copy failed.
#[derive(Debug)]
pub enum CopyError {
    Read(io::Error),
    Write(io::Error),
}
