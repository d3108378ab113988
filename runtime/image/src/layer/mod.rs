// SPDX-License-Identifier: Apache-2.0
//! Converts one layer from the bytes of a registry to an EROFS file, in one pass on one blocking thread.
//!
//! ```text
//! compressed bytes ─> sha256 ─> gzip | zstd | plain ─> sha256 ─> tar entries ─> tree + file data ─> EROFS
//!                     digest                           diff id
//! ```
//! A blob of an artifact may also be a file, and has no diff id ([`content`]).
//! File data are written as they arrive. Names and attributes stay in memory ([`tree`]) until the end and are then
//! written after the data ([`erofs`]). A layer's author chooses how much all of that is, so it has [`limits`], and what
//! stays in [`memory`] has its own.

mod blocks;
mod content;
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
pub use content::{Content, file_path};
use content::{FileError, START_BYTES};
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
    pub content: Content,
}

impl Promise {
    /// The name under which the store keeps the layer.
    pub fn layer(&self) -> Digest {
        self.content.layer(&self.digest)
    }
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
    #[error("make a file of the artifact")]
    File(#[source] FileError),
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

impl From<FileError> for LayerError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Write(error) => Self::of_write(error),
            FileError::Read(error) => Self::of_read(error),
            error @ FileError::Tree { .. } => Self::File(error),
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
            // The name was checked before, so it is the memory that lacks.
            Self::File(_) => FailureKind::Unavailable,
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

/// Converts `compressed` into an EROFS file system in `file` and verifies what is promised of it. After an error the
/// content of the file is useless. The result depends only on the tar archive: the same layer gives the same bytes.
pub fn convert(
    compressed: impl Read,
    file: File,
    promise: &Promise,
    limits: &Arc<Limits>,
) -> Result<(), LayerError> {
    let mut blocks = BlockWriter::new(file, Arc::clone(limits));
    check(compressed, promise, limits, |mut plain, file_name| {
        let memory = Share::new(&limits.memory);
        let tree = match file_name {
            None => tarball::read(&mut plain, &mut blocks, memory)?,
            Some(name) => content::read_file(&mut plain, name, &mut blocks, memory)?,
        };
        erofs::write(&tree, &mut blocks).map_err(LayerError::of_write)
    })?;
    blocks.finish().map_err(LayerError::of_write)
}

/// Verifies what is promised of `compressed`, and writes nothing.
pub fn verify(
    compressed: impl Read,
    promise: &Promise,
    limits: &Arc<Limits>,
) -> Result<(), LayerError> {
    check(compressed, promise, limits, |_, _| Ok(()))
}

/// What reads an unpacked archive, or a file as it is, whose name is given then.
trait Work: FnOnce(&mut dyn Read, Option<&str>) -> Result<(), LayerError> {}

impl<T: FnOnce(&mut dyn Read, Option<&str>) -> Result<(), LayerError>> Work for T {}

/// Lets `work` read the layer, reads the rest, and verifies the digests.
fn check(
    compressed: impl Read,
    promise: &Promise,
    limits: &Arc<Limits>,
    work: impl Work,
) -> Result<(), LayerError> {
    let mut compressed = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(compressed));
    let unpacked = match unpack(&mut compressed, promise, limits, work) {
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
    match &promise.content {
        Content::Layer { diff_id } if unpacked != *diff_id => Err(LayerError::DiffId {
            promised: diff_id.clone(),
            found: unpacked,
        }),
        _ => Ok(()),
    }
}

/// Lets `work` read the unpacked archive, or the file. Returns the digest of what it reads.
fn unpack(
    compressed: &mut impl BufRead,
    promise: &Promise,
    limits: &Arc<Limits>,
    work: impl Work,
) -> Result<Digest, LayerError> {
    let mut start = Vec::new();
    if matches!(promise.content, Content::Archive { name: Some(_) }) {
        let mut first = compressed.by_ref().take(START_BYTES);
        first.read_to_end(&mut start).map_err(LayerError::Read)?;
    }
    let file_name = promise.content.file_name(&start);
    let compressed = io::Cursor::new(start.as_slice()).chain(compressed);
    let plain: Box<dyn Read> = match file_name {
        Some(_) => Box::new(compressed),
        None => decompressed(compressed).map_err(LayerError::Read)?,
    };
    let plain = Bounded::new(plain, promise.bytes, limits);
    let mut plain = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(plain));
    work(&mut plain, file_name)?;
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
