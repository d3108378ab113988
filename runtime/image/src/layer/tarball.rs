// SPDX-License-Identifier: Apache-2.0
//! Turns tar entries into files of a [`Tree`]: ustar, GNU long names, PAX records, sparse files ([`sparse`]), and the
//! whiteouts of OCI's layer.md.
//!
//! The `tar` crate reads the fields of a header. The loop over the headers is our own, because the crate's loop
//! reads long names and PAX records of any length into memory.

mod extensions;
mod header;
mod sparse;

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::blocks::{BlockWriter, CopyError};
use super::memory::Share;
use super::node::{Attributes, Kind};
use super::path::trimmed;
use super::tree::{Tree, TreeError};
use crate::failure::FailureKind;
use extensions::{Extensions, until_nul};
pub use header::begins_with;
use header::read_header;
use sparse::Map;

pub const RECORD_BYTES: usize = 512;
/// The most bytes that a long name or the PAX records of one file may have.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// `PATH_MAX` without its NUL.
const MAX_LINK_BYTES: usize = 4095;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
/// The prefix of aufs's own bookkeeping files, which are not part of the image.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
const SHOWN_BYTES: usize = 200;

/// Why an archive cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("read the archive")]
    Read(#[source] io::Error),
    #[error("write file data")]
    Write(#[source] io::Error),
    #[error("the archive ends in the middle of an entry")]
    Truncated,
    #[error("tar header has a wrong checksum")]
    Checksum,
    #[error("entry {path:?}: field {field} is not valid")]
    Field { path: String, field: &'static str },
    #[error("entry {path:?}: {what} is not supported in an image layer")]
    Unsupported { path: String, what: String },
    #[error("entry {path:?}")]
    Path { path: String, source: TreeError },
    #[error("long name or PAX records of {0} bytes, at most {MAX_EXTENSION_BYTES} are possible")]
    Extension(u64),
}

impl TarError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Write(error) => FailureKind::of_io(error),
            Self::Read(_) | Self::Truncated | Self::Checksum => FailureKind::Corrupt,
            Self::Path {
                source: TreeError::NoMemory,
                ..
            } => FailureKind::Unavailable,
            _ => FailureKind::Invalid,
        }
    }
}

/// Reads an archive up to its end mark. File data go to `blocks`, and what is kept of it is in `memory`.
pub fn read(
    archive: &mut impl Read,
    blocks: &mut BlockWriter,
    memory: Share,
) -> Result<Tree, TarError> {
    let mut tree = Tree::new(memory);
    let mut extensions = Extensions::default();
    while let Some(header) = read_header(archive)? {
        match header.entry_type() {
            EntryType::XGlobalHeader => {
                read_extension(archive, &header)?;
            }
            EntryType::XHeader => {
                let records = read_extension(archive, &header)?;
                let parsed = extensions.parse_pax(&records);
                parsed.map_err(|field| TarError::Field {
                    path: "PAX records".to_owned(),
                    field,
                })?;
            }
            EntryType::GNULongName => {
                extensions.path = Some(until_nul(read_extension(archive, &header)?));
            }
            EntryType::GNULongLink => {
                extensions.link = Some(until_nul(read_extension(archive, &header)?));
            }
            _ => {
                let extensions = std::mem::take(&mut extensions);
                let entry = Entry::new(&header, extensions, archive)?;
                entry.store(archive, &mut tree, blocks)?;
            }
        }
    }
    let marked = tree.mark_ways_to_implied();
    marked.map_err(|source| TarError::Path {
        path: "/".to_owned(),
        source,
    })?;
    Ok(tree)
}

/// One file of the archive. Its fields have been checked.
struct Entry {
    path: Vec<u8>,
    link: Vec<u8>,
    entry_type: EntryType,
    size: u64,
    /// Where the data of a sparse file are.
    sparse: Option<Map>,
    device: (u32, u32),
    attributes: Attributes,
}

