// SPDX-License-Identifier: Apache-2.0
//! What backs the three disks: a window of read-only extents, a sparse scratch file, and a window of
//! volumes, which are block devices of the host or sparse files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use rustix::fs::FallocateFlags;

use super::shared::{Part, SharedWindow};
use super::window::WindowError;
use crate::devices::chain::Buffers;
use crate::devices::ring::Interrupt;
use crate::extent::{Extent, SECTOR_BYTES};
use crate::sparse::{Copier, CopyError};
use crate::sys;

/// A byte range that is known to lie inside a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRange {
    pub start: u64,
    pub len: u64,
}

/// The host side of a disk. Callers pass only ranges within [`Disk::sectors`].
pub trait Disk: Send {
    /// Whether `write` and `discard` work.
    const WRITABLE: bool;
    /// Whether written data may be lost until the next flush.
    const WRITE_CACHE: bool = Self::WRITABLE;

    fn sectors(&self) -> u64;
    /// Sets the driver that is told when [`Disk::sectors`] changes. Most disks never change.
    fn set_driver(&self, _driver: Option<Arc<Interrupt>>) {}
    /// Fills `to`, which is as long as the range.
    fn read(&self, range: DiskRange, to: &Buffers<'_>) -> io::Result<()>;
    fn write(&self, _range: DiskRange, _from: &Buffers<'_>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    /// Frees the range. It reads as zeroes from then on.
    fn discard(&self, _range: DiskRange) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

/// Fills `to` from `file`, with zeroes after the end of the file.
fn read_file(file: &File, start: u64, to: &Buffers<'_>) -> io::Result<()> {
    let done = read_to_end(file, start, to)?;
    to.part(done, to.len()).fill_zero();
    Ok(())
}

/// Reads into `to` until it is full or `file` ends. Returns how many bytes were read.
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

/// Frees a range. It reads as zeroes from then on.
fn punch(file: &File, start: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, start, len)?)
}

/// The image disk. Read-only. Extents can be added at any time. A clone is the same disk.
#[derive(Clone, Debug, Default)]
pub struct ImageDisk {
    window: SharedWindow<File>,
}

impl ImageDisk {
    /// Adds a whole file at the end and tells the driver.
    pub fn append(&self, file: File, bytes: u64) -> Result<Extent, WindowError> {
        self.window.append(file, bytes)
    }
}

impl Disk for ImageDisk {
    const WRITABLE: bool = false;

    fn sectors(&self) -> u64 {
        self.window.sectors()
    }

    fn set_driver(&self, driver: Option<Arc<Interrupt>>) {
        self.window.set_driver(driver);
    }

    fn read(&self, range: DiskRange, to: &Buffers<'_>) -> io::Result<()> {
        for of in self.window.parts(range.start, range.len) {
            read_file(&of.file, of.offset, &part(to, &of)?)?;
        }
        Ok(())
    }
}

/// The scratch disk. Without a file it has no sectors. A clone is the same disk.
#[derive(Clone, Debug)]
pub struct ScratchDisk {
    file: Option<Arc<File>>,
    bytes: u64,
}

impl ScratchDisk {
    #[must_use]
    pub fn new(file: Option<File>, bytes: u64) -> Self {
        let file = file.map(Arc::new);
        Self { file, bytes }
    }

