// SPDX-License-Identifier: Apache-2.0
//! Where the layers of the store came from: which registry sent which blob that unpacked to which layer.
//!
//! A layer is named by its diff id, and a diff id is no secret. Who knows that of somebody else's private image could
//! name it in an image of his own. So a layer of the store is taken over only for a registry that once sent the whole
//! blob, and which says again, with the credentials of the present pull, that the blob is there. From any other registry
//! the blob is downloaded and verified, though it is not needed.
//!
//! The notes are in one small file per layer. If it is lost or damaged, the next pull downloads the blob.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bulkhead_faults::{self as faults, Step};
use serde::{Deserialize, Serialize};

use super::{StoreError, files};
use crate::digest::Digest;

const SUFFIX: &str = ".json";
/// What a note is called until it is complete.
const UNFINISHED: &str = ".new";
/// The most sources of one layer. The oldest is forgotten, and its next pull downloads the layer.
const MAX_SOURCES: usize = 64;

/// A blob that unpacked to a layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Source {
    /// The host as references name it.
    pub host: String,
    pub blob: Digest,
}

/// The directory of the notes.
#[derive(Debug)]
pub struct Sources {
    directory: PathBuf,
    /// Held while a note is written.
    writing: Mutex<()>,
}

impl Sources {
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let directory = root.join("sources");
        files::make_directory(&directory)?;
        // A daemon that died while it wrote a note has left its beginning.
        files::retain(&directory, UNFINISHED, |_| false)?;
        Ok(Self {
            directory,
            writing: Mutex::default(),
        })
    }

    /// Whether `source` has once been verified to be `layer`.
    pub fn has(&self, layer: &Digest, source: &Source) -> bool {
        self.read(layer).contains(source)
    }

    /// Notes that `source` is `layer`. Call it only after both digests were verified.
    pub fn add(&self, layer: &Digest, source: &Source) -> Result<(), StoreError> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sources = self.read(layer);
        if sources.contains(source) {
            return Ok(());
        }
        sources.push(source.clone());
        let oldest = sources.len().saturating_sub(MAX_SOURCES);
        sources.drain(..oldest);
        let path = self.path(layer);
        let unfinished = path.with_extension("new");
        let written = serde_json::to_vec(&sources).map_err(io::Error::other);
        let written = written.and_then(|text| fs::write(&unfinished, text));
        let written = written.map_err(files::failed("write", &unfinished));
        let named = written.and_then(|()| {
            faults::within(Step::NameSource, || {
                fs::rename(&unfinished, &path).map_err(files::failed("write", &path))
            })
        });
        if named.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        named
    }

    /// Removes the notes about layers for which `is_named` returns false.
    pub fn retain(&self, is_named: impl Fn(&Digest) -> bool) -> Result<(), StoreError> {
        files::retain(&self.directory, SUFFIX, is_named)
    }

    fn read(&self, layer: &Digest) -> Vec<Source> {
        let text = fs::read(self.path(layer)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn path(&self, layer: &Digest) -> PathBuf {
        self.directory.join(format!("{}{SUFFIX}", layer.hex()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(host: &str, blob: &[u8]) -> Source {
        Source {
            host: host.to_owned(),
            blob: Digest::of(blob),
        }
    }

    #[test]
    fn a_source_is_known_for_its_host_blob_and_layer_only_and_until_the_layer_goes() {
        let directory = tempfile::tempdir().unwrap();
        let layer = Digest::of(b"layer");
        let noted = source("a", b"blob");
        let sources = Sources::open(directory.path()).unwrap();
        assert!(!sources.has(&layer, &noted));
        sources.add(&layer, &noted).unwrap();
        sources.add(&layer, &source("b", b"other")).unwrap();
        let unfinished = sources.path(&layer).with_extension("new");
        fs::write(&unfinished, "[").unwrap();
        let sources = Sources::open(directory.path()).unwrap();
        assert!(!unfinished.exists());
        assert!(sources.has(&layer, &noted));
        assert!(!sources.has(&layer, &source("b", b"blob")));
        assert!(!sources.has(&layer, &source("a", b"other")));
        assert!(!sources.has(&Digest::of(b"other"), &noted));
        sources.retain(|named| *named == layer).unwrap();
        assert!(sources.has(&layer, &noted));
        sources.retain(|_| false).unwrap();
        assert!(!sources.has(&layer, &noted));
    }

    #[test]
    fn a_damaged_note_says_nothing_and_many_notes_are_the_last_ones() {
        let directory = tempfile::tempdir().unwrap();
        let layer = Digest::of(b"layer");
        let sources = Sources::open(directory.path()).unwrap();
        fs::write(sources.path(&layer), b"[{").unwrap();
        assert!(!sources.has(&layer, &source("0", b"")));
        for number in 0..=MAX_SOURCES {
            let host = number.to_string();
            sources.add(&layer, &source(&host, b"")).unwrap();
        }
        assert!(!sources.has(&layer, &source("0", b"")));
        assert!(sources.has(&layer, &source("1", b"")));
        assert_eq!(sources.read(&layer).len(), MAX_SOURCES);
    }
}