impl Entry {
    /// Afterwards the archive is at the data.
    fn new(
        header: &Header,
        extensions: Extensions,
        archive: &mut impl Read,
    ) -> Result<Self, TarError> {
        let mut records = extensions.sparse;
        let name = records.as_mut().and_then(|records| records.name.take());
        let path = name
            .or(extensions.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let shown = show(&path);
        let wrong = |field| TarError::Field {
            path: shown.clone(),
            field,
        };
        let id = |of_extension: Option<u64>, of_header: io::Result<u64>, field| {
            let id = match of_extension {
                Some(id) => id,
                None => of_header.map_err(|_| wrong(field))?,
            };
            u32::try_from(id).map_err(|_| wrong(field))
        };
        let device = |value: io::Result<Option<u32>>| value.ok().flatten().unwrap_or(0);
        let (mtime_seconds, mtime_nanoseconds) = extensions
            .mtime
            .unwrap_or((header.mtime().map_or(0, u64::cast_signed), 0));
        let size = match extensions.size {
            Some(size) => size,
            None => header.entry_size().map_err(|_| wrong("size"))?,
        };
        let mode = header.mode().map_err(|_| wrong("mode"))? & 0o7777;
        let sparse = match (header.entry_type(), &records) {
            (EntryType::GNUSparse, _) => Some(Map::of_header(header, archive)?),
            (EntryType::Regular, Some(records)) => {
                Some(Map::of_records(&path, records, size, archive)?)
            }
            _ => None,
        };
        Ok(Self {
            sparse,
            link: match extensions.link {
                Some(link) => link,
                None => header.link_name_bytes().unwrap_or_default().into_owned(),
            },
            entry_type: header.entry_type(),
            size,
            device: (device(header.device_major()), device(header.device_minor())),
            attributes: Attributes {
                mode: u16::try_from(mode).map_err(|_| wrong("mode"))?,
                uid: id(extensions.uid, header.uid(), "uid")?,
                gid: id(extensions.gid, header.gid(), "gid")?,
                mtime_seconds,
                mtime_nanoseconds,
                xattrs: extensions.xattrs,
            },
            path,
        })
    }

    /// Adds the file to the tree. Afterwards the archive is at the next header.
    fn store(
        self,
        archive: &mut impl Read,
        tree: &mut Tree,
        blocks: &mut BlockWriter,
    ) -> Result<(), TarError> {
        let shown = show(&self.path);
        let bad_path = |source| TarError::Path {
            path: shown.clone(),
            source,
        };
        let has_data = matches!(
            self.entry_type,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
        );
        // Links, directories and devices have no data, whatever size their header has. Most image tools use Go's
        // tar reader, which reads archives in the same way.
        if let Some(whiteout) = Whiteout::of(&self.path) {
            if has_data {
                let map = self.sparse.as_ref();
                let bytes = map.map_or(self.size, |map| map.data_bytes);
                skip(archive, padded(bytes).ok_or(TarError::Truncated)?)?;
            }
            return whiteout.store(tree).map_err(bad_path);
        }
        let (major, minor) = self.device;
        let kind = match self.entry_type {
            // Before ustar, a slash at the end of the name marked a directory.
            EntryType::Regular if self.path.ends_with(b"/") && self.size == 0 => Kind::directory(),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let first_block = blocks.next_block().map_err(TarError::Write)?;
                let bytes = match &self.sparse {
                    Some(map) => {
                        map.copy_data(archive, blocks)?;
                        map.real_bytes
                    }
                    None => {
                        copy_data(archive, self.size, blocks)?;
                        self.size
                    }
                };
                Kind::Regular { first_block, bytes }
            }
            EntryType::Directory => Kind::directory(),
            EntryType::Symlink if self.link.is_empty() || self.link.len() > MAX_LINK_BYTES => {
                return Err(TarError::Field {
                    path: shown,
                    field: "link name",
                });
            }
            EntryType::Symlink => Kind::Symlink(self.link.into()),
            EntryType::Char => Kind::CharDevice { major, minor },
            EntryType::Block => Kind::BlockDevice { major, minor },
            EntryType::Fifo => Kind::Fifo,
            EntryType::Link => {
                return tree
                    .insert_hard_link(&self.path, &self.link)
                    .map_err(bad_path);
            }
            other => {
                return Err(TarError::Unsupported {
                    path: shown,
                    what: format!("an entry of type {:?}", char::from(other.as_byte())),
                });
            }
        };
        tree.insert(&self.path, self.attributes, kind)
            .map_err(bad_path)
    }
}

