// SPDX-License-Identifier: Apache-2.0
//! What the layers of one pull may take: unpacked bytes, disk, and the time of a pull that nobody waits for any more.
//!
//! A layer's author chooses how much it unpacks to. A few KiB can become so much that the disk is full, or that a thread
//! works for days. [`Limits`] are shared by the layers of a pull, and asked at every step of their conversions.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::StatVfs;

use super::memory::Memory;
use crate::failure::FailureKind;

/// The most times its compressed size that a layer may unpack to. Programs and texts shrink to a half or a tenth, and a
/// layer of nothing but zeroes to a thousandth.
const MAX_RATIO: u64 = 200;
/// A layer may unpack to this, however small it is.
const RATIO_FLOOR_BYTES: u64 = 1 << 30;
/// On a small disk, this part of it stays free at most.
const KEPT_PART: u64 = 20;

/// Why a layer is refused, or its conversion ended.
#[derive(Debug, thiserror::Error)]
pub enum Excess {
    #[error("{compressed_bytes} bytes unpack to more than {most_bytes}")]
    Ratio {
        compressed_bytes: u64,
        most_bytes: u64,
    },
    #[error("the image's layers unpack to more than {0} bytes (images.max_image_gib)")]
    Image(u64),
    #[error("the image's missing layers unpack to more than the {0} bytes that are free")]
    Unfit(u64),
    #[error(
        "{free_bytes} bytes are free on the disk of images, and {kept_bytes} have to stay free \
         (images.keep_free_mib)"
    )]
    Disk { free_bytes: u64, kept_bytes: u64 },
    #[error("the pull was given up")]
    GivenUp,
}

impl Excess {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Ratio { .. } | Self::Image(_) => FailureKind::Invalid,
            Self::Unfit(_) | Self::Disk { .. } => FailureKind::NoSpace,
            Self::GivenUp => FailureKind::Internal,
        }
    }
}

impl From<Excess> for io::Error {
    fn from(excess: Excess) -> Self {
        Self::other(excess)
    }
}

/// The limits of one pull.
#[derive(Debug)]
pub struct Limits {
    max_image_bytes: u64,
    /// Of all layers together, also of those that were in the store before.
    image_bytes: AtomicU64,
    /// What may be unpacked: the disk's free bytes when the pull began. Zeroes count, too, though they become holes.
    free_bytes: u64,
    unpacked_bytes: AtomicU64,
    kept_bytes: u64,
    given_up: AtomicBool,
    pub memory: Arc<Memory>,
}

impl Limits {
    /// The limits of a pull to the disk at `root`.
    pub fn new(
        root: &Path,
        max_image_bytes: u64,
        kept_bytes: u64,
        memory: &Arc<Memory>,
    ) -> io::Result<Self> {
        let disk = rustix::fs::statvfs(root)?;
        let all_bytes = disk.f_blocks.saturating_mul(disk.f_frsize);
        Ok(Self {
            max_image_bytes,
            image_bytes: AtomicU64::new(0),
            free_bytes: free_bytes(&disk),
            unpacked_bytes: AtomicU64::new(0),
            kept_bytes: kept_bytes.min(all_bytes / KEPT_PART),
            given_up: AtomicBool::new(false),
            memory: Arc::clone(memory),
        })
    }

    /// Fails if the disk has no room for a download of `bytes`, even if they did not unpack to more.
    pub fn expect(&self, bytes: u64) -> Result<(), Excess> {
        if bytes.saturating_add(self.kept_bytes) > self.free_bytes {
            return Err(Excess::Disk {
                free_bytes: self.free_bytes,
                kept_bytes: self.kept_bytes.saturating_add(bytes),
            });
        }
        Ok(())
    }

    /// Counts a layer that is in the store already, or the hole of a sparse file.
    pub fn count_known(&self, bytes: u64) -> Result<(), Excess> {
        let before = self.image_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.max_image_bytes {
            return Err(Excess::Image(self.max_image_bytes));
        }
        Ok(())
    }

    fn count_unpacked(&self, bytes: u64) -> Result<(), Excess> {
        self.check_given_up()?;
        self.count_known(bytes)?;
        let before = self.unpacked_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.free_bytes {
            return Err(Excess::Unfit(self.free_bytes));
        }
        Ok(())
    }

