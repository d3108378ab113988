// SPDX-License-Identifier: Apache-2.0
//! The images that are here, and who needs their layers.
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

use crate::config::{Config, Credentials};
use crate::digest::Digest;
use crate::failure::FailureKind;
use crate::manifest::ImageDefaults;
use crate::progress::{PullProgress, Pulls};
use crate::pull::{self, PullError};
use crate::reference::{Reference, ReferenceError};
pub(crate) use files::LayerFiles;
pub(crate) use records::ImageRecord;
use records::Records;
use reserve::Reserve;

/// The shortest beginning of an id that is looked up.
const MIN_ID_DIGITS: usize = 4;

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

/// An image that is here.
#[derive(Clone, Debug)]
pub struct Image {
    /// The digest of its configuration.
    pub id: Digest,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    /// What its layers take on the disk, and what says what they are; never 0, which kubelet takes for an error.
    pub size_bytes: u64,
    /// One of its names is in [`Config::pinned`].
    pub pinned: bool,
    pub defaults: ImageDefaults,
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

/// The store. Cheap to clone; all clones are the same store.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
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

impl Store {
    /// Opens or makes the store below `config.root`, and removes what an earlier process left half done.
    pub fn open(config: Config) -> Result<Self, StoreError> {
        let root = config.root.clone();
        files::make_directory(&root)?;
        // First: this fails while another process has the store, whose partial files must stay.
        let records = Records::open(&root.join("images.redb"))?;
        let files = LayerFiles::open(&root)?;
        let shared = Shared {
            downloads: Semaphore::new(config.max_parallel_layers.max(1)),
            config,
            files,
            pulls: Pulls::default(),
            records,
            reserve: Reserve::new(root.join("reserve")),
            needed: Mutex::default(),
            makers: Mutex::default(),
        };
        shared.collect()?;
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// By reference, by id, or by a beginning of an id that no other has.
    pub fn find(&self, name: &str) -> Result<Option<Image>, StoreError> {
        self.shared
            .find(name)?
            .map(|record| self.image(record))
            .transpose()
    }

    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let records = self.shared.records.images()?;
        records
            .into_iter()
            .map(|record| self.image(record))
            .collect()
    }

    /// Fetches what of the image is missing here. A dropped pull leaves nothing behind.
    pub async fn pull(
        &self,
        name: &str,
        credentials: Option<Credentials>,
    ) -> Result<Image, PullError> {
        let reference: Reference = name.parse().map_err(StoreError::from)?;
        let record = pull::pull(&self.shared, &reference, credentials).await?;
        Ok(self.image(record)?)
    }

    /// How far the pull of `name` is, if one is in progress.
    pub fn progress(&self, name: &str) -> Option<PullProgress> {
        let reference: Reference = name.parse().ok()?;
        self.shared.pulls.read(&reference.to_string())
    }

    /// Forgets an image with all its names; the layers that nobody else needs go. One that is not here is fine.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        if let Some(record) = self.shared.find(name)? {
            let shared = &self.shared;
            shared
                .reserve
                .with(|| shared.records.remove_image(&record.id))?;
            shared.collect()?;
            shared.reserve.fill();
        }
        Ok(())
    }

    /// Keeps an image's layers for `holder` until [`Self::release`]; bottom first.
    pub fn lease(&self, id: &str, holder: &str) -> Result<Vec<LayerBlob>, StoreError> {
        let _exclusive = self.shared.lock_needed();
        let record = self
            .shared
            .find(id)?
            .ok_or_else(|| StoreError::NotFound(id.to_owned()))?;
        self.shared.records.add_lease(holder, &record.layers)?;
        let blob = |diff_id: &Digest| LayerBlob {
            diff_id: diff_id.to_string(),
            path: self.shared.files.path(diff_id),
        };
        Ok(record.layers.iter().map(blob).collect())
    }

    /// An unknown holder is fine.
    pub fn release(&self, holder: &str) -> Result<(), StoreError> {
        let shared = &self.shared;
        if shared
            .reserve
            .with(|| shared.records.remove_lease(holder))?
        {
            shared.collect()?;
            shared.reserve.fill();
        }
        Ok(())
    }

    /// All that have leases.
    pub fn holders(&self) -> Result<Vec<String>, StoreError> {
        let leases = self.shared.records.leases()?;
        Ok(leases.into_iter().map(|(holder, _)| holder).collect())
    }

    pub fn usage(&self) -> Result<Usage, StoreError> {
        self.shared.files.usage()
    }

    fn image(&self, record: ImageRecord) -> Result<Image, StoreError> {
        let sizes = record
            .layers
            .iter()
            .map(|layer| self.shared.files.size(layer));
        let pinned = self.shared.config.pinned.iter().map(ToString::to_string);
        let is_name =
            |name: String| record.repo_tags.contains(&name) || record.repo_digests.contains(&name);
        Ok(Image {
            pinned: pinned.into_iter().any(is_name),
            // A record of an earlier version knows nothing of its metadata.
            size_bytes: sizes
                .sum::<Result<u64, _>>()?
                .saturating_add(record.metadata_bytes)
                .max(1),
            id: record.id,
            repo_tags: record.repo_tags.into_iter().collect(),
            repo_digests: record.repo_digests.into_iter().collect(),
            defaults: record.defaults,
        })
    }
}

impl Shared {
    fn find(&self, name: &str) -> Result<Option<ImageRecord>, StoreError> {
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
            shared: Arc::clone(self),
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
pub(crate) struct Needed {
    shared: Arc<Shared>,
    layers: Vec<Digest>,
}

impl Drop for Needed {
    fn drop(&mut self) {
        let mut needed = self.shared.lock_needed();
        for layer in &self.layers {
            if let Some(count) = needed.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    needed.remove(layer);
                }
            }
        }
        drop(needed);
        if let Err(error) = self.shared.collect() {
            tracing::warn!(error = chain(&error), "unused layers stay");
        }
    }
}

#[cfg(test)]
mod tests;
