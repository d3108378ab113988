// SPDX-License-Identifier: Apache-2.0
//! What is behind the two disks: the window of read-only extents, and a sparse scratch file.

use std::fs::File;
use std::io;

use rustix::fs::FallocateFlags;

use super::SECTOR_BYTES;
use super::window::{Placed, Window, WindowError};
use crate::devices::chain::Buffers;
use crate::sys;

/// Bytes of a disk that are known to lie inside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRange {
    pub start: u64,
    pub len: u64,
}

/// The host side of a disk. Callers pass ranges inside [`Disk::sectors`].
pub trait Disk: Send {
    /// Tells which of the requests that change something exist.
    const WRITABLE: bool;

    fn sectors(&self) -> u64;
    /// Fills `to`, which is as long as the range.
    fn read(&self, range: DiskRange, to: &Buffers<'_>) -> io::Result<()>;
    fn write(&self, _range: DiskRange, _from: &Buffers<'_>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    /// Frees the range, which reads as zeroes from then on.
    fn discard(&self, _range: DiskRange) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

/// Reads all of `to` from `file`; zeroes where the file ends early.
fn read_file(file: &File, start: u64, to: &Buffers<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < to.len() {
        let rest = to.part(done, to.len());
        let at = u64::try_from(done).ok().and_then(|d| start.checked_add(d));
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        match sys::read_at(file, rest.slices(), at) {
            Ok(0) => {
                rest.fill_zero();
                return Ok(());
            }
            Ok(count) => done = done.saturating_add(count),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The image disk. Read-only; extents may be added at any time.
#[derive(Debug, Default)]
pub struct ImageDisk {
    window: Window<File>,
}

impl ImageDisk {
    /// Adds a whole file.
    pub fn append(&mut self, file: File, bytes: u64) -> Result<Placed, WindowError> {
        self.window.append(file, bytes)
    }
}

impl Disk for ImageDisk {
    const WRITABLE: bool = false;

    fn sectors(&self) -> u64 {
        self.window.len() / SECTOR_BYTES
    }

    fn read(&self, range: DiskRange, to: &Buffers<'_>) -> io::Result<()> {
        let mut done = 0;
        for piece in self.window.pieces(range.start, range.len) {
            let len = usize::try_from(piece.len).map_err(|_| io::ErrorKind::InvalidInput)?;
            read_file(piece.file, piece.offset, &to.part(done, len))?;
            done = done.saturating_add(len);
        }
        Ok(())
    }
}

/// The scratch disk, or a disk without sectors.
#[derive(Debug)]
pub struct ScratchDisk {
    file: Option<File>,
    bytes: u64,
}

impl ScratchDisk {
    #[must_use]
    pub fn new(file: Option<File>, bytes: u64) -> Self {
        Self { file, bytes }
    }

    fn file(&self) -> io::Result<&File> {
        Ok(self.file.as_ref().ok_or(io::ErrorKind::NotFound)?)
    }
}

impl Disk for ScratchDisk {
    const WRITABLE: bool = true;

    fn sectors(&self) -> u64 {
        self.bytes / SECTOR_BYTES
    }

    fn read(&self, range: DiskRange, to: &Buffers<'_>) -> io::Result<()> {
        read_file(self.file()?, range.start, to)
    }

    fn write(&self, range: DiskRange, from: &Buffers<'_>) -> io::Result<()> {
        let file = self.file()?;
        let mut done = 0;
        while done < from.len() {
            let rest = from.part(done, from.len());
            let at = u64::try_from(done)
                .ok()
                .and_then(|d| range.start.checked_add(d));
            let at = at.ok_or(io::ErrorKind::InvalidInput)?;
            match sys::write_at(file, rest.slices(), at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done = done.saturating_add(count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        match &self.file {
            Some(file) => file.sync_data(),
            None => Ok(()),
        }
    }

    fn discard(&self, range: DiskRange) -> io::Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(
            self.file()?,
            flags,
            range.start,
            range.len,
        )?)
    }
}