    /// Copies all of the disk. Call it while the disk has no requests.
    pub fn save(&self, copier: &mut Copier<'_>) -> Result<(), CopyError> {
        match &self.file {
            Some(file) => copier.file(file, self.bytes),
            None => Ok(()),
        }
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn file(&self) -> io::Result<&File> {
        Ok(self.file.as_deref().ok_or(io::ErrorKind::NotFound)?)
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
    /// A block device. It is open for synchronous writes (O_DSYNC), so there is nothing to flush, and
    /// an error is reported for the very request that caused it.
    Device(File),
    /// A sparse file. Its writes may stay in the host's page cache until the next flush.
    File(File),
}

impl Volume {
    fn file(&self) -> &File {
        match self {
            Self::Device(file) | Self::File(file) => file,
        }
    }
}

/// A volume on the volume disk.
#[derive(Debug)]
pub struct Held {
    volume: Volume,
    /// Device and inode of a file. Read once, because a file system that hangs may not answer later.
    identity: Option<(u64, u64)>,
}

/// The volume disk: block devices of the host, and files that hold a file system of the guest. A clone is the same disk.
#[derive(Clone, Debug, Default)]
pub struct VolumeDisk {
    window: SharedWindow<Held>,
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl VolumeDisk {
    /// Adds a whole volume at the end and tells the driver.
    pub fn append(&self, volume: Volume, bytes: u64) -> Result<Extent, WindowError> {
        let identity = match &volume {
            Volume::File(file) => identity(file).ok(),
            Volume::Device(_) => None,
        };
        let extent = self.window.append(Held { volume, identity }, bytes)?;
        Ok(Extent {
            sectors: bytes / SECTOR_BYTES,
            ..extent
        })
    }

    /// Whether there is a volume.
    #[must_use]
    pub fn has_volumes(&self) -> bool {
        self.window.find(|_| true).is_some()
    }

    /// The extent of `file`, if it is one of the volumes. Files are compared by device and inode, so
    /// any descriptor will do.
    pub fn find(&self, file: &File) -> io::Result<Option<Extent>> {
        let wanted = identity(file)?;
        Ok(self.window.find(|held| held.identity == Some(wanted)))
    }

    /// Takes out the volume at `first_sector`, if there is one, and tells the driver. Who drops it last closes it: the
    /// caller, or the worker if a request has not ended yet.
    pub fn remove(&self, first_sector: u64) -> Option<Arc<Held>> {
        self.window.remove(first_sector)
    }

    /// Calls `work` for each volume in the range. If a part of the range has no volume, it calls nothing
    /// and fails.
    fn each(
        &self,
        range: DiskRange,
        work: impl Fn(&Volume, &Part<Held>) -> io::Result<()>,
    ) -> io::Result<()> {
        let parts = self.window.parts(range.start, range.len);
        let lens = parts.iter().map(|part| part.len);
        if lens.fold(0, u64::saturating_add) != range.len {
            return Err(io::ErrorKind::NotFound.into());
        }
        parts
            .iter()
            .try_for_each(|part| work(&part.file.volume, part))
    }
}

/// The part of `buffers` that belongs to one part of a request.
fn part<'b, F>(buffers: &Buffers<'b>, of: &Part<F>) -> io::Result<Buffers<'b>> {
    let number = |value: u64| usize::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    Ok(buffers.part(number(of.start)?, number(of.len)?))
}

impl Disk for VolumeDisk {
    const WRITABLE: bool = true;

    fn sectors(&self) -> u64 {
        self.window.sectors()
    }

    fn set_driver(&self, driver: Option<Arc<Interrupt>>) {
        self.window.set_driver(driver);
    }

    fn read(&self, range: DiskRange, to: &Buffers<'_>) -> io::Result<()> {
        self.each(range, |volume, of| {
            let to = part(to, of)?;
            // A device that vanished or shrank ends early. Zeroes would pass for data, so this is an error.
            match read_to_end(volume.file(), of.offset, &to)? {
                done if done == to.len() => Ok(()),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        })
    }

    fn write(&self, range: DiskRange, from: &Buffers<'_>) -> io::Result<()> {
        self.each(range, |volume, of| {
            write_file(volume.file(), of.offset, &part(from, of)?)
        })
    }

    /// Syncs all files, because a flush request does not say which one it means. Tries all, then returns
    /// the first error.
    fn flush(&self) -> io::Result<()> {
        let mut done = Ok(());
        for held in self.window.files().iter().filter_map(Weak::upgrade) {
            if let Volume::File(file) = &held.volume {
                done = done.and(file.sync_data());
            }
        }
        done
    }

    fn discard(&self, range: DiskRange) -> io::Result<()> {
        self.each(range, |volume, of| {
            punch(volume.file(), of.offset, of.len)?;
            match volume {
                Volume::Device(device) => device.sync_data(),
                Volume::File(_) => Ok(()),
            }
        })
    }
}
