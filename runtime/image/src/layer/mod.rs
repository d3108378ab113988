// SPDX-License-Identifier: Apache-2.0
//! Converts one layer from the bytes of a registry to an EROFS file, in one pass on one blocking thread.
//!
//! ```text
//! compressed bytes ─> sha256 ─> gzip | zstd | plain ─> sha256 ─> tar entries ─> tree + file data ─> EROFS
//!                     digest                           diff id
//! ```
//! File data are written as they arrive. Names and attributes stay in memory ([`tree`]) until the end and are then
//! written after the data ([`erofs`]). A layer's author chooses how much all of that is, so it has [`limits`], and what
//! stays in [`memory`] has its own.

mod blocks;
mod erofs;
mod limits;
mod memory;
mod node;
mod path;
mod tarball;
mod tree;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use crate::digest::{Digest, HashingReader};
use crate::failure::FailureKind;
use blocks::BlockWriter;
use limits::Bounded;
pub use limits::{Excess, Limits};
pub use memory::Memory;
use memory::Share;
use tarball::TarError;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The largest window of a zstd frame, 128 MiB. The window is in our memory, so larger ones are refused.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// The most bytes that a layer may have as the registry sends it. [`limits`] says what it may unpack to.
pub const MAX_LAYER_BYTES: u64 = 128 << 30;
const BUFFER_BYTES: usize = 64 << 10;

/// What the image says about one of its layers.
#[derive(Clone, Debug)]
pub struct Promise {
    /// The digest and the size of the bytes that the registry sends.
    pub digest: Digest,
    pub bytes: u64,
    /// The digest of the unpacked tar archive.
    pub diff_id: Digest,
}

/// Why a layer was not converted.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("read the layer's tar archive")]
    Tar(#[source] TarError),
    #[error("read the layer to its end")]
    Read(#[source] io::Error),
    #[error("write the layer's file")]
    Write(#[source] io::Error),
    #[error("unpack the layer")]
    Excess(#[from] Excess),
    #[error("the layer's bytes have digest {found}, expected {promised}")]
    Digest { promised: Digest, found: Digest },
    #[error(
        "the unpacked layer has digest {found}, not {promised} as the image's configuration says"
    )]
    DiffId { promised: Digest, found: Digest },
}

impl From<TarError> for LayerError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Write(error) => Self::of_write(error),
            TarError::Read(error) => Self::of_read(error),
            error => Self::Tar(error),
        }
    }
}

impl LayerError {
    fn of_read(error: io::Error) -> Self {
        error.downcast().map_or_else(Self::Read, Self::Excess)
    }

    fn of_write(error: io::Error) -> Self {
        error.downcast().map_or_else(Self::Write, Self::Excess)
    }

    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Tar(error) => error.kind(),
            Self::Write(error) => FailureKind::of_io(error),
            Self::Excess(excess) => excess.kind(),
            Self::Read(_) | Self::Digest { .. } | Self::DiffId { .. } => FailureKind::Corrupt,
        }
    }

    /// Whether other bytes came than the image's own, or too many. Another host may have the right ones.
    pub fn is_of_bytes(&self) -> bool {
        matches!(
            self,
            Self::Digest { .. } | Self::Excess(Excess::Ratio { .. } | Excess::Image(_))
        )
    }
}

/// Converts `compressed` into an EROFS file system in `file` and verifies both digests. After an error the content of
/// the file is useless. The result depends only on the tar archive: the same layer gives the same bytes.
pub fn convert(
    compressed: impl Read,
    file: File,
    promise: &Promise,
    limits: &Arc<Limits>,
) -> Result<(), LayerError> {
    let mut blocks = BlockWriter::new(file, Arc::clone(limits));
    check(compressed, promise, limits, |mut plain| {
        let tree = tarball::read(&mut plain, &mut blocks, Share::new(&limits.memory))?;
        erofs::write(&tree, &mut blocks).map_err(LayerError::of_write)
    })?;
    blocks.finish().map_err(LayerError::of_write)
}

/// Verifies both digests of `compressed`, and writes nothing.
pub fn verify(
    compressed: impl Read,
    promise: &Promise,
    limits: &Arc<Limits>,
) -> Result<(), LayerError> {
    check(compressed, promise, limits, |_| Ok(()))
}

/// Lets `work` read the unpacked layer, reads the rest, and verifies both digests.
fn check(
    compressed: impl Read,
    promise: &Promise,
    limits: &Arc<Limits>,
    work: impl FnOnce(&mut dyn Read) -> Result<(), LayerError>,
) -> Result<(), LayerError> {
    let mut compressed = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(compressed));
    let unpacked = match unpack(&mut compressed, promise.bytes, limits, work) {
        Err(error @ (LayerError::Write(_) | LayerError::Excess(_))) => return Err(error),
        unpacked => unpacked,
    };
    // Check the digest first: a wrong one explains a broken archive better than the archive's own error.
    let (found, _) = compressed.into_inner().finish().map_err(LayerError::Read)?;
    if found != promise.digest {
        return Err(LayerError::Digest {
            promised: promise.digest.clone(),
            found,
        });
    }
    let unpacked = unpacked?;
    if unpacked != promise.diff_id {
        return Err(LayerError::DiffId {
            promised: promise.diff_id.clone(),
            found: unpacked,
        });
    }
    Ok(())
}

/// Lets `work` read the unpacked archive. Returns the archive's digest.
fn unpack(
    compressed: &mut impl BufRead,
    compressed_bytes: u64,
    limits: &Arc<Limits>,
    work: impl FnOnce(&mut dyn Read) -> Result<(), LayerError>,
) -> Result<Digest, LayerError> {
    let plain = decompressed(compressed).map_err(LayerError::Read)?;
    let plain = Bounded::new(plain, compressed_bytes, limits);
    let mut plain = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(plain));
    work(&mut plain)?;
    let (digest, _) = plain.into_inner().finish().map_err(LayerError::of_read)?;
    Ok(digest)
}

/// Detects the compression by the first bytes, because media types are sometimes wrong. They may come one by one.
fn decompressed<'a>(mut compressed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::with_capacity(ZSTD_MAGIC.len());
    let mut first = compressed.by_ref().take(ZSTD_MAGIC.len() as u64);
    first.read_to_end(&mut start)?;
    let (is_gzip, is_zstd) = (start.starts_with(&GZIP_MAGIC), start == ZSTD_MAGIC);
    let compressed = io::Cursor::new(start).chain(compressed);
    if is_gzip {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(compressed)));
    }
    if is_zstd {
        let mut decoder = zstd::Decoder::with_buffer(compressed)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(compressed))
}

#[cfg(test)]
mod tests;
