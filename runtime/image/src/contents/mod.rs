// SPDX-License-Identifier: Apache-2.0
//! What is here, and who needs it: layers as files, records of images and leases, claims of pulls in progress.
//!
//! ```text
//! ROOT/images.redb        records of images and leases, transactional ([`records`])
//! ROOT/layers/HEX.erofs   one file per layer, named by diff id, never changed
//! ROOT/partial/           layers being made; emptied at start
//! ROOT/reserve            room for removals on a full disk ([`reserve`])
//! ```
//! A layer's file stays as long as an image, a lease or a pull in progress names it, and no longer.

mod files;
mod records;
mod reserve;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bulkhead_text::chain;
use tokio::sync::Semaphore;

use crate::config::Config;
use crate::digest::Digest;
use crate::failure::FailureKind;
use crate::progress::Pulls;
use crate::reference::{Reference, ReferenceError};
use files::LayerFiles;
pub use records::ImageRecord;
use records::Records;
use reserve::Reserve;

/// The shortest beginning of an id that is looked up.
pub const MIN_ID_DIGITS: usize = 4;

/// An error of the store itself.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error("{operation} {path}")]
    Files {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("open {path} (does another daemon use it?)")]
    Open {
        path: PathBuf,
        source: Box<redb::DatabaseError>,
    },
    #[error("the records of images")]
    Records(#[source] Box<redb::Error>),
    #[error("the record of {what} is damaged")]
    Damaged {
        what: String,
        source: serde_json::Error,
    },
    #[error("{name:?} is the beginning of more than one image id")]
    Ambiguous { name: String },
    #[error("image {0} is not here")]
    NotFound(String),
}

impl StoreError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Reference(_) | Self::Ambiguous { .. } => FailureKind::Invalid,
            Self::NotFound(_) => FailureKind::NotFound,
            Self::Files { source, .. } => FailureKind::of_io(source),
            Self::Records(source) => match source.as_ref() {
                redb::Error::Io(source) => FailureKind::of_io(source),
                _ => FailureKind::Internal,
            },
            Self::Open { source, .. } => match source.as_ref() {
                redb::DatabaseError::Storage(redb::StorageError::Io(source)) => {
                    FailureKind::of_io(source)
                }
                _ => FailureKind::Internal,
            },
            Self::Damaged { .. } => FailureKind::Internal,
        }
    }
}

/// A layer as an EROFS file.
#[derive(Clone, Debug)]
pub struct LayerBlob {
    pub diff_id: String,
    pub path: PathBuf,
}

/// What the store takes on its file system, without the few pages of its records.
#[derive(Clone, Debug)]
pub struct Usage {
    pub directory: PathBuf,
    pub used_bytes: u64,
    pub inodes: u64,
}

/// What the store and the pulls in progress share.
#[derive(Debug)]
pub struct Contents {
    pub config: Config,
    pub files: LayerFiles,
    pub downloads: Semaphore,
    pub pulls: Pulls,
    records: Records,
    reserve: Reserve,
    /// Layers that pulls in progress need, with how many do. Also what makes removal and need exclude each other.
    needed: Mutex<HashMap<Digest, usize>>,
    /// Who makes a layer; others wait for it.
    makers: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

impl Contents {
    /// Opens or makes the directory, and removes what an earlier process left half done.
    pub fn open(config: Config) -> Result<Self, StoreError> {
        let root = config.root.clone();
        files::make_directory(&root)?;
        // First: this fails while another process has the store, whose partial files must stay.
        let records = Records::open(&root.join("images.redb"))?;
        let files = LayerFiles::open(&root)?;
        let contents = Self {
            downloads: Semaphore::new(config.max_parallel_layers.max(1)),
            config,
            files,
            pulls: Pulls::default(),
            records,
            reserve: Reserve::new(root.join("reserve")),
            needed: Mutex::default(),
            makers: Mutex::default(),
        };
        contents.collect()?;
        Ok(contents)
    }

    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.records.images()
    }

