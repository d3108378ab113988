// SPDX-License-Identifier: Apache-2.0
//! What is behind the three disks: the window of read-only extents, a sparse scratch file, and the window of
//! volumes, which are block devices of the host or sparse files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::FallocateFlags;

use super::window::{Window, WindowError};
use crate::devices::chain::Buffers;
use crate::extent::{Extent, SECTOR_BYTES};
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
    /// Tells whether what was written may be lost until the next flush.
    const WRITE_CACHE: bool = Self::WRITABLE;

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
    let done = read_to_end(file, start, to)?;
    to.part(done, to.len()).fill_zero();
    Ok(())
}

/// Reads into `to` until that is full or `file` ends; returns how many bytes there were.
fn read_to_end(file: &File, start: u64, to: &Buffers<'_>) -> io::Result<usize> {
    let mut done = 0;
    while done < to.len() {
        let rest = to.part(done, to.len());
        let at = u64::try_from(done).ok().and_then(|d| start.checked_add(d));
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        match sys::read_at(file, rest.slices(), at) {
            Ok(0) => break,
            Ok(count) => done = done.saturating_add(count),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Writes all of `from` to `file`.
fn write_file(file: &File, start: u64, from: &Buffers<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < from.len() {
        let rest = from.part(done, from.len());
        let at = u64::try_from(done).ok().and_then(|d| start.checked_add(d));
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

/// Frees a range, which reads as zeroes from then on.
fn punch(file: &File, start: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, start, len)?)
}

/// The image disk. Read-only; extents may be added at any time.
#[derive(Debug, Default)]
pub struct ImageDisk {
    window: Window<File>,
}

impl ImageDisk {
    /// Adds a whole file.
    pub fn append(&mut self, file: File, bytes: u64) -> Result<Extent, WindowError> {
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
        write_file(self.file()?, range.start, from)
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
        punch(self.file()?, range.start, range.len)
    }
}

/// What a volume is on the host.
#[derive(Debug)]
pub enum Volume {
    /// A block device. It comes open for synchronous writes (O_DSYNC), so there is nothing to flush: an error is that of
    /// the request that caused it.
    Device(File),
    /// A sparse file, whose writes may stay in the host's cache until the next flush.
    File(File),
}

impl Volume {
    fn file(&self) -> &File {
        match self {
            Self::Device(file) | Self::File(file) => file,
        }
    }
}

/// The volume disk: block devices of the host, and files with a file system of the guest's.
#[derive(Debug, Default)]
pub struct VolumeDisk {
    window: Window<Volume>,
}

impl VolumeDisk {
    /// Adds a whole volume.
    pub fn append(&mut self, volume: Volume, bytes: u64) -> Result<Extent, WindowError> {
        let extent = self.window.append(volume, bytes)?;
        Ok(Extent {
            sectors: bytes / SECTOR_BYTES,
            ..extent
        })
    }

    /// Where a file is that may be one of the volumes, by any descriptor of it.
    pub fn find(&self, file: &File) -> io::Result<Option<Extent>> {
        let identity = |file: &File| file.metadata().map(|of| (of.dev(), of.ino()));
        let wanted = identity(file)?;
        Ok(self.window.find(|volume| match volume {
            Volume::File(file) => identity(file).is_ok_and(|found| found == wanted),
            Volume::Device(_) => false,
        }))
    }

    /// Closes the volume at `first_sector`.
    pub fn remove(&mut self, first_sector: u64) -> Option<Volume> {
        self.window.remove(first_sector)
    }

    /// Does something with each volume in the range; a range with a hole fails as a whole.
    fn each(
        &self,
        range: DiskRange,
        mut work: impl FnMut(&Volume, u64, DiskRange) -> io::Result<()>,
    ) -> io::Result<()> {
        let pieces = || self.window.pieces(range.start, range.len);
        let held = pieces().fold(0u64, |sum, piece| sum.saturating_add(piece.len));
        if held != range.len {
            return Err(io::ErrorKind::NotFound.into());
        }
        let mut start = 0u64;
        for piece in pieces() {
            let of_buffers = DiskRange {
                start,
                len: piece.len,
            };
            work(piece.file, piece.offset, of_buffers)?;
            start = start.saturating_add(piece.len);
        }
        Ok(())
    }
}

/// The part of the buffers that a piece is about.
fn part<'b>(buffers: &Buffers<'b>, of: DiskRange) -> io::Result<Buffers<'b>> {
    let number = |value: u64| usize::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    Ok(buffers.part(number(of.start)?, number(of.len)?))
}

impl Disk for VolumeDisk {
    const WRITABLE: bool = true;

    fn sectors(&self) -> u64 {
        self.window.len() / SECTOR_BYTES
    }

    fn read(&self, range: DiskRange, to: &Buffers<'_>) -> io::Result<()> {
        self.each(range, |volume, at, of| {
            let to = part(to, of)?;
            // A device that vanished or shrank has an end, and no zeroes there.
            match read_to_end(volume.file(), at, &to)? {
                done if done == to.len() => Ok(()),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        })
    }

    fn write(&self, range: DiskRange, from: &Buffers<'_>) -> io::Result<()> {
        self.each(range, |volume, at, of| {
            write_file(volume.file(), at, &part(from, of)?)
        })
    }

    /// All files, since nothing says which one it is about. The first error is told, after all were
    /// tried.
    fn flush(&self) -> io::Result<()> {
        let files = self.window.files().filter_map(|volume| match volume {
            Volume::File(file) => Some(file),
            Volume::Device(_) => None,
        });
        let mut done = Ok(());
        for file in files {
            done = done.and(file.sync_data());
        }
        done
    }

    fn discard(&self, range: DiskRange) -> io::Result<()> {
        self.each(range, |volume, at, of| {
            punch(volume.file(), at, of.len)?;
            match volume {
                Volume::Device(device) => device.sync_data(),
                Volume::File(_) => Ok(()),
            }
        })
    }
}
