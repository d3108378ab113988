// SPDX-License-Identifier: Apache-2.0
//! Converts one layer from the bytes of a registry to an EROFS file, in one pass on one blocking thread.
//!
//! ```text
//! compressed bytes ─> sha256 ─> gzip | zstd | plain ─> sha256 ─> tar entries ─> tree + file data ─> EROFS
//!                     digest                           diff id
//! ```
//! File data are written as they arrive. Names and attributes stay in memory ([`tree`]) until the end and are then
//! written after the data ([`erofs`]).

mod blocks;
mod erofs;
mod node;
mod path;
mod tarball;
mod tree;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use crate::digest::{Digest, HashingReader};
use crate::failure::FailureKind;
use blocks::BlockWriter;
use tarball::TarError;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The largest window of a zstd frame, 128 MiB. The window is in our memory, so larger ones are refused.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// The most bytes that a layer may have, compressed or not. A few bytes can unpack to days of work.
pub const MAX_LAYER_BYTES: u64 = 128 << 30;
const BUFFER_BYTES: usize = 64 << 10;

/// Why a layer was not converted.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("read the layer's tar archive")]
    Tar(#[source] TarError),
    #[error("read the layer to its end")]
    Read(#[source] io::Error),
    #[error("write the layer's file")]
    Write(#[source] io::Error),
    #[error("the layer unpacks to more than {MAX_LAYER_BYTES} bytes")]
    Bomb,
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
            TarError::Write(error) => Self::Write(error),
            TarError::Read(error) => Self::of_read(error),
            error => Self::Tar(error),
        }
    }
}

impl LayerError {
    fn of_read(error: io::Error) -> Self {
        match error.kind() {
            // Only [`Bounded`] returns this error on reads.
            io::ErrorKind::FileTooLarge => Self::Bomb,
            _ => Self::Read(error),
        }
    }

    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Tar(error) => error.kind(),
            Self::Write(error) => FailureKind::of_io(error),
            Self::Bomb => FailureKind::Invalid,
            Self::Read(_) | Self::Digest { .. } | Self::DiffId { .. } => FailureKind::Corrupt,
        }
    }
}

/// Converts `compressed` into an EROFS file system in `file` and verifies both digests. After an error the content of
/// the file is useless. The result depends only on the tar archive: the same layer gives the same bytes.
pub fn convert(
    compressed: impl Read,
    file: File,
    digest: &Digest,
    diff_id: &Digest,
) -> Result<(), LayerError> {
    let mut compressed = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(compressed));
    let mut blocks = BlockWriter::new(file);
    let unpacked = match unpack(&mut compressed, &mut blocks, MAX_LAYER_BYTES) {
        Err(LayerError::Write(error)) => return Err(LayerError::Write(error)),
        unpacked => unpacked,
    };
    // Check the digest first: a wrong one explains a broken archive better than the archive's own error.
    let (found, _) = compressed.into_inner().finish().map_err(LayerError::Read)?;
    if found != *digest {
        return Err(LayerError::Digest {
            promised: digest.clone(),
            found,
        });
    }
    let unpacked = unpacked?;
    if unpacked != *diff_id {
        return Err(LayerError::DiffId {
            promised: diff_id.clone(),
            found: unpacked,
        });
    }
    blocks.finish().map_err(LayerError::Write)
}

/// Unpacks the archive and writes the file system. Returns the digest of the uncompressed archive.
fn unpack(
    compressed: &mut impl BufRead,
    blocks: &mut BlockWriter,
    limit_bytes: u64,
) -> Result<Digest, LayerError> {
    let plain = Bounded {
        inner: decompressed(compressed).map_err(LayerError::Read)?,
        left_bytes: limit_bytes,
    };
    let mut plain = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(plain));
    let tree = tarball::read(&mut plain, blocks)?;
    erofs::write(&tree, blocks).map_err(LayerError::Write)?;
    let (digest, _) = plain.into_inner().finish().map_err(LayerError::of_read)?;
    Ok(digest)
}

/// Detects the compression by the first bytes, because media types are sometimes wrong.
fn decompressed<'a>(mut compressed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = compressed.fill_buf()?;
    if start.starts_with(&GZIP_MAGIC) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(compressed)));
    }
    if start.starts_with(&ZSTD_MAGIC) {
        let mut decoder = zstd::Decoder::with_buffer(compressed)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(compressed))
}

/// A reader that fails after `left_bytes`.
struct Bounded<R> {
    inner: R,
    left_bytes: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let left = self.left_bytes.checked_sub(count as u64);
        self.left_bytes = left.ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