    /// By reference, by id, or by a beginning of an id that no other has.
    pub fn find(&self, name: &str) -> Result<Option<ImageRecord>, StoreError> {
        if let Ok(id) = name.parse::<Digest>() {
            return self.records.image(&id);
        }
        let images = self.records.images()?;
        let reference = name.parse::<Reference>();
        if let Ok(reference) = &reference {
            let full = reference.to_string();
            let is_it = |record: &&ImageRecord| {
                record.repo_tags.contains(&full) || record.repo_digests.contains(&full)
            };
            if let Some(record) = images.iter().find(is_it) {
                return Ok(Some(record.clone()));
            }
        }
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        if digits.len() < MIN_ID_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return reference.map(|_| None).map_err(Into::into);
        }
        let mut matches = images
            .into_iter()
            .filter(|record| record.id.hex().starts_with(digits));
        let first = matches.next();
        if matches.next().is_some() {
            return Err(StoreError::Ambiguous {
                name: name.to_owned(),
            });
        }
        Ok(first)
    }

    /// Forgets an image; the layers that nobody else needs go.
    pub fn remove(&self, id: &Digest) -> Result<(), StoreError> {
        self.reserve.with(|| self.records.remove_image(id))?;
        self.collect()?;
        self.reserve.fill();
        Ok(())
    }

    /// Keeps an image's layers for `holder` until [`Self::release`]; bottom first.
    pub fn lease(&self, id: &str, holder: &str) -> Result<Vec<LayerBlob>, StoreError> {
        let _exclusive = self.lock_needed();
        let found = self.find(id)?;
        let record = found.ok_or_else(|| StoreError::NotFound(id.to_owned()))?;
        self.records.add_lease(holder, &record.layers)?;
        let blob = |diff_id: &Digest| LayerBlob {
            diff_id: diff_id.to_string(),
            path: self.files.path(diff_id),
        };
        Ok(record.layers.iter().map(blob).collect())
    }

    /// An unknown holder is fine.
    pub fn release(&self, holder: &str) -> Result<(), StoreError> {
        if self.reserve.with(|| self.records.remove_lease(holder))? {
            self.collect()?;
            self.reserve.fill();
        }
        Ok(())
    }

    /// All that have leases.
    pub fn holders(&self) -> Result<Vec<String>, StoreError> {
        let leases = self.records.leases()?;
        Ok(leases.into_iter().map(|(holder, _)| holder).collect())
    }

    /// The record of an image that is here with all its layers.
    pub fn complete_image(&self, id: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        let record = self.records.image(id)?;
        Ok(record.filter(|record| record.layers.iter().all(|layer| self.files.has(layer))))
    }

    /// Makes an image visible; call while its layers are [`Self::need`]ed. A tag that named another image moves.
    pub fn publish(&self, record: &ImageRecord) -> Result<ImageRecord, StoreError> {
        self.records.add_image(record)
    }

    /// Keeps `layers`, present or not, from being removed until the guard is dropped.
    pub fn need(self: &Arc<Self>, layers: &[Digest]) -> Needed {
        let mut needed = self.lock_needed();
        for layer in layers {
            *needed.entry(layer.clone()).or_default() += 1;
        }
        Needed {
            contents: Arc::clone(self),
            layers: layers.to_vec(),
        }
    }

    /// Whoever holds the lock in this makes the layer; the others find it made.
    pub fn maker(&self, layer: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut makers = self.makers.lock().unwrap_or_else(PoisonError::into_inner);
        makers.retain(|_, maker| maker.strong_count() > 0);
        if let Some(maker) = makers.get(layer).and_then(Weak::upgrade) {
            return maker;
        }
        let maker = Arc::default();
        makers.insert(layer.clone(), Arc::downgrade(&maker));
        maker
    }

    fn lock_needed(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.needed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the layers that nobody names.
    fn collect(&self) -> Result<(), StoreError> {
        let needed = self.lock_needed();
        let mut named: std::collections::HashSet<Digest> = needed.keys().cloned().collect();
        for record in self.records.images()? {
            named.extend(record.layers);
        }
        for (_, layers) in self.records.leases()? {
            named.extend(layers);
        }
        self.files.retain(|layer| named.contains(layer))
    }
}

/// A claim on layers that no record names yet.
#[derive(Debug)]
pub struct Needed {
    contents: Arc<Contents>,
    layers: Vec<Digest>,
}

impl Drop for Needed {
    fn drop(&mut self) {
        let mut needed = self.contents.lock_needed();
        for layer in &self.layers {
            if let Some(count) = needed.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    needed.remove(layer);
                }
            }
        }
        drop(needed);
        if let Err(error) = self.contents.collect() {
            tracing::warn!(error = chain(&error), "unused layers stay");
        }
    }
}