    /// Fails if the file system of `file` has too few free bytes left. Others write there, too.
    pub fn check_disk(&self, file: &File) -> io::Result<()> {
        let free_bytes = free_bytes(&rustix::fs::fstatvfs(file)?);
        if free_bytes < self.kept_bytes {
            return Err(Excess::Disk {
                free_bytes,
                kept_bytes: self.kept_bytes,
            }
            .into());
        }
        Ok(())
    }

    /// Ends all conversions of the pull.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    pub fn check_given_up(&self) -> Result<(), Excess> {
        match self.given_up.load(Ordering::Relaxed) {
            true => Err(Excess::GivenUp),
            false => Ok(()),
        }
    }
}

fn free_bytes(disk: &StatVfs) -> u64 {
    disk.f_bavail.saturating_mul(disk.f_frsize)
}

/// A reader of unpacked bytes that fails as soon as there are too many.
pub struct Bounded<R> {
    inner: R,
    limits: Arc<Limits>,
    compressed_bytes: u64,
    unpacked_bytes: u64,
}

impl<R> Bounded<R> {
    pub fn new(inner: R, compressed_bytes: u64, limits: &Arc<Limits>) -> Self {
        Self {
            inner,
            limits: Arc::clone(limits),
            compressed_bytes,
            unpacked_bytes: 0,
        }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.limits.check_given_up()?;
        let count = self.inner.read(buffer)?;
        self.unpacked_bytes += count as u64;
        let most_bytes = self.compressed_bytes.saturating_mul(MAX_RATIO);
        let most_bytes = most_bytes.max(RATIO_FLOOR_BYTES);
        if self.unpacked_bytes > most_bytes {
            return Err(Excess::Ratio {
                compressed_bytes: self.compressed_bytes,
                most_bytes,
            }
            .into());
        }
        self.limits.count_unpacked(count as u64)?;
        Ok(count)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Limits that no test reaches by accident.
    pub fn wide() -> Limits {
        Limits {
            max_image_bytes: u64::MAX,
            image_bytes: AtomicU64::new(0),
            free_bytes: u64::MAX,
            unpacked_bytes: AtomicU64::new(0),
            kept_bytes: 0,
            given_up: AtomicBool::new(false),
            memory: Arc::default(),
        }
    }

    /// Reads zeroes until the limits say no. Returns how many bytes came before.
    fn fill(limits: Limits, compressed_bytes: u64) -> (u64, Excess) {
        let mut bounded = Bounded::new(io::repeat(0), compressed_bytes, &Arc::new(limits));
        let (mut total, mut buffer) = (0, vec![0; 1 << 20]);
        let error = loop {
            match bounded.read(&mut buffer) {
                Ok(count) => total += count as u64,
                Err(error) => break error,
            }
        };
        (total, error.downcast().unwrap())
    }

    #[test]
    fn a_layer_unpacks_to_a_multiple_of_its_size_and_no_further() {
        let (small, error) = fill(wide(), 100);
        assert_eq!(small, RATIO_FLOOR_BYTES);
        assert!(matches!(error, Excess::Ratio { .. }), "{error}");
        let (large, _) = fill(wide(), 6 * MIB);
        assert_eq!(large, 6 * MIB * MAX_RATIO);
    }

    #[test]
    fn an_image_unpacks_to_what_it_may_and_to_what_is_free() {
        let limits = wide();
        limits.count_known(MIB).unwrap();
        let limits = Limits {
            max_image_bytes: 5 * MIB,
            ..limits
        };
        let (total, error) = fill(limits, u64::MAX);
        assert_eq!(total, 4 * MIB);
        assert!(matches!(error, Excess::Image(_)), "{error}");
        let limits = Limits {
            free_bytes: 3 * MIB,
            ..wide()
        };
        let (total, error) = fill(limits, u64::MAX);
        assert_eq!(total, 3 * MIB);
        assert_eq!(error.kind(), FailureKind::NoSpace);
    }

    #[test]
    fn what_does_not_fit_the_disk_is_refused_before_and_while_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let limits = Limits::new(directory.path(), u64::MAX, 0, &Arc::default()).unwrap();
        limits.expect(MIB).unwrap();
        let error = limits.expect(u64::MAX).unwrap_err();
        assert_eq!(error.kind(), FailureKind::NoSpace);
        let file = File::create(directory.path().join("layer")).unwrap();
        limits.check_disk(&file).unwrap();
        let full = Limits {
            kept_bytes: u64::MAX,
            ..wide()
        };
        let error = full.check_disk(&file).unwrap_err();
        assert!(error.downcast::<Excess>().is_ok());
    }
}