/// The meaning of a file whose name begins with `.wh.`.
enum Whiteout<'a> {
    /// Hides everything that lower layers have in this directory.
    Opaque {
        directory: &'a [u8],
    },
    /// Hides the file with this name of lower layers.
    Gone {
        directory: &'a [u8],
        name: &'a [u8],
    },
    Nothing,
}

impl<'a> Whiteout<'a> {
    fn of(path: &'a [u8]) -> Option<Self> {
        let path = trimmed(path);
        let start = path
            .iter()
            .rposition(|byte| *byte == b'/')
            .map_or(0, |slash| slash + 1);
        let (directory, name) = path.split_at_checked(start)?;
        if name == OPAQUE_MARK {
            return Some(Self::Opaque { directory });
        }
        if name.starts_with(AUFS_PREFIX) {
            return Some(Self::Nothing);
        }
        let name = name.strip_prefix(WHITEOUT_PREFIX)?;
        Some(Self::Gone { directory, name })
    }

    fn store(&self, tree: &mut Tree) -> Result<(), TreeError> {
        match self {
            Self::Opaque { directory } => tree.set_opaque(directory),
            Self::Gone { directory, name } => tree.insert_whiteout(directory, name),
            Self::Nothing => Ok(()),
        }
    }
}

fn read_extension(archive: &mut impl Read, header: &Header) -> Result<Vec<u8>, TarError> {
    let bytes = header.entry_size().map_err(|_| TarError::Checksum)?;
    if bytes > MAX_EXTENSION_BYTES {
        return Err(TarError::Extension(bytes));
    }
    let mut content = Vec::new();
    archive
        .by_ref()
        .take(bytes)
        .read_to_end(&mut content)
        .map_err(TarError::Read)?;
    if content.len() as u64 != bytes {
        return Err(TarError::Truncated);
    }
    let padding = padded(bytes).unwrap_or(bytes) - bytes;
    skip(archive, padding)?;
    Ok(content)
}

fn copy_data(
    archive: &mut impl Read,
    bytes: u64,
    blocks: &mut BlockWriter,
) -> Result<(), TarError> {
    let padded = padded(bytes).ok_or(TarError::Truncated)?;
    copy_part(archive, bytes, blocks)?;
    blocks.pad();
    skip(archive, padded - bytes)
}

fn copy_part(
    archive: &mut impl Read,
    bytes: u64,
    blocks: &mut BlockWriter,
) -> Result<(), TarError> {
    let copied = blocks
        .copy(&mut archive.take(bytes))
        .map_err(|error| match error {
            CopyError::Read(error) => TarError::Read(error),
            CopyError::Write(error) => TarError::Write(error),
        })?;
    if copied != bytes {
        return Err(TarError::Truncated);
    }
    Ok(())
}

fn skip(archive: &mut impl Read, bytes: u64) -> Result<(), TarError> {
    let copied = io::copy(&mut archive.take(bytes), &mut io::sink()).map_err(TarError::Read)?;
    if copied != bytes {
        return Err(TarError::Truncated);
    }
    Ok(())
}

/// Rounds up to the end of the last record.
fn padded(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(RECORD_BYTES as u64)
}

fn show(path: &[u8]) -> String {
    let shown = path.get(..path.len().min(SHOWN_BYTES)).unwrap_or_default();
    String::from_utf8_lossy(shown).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whiteout_is_one_however_its_path_ends() {
        for path in [".wh.x", "a/.wh.x", "a/.wh.x/", "a/.wh.x/.", "a/.wh.x/.//./"] {
            let found = Whiteout::of(path.as_bytes());
            let is_whiteout = matches!(found, Some(Whiteout::Gone { name: b"x", .. }));
            assert!(is_whiteout, "{path}");
        }
        for path in ["", ".", "/", "a/.", "a/wh.x", "a/.wh.x/y", "a.wh.x"] {
            assert!(Whiteout::of(path.as_bytes()).is_none(), "{path}");
        }
    }
}
