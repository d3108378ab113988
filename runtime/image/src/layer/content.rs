// SPDX-License-Identifier: Apache-2.0
//! What the bytes of a blob are: an archive of an image, or an archive or a file of an artifact. A file becomes a file
//! system with nothing else in it.

use std::io::{self, Cursor, Read};

use super::blocks::{BlockWriter, CopyError};
use super::memory::Share;
use super::node::{Attributes, Kind};
use super::path::{PathError, components};
use super::tarball;
use super::tree::{Tree, TreeError};
use crate::digest::Digest;

const FILE_MODE: u16 = 0o644;
/// So much of a blob is read to see whether an archive begins there. A block of zstd, which is unpacked as a whole, has
/// 128 KiB at most.
pub const START_BYTES: u64 = 160 << 10;
/// `PATH_MAX` without its NUL.
const MAX_NAME_BYTES: usize = 4095;

/// What the bytes of a blob are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An archive. The image's configuration promises the digest of the unpacked archive.
    Layer {
        diff_id: Digest,
    },
    /// An archive. If it has a name and is none, it is a file of that name: `oras` gives its files the media type of
    /// archives.
    Archive {
        name: Option<String>,
    },
    File {
        name: String,
    },
}

/// Why a file of an artifact cannot have its name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("a name must not be empty, absolute or longer than {MAX_NAME_BYTES} bytes")]
    Form,
}

/// Why no file system was made of a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("read the file")]
    Read(#[source] io::Error),
    #[error("write the file")]
    Write(#[source] io::Error),
    #[error("add file {name:?}")]
    Tree { name: String, source: TreeError },
}

/// The names that lead to a file of an artifact, the last one its own. A name may have directories but leads nowhere
/// else.
pub fn file_path(name: &str) -> Result<Vec<&[u8]>, NameError> {
    let path = components(name.as_bytes())?;
    if path.is_empty()
        || name.starts_with('/')
        || name.ends_with('/')
        || name.len() > MAX_NAME_BYTES
    {
        return Err(NameError::Form);
    }
    Ok(path)
}

impl Content {
    /// The name under which the store keeps what is made of the blob `digest`: the diff id of an image's layer. What is
    /// made of an artifact's blob depends on the name, too. As the hash of something else than an archive, its name is
    /// none that a layer can have.
    pub fn layer(&self, digest: &Digest) -> Digest {
        let (kind, name) = match self {
            Self::Layer { diff_id } => return diff_id.clone(),
            Self::Archive { name } => ("archive", name.as_deref().unwrap_or_default()),
            Self::File { name } => ("file", name.as_str()),
        };
        Digest::of(format!("{kind} of an artifact\0{digest}\0{name}").as_bytes())
    }

    /// The name of the file that the blob is, by how it begins. `None` if it is an archive.
    pub fn file_name(&self, start: &[u8]) -> Option<&str> {
        match self {
            Self::Layer { .. } | Self::Archive { name: None } => None,
            Self::File { name } => Some(name),
            Self::Archive { name: Some(name) } => (!begins_archive(start)).then_some(name),
        }
    }
}

/// Whether an archive begins with `start`, perhaps a compressed one.
fn begins_archive(start: &[u8]) -> bool {
    let mut record = Vec::with_capacity(tarball::RECORD_BYTES);
    if let Ok(plain) = super::decompressed(Cursor::new(start)) {
        // The end of the start is no end of the archive, so an error is none.
        let _ = plain
            .take(tarball::RECORD_BYTES as u64)
            .read_to_end(&mut record);
    }
    tarball::begins_with(&record)
}

/// Writes a file to `blocks` and makes a tree with nothing else in it.
pub fn read_file(
    content: &mut impl Read,
    name: &str,
    blocks: &mut BlockWriter,
    memory: Share,
) -> Result<Tree, FileError> {
    let first_block = blocks.next_block().map_err(FileError::Write)?;
    let bytes = blocks.copy(content).map_err(|error| match error {
        CopyError::Read(error) => FileError::Read(error),
        CopyError::Write(error) => FileError::Write(error),
    })?;
    blocks.pad();
    let attributes = Attributes {
        mode: FILE_MODE,
        ..Attributes::default()
    };
    let mut tree = Tree::new(memory);
    let added = tree.insert(
        name.as_bytes(),
        attributes,
        Kind::Regular { first_block, bytes },
    );
    let added = added.and_then(|()| tree.mark_ways_to_implied());
    added.map_err(|source| FileError::Tree {
        name: name.to_owned(),
        source,
    })?;
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_stay_inside() {
        for good in ["a", "a/b.txt", "./a", ".hidden", ".wh.a", "a b"] {
            file_path(good).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        let long = "a/".repeat(2000) + &"b".repeat(200);
        for bad in [
            "",
            ".",
            "/",
            "/etc/passwd",
            "../a",
            "a/../../b",
            "a/",
            "a\0b",
            &long,
        ] {
            assert!(file_path(bad).is_err(), "{bad:.20}");
        }
    }

    #[test]
    fn what_is_kept_has_a_name_of_its_own_for_each_meaning() {
        let digest = Digest::of(b"blob");
        let named = |name: &str| Some(name.to_owned());
        let contents = [
            Content::Layer {
                diff_id: Digest::of(b"archive"),
            },
            Content::Archive { name: None },
            Content::Archive { name: named("a") },
            Content::File { name: "a".into() },
            Content::File { name: "b".into() },
        ];
        let layers: std::collections::BTreeSet<_> = contents
            .iter()
            .map(|content| content.layer(&digest))
            .collect();
        assert_eq!(layers.len(), contents.len());
        assert!(layers.contains(&Digest::of(b"archive")));
    }

    #[test]
    fn an_archive_is_known_by_its_first_record() {
        let mut header = tar::Header::new_ustar();
        header.set_path("file").unwrap();
        header.set_size(0);
        header.set_cksum();
        let archive = header.as_bytes().to_vec();
        let gzip = |bytes: &[u8]| {
            let mut gzip =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            io::Write::write_all(&mut gzip, bytes).unwrap();
            gzip.finish().unwrap()
        };
        let noise: Vec<u8> = (0..=250).cycle().step_by(7).take(4096).collect();
        for (what, start, is_archive) in [
            ("archive", archive.clone(), true),
            ("end of an archive", vec![0; 1024], true),
            ("gzip", gzip(&archive), true),
            ("zstd", zstd::encode_all(&archive[..], 3).unwrap(), true),
            ("nothing", Vec::new(), false),
            ("text", b"hello\n".to_vec(), false),
            ("noise", noise.clone(), false),
            ("noise in gzip", gzip(&noise), false),
        ] {
            let content = Content::Archive {
                name: Some("x".into()),
            };
            assert_eq!(content.file_name(&start).is_none(), is_archive, "{what}");
            assert_eq!(Content::Archive { name: None }.file_name(&start), None);
        }
    }
}
