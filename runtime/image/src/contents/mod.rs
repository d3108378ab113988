// SPDX-License-Identifier: Apache-2.0
//! What the store contains and who needs it: files of layers, records of images and leases, claims of running pulls.
//!
//! ```text
//! ROOT/images.redb        records of images, leases and sums of layers, transactional ([`records`])
//! ROOT/layers/HEX.erofs   one file per layer, named by diff id, never changed
//! ROOT/sources/HEX.json   which registries sent the layer ([`sources`])
//! ROOT/partial/           unfinished layers; emptied at start
//! ROOT/reserve            space for removals on a full disk
//! ```
//! A layer's file stays as long as an image, a lease or a running pull names it, and no longer. It is compared with its
//! sum before a guest may read it ([`damage`]).

mod damage;
mod files;
mod records;
mod sources;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bulkhead_records::{Intact, RecordsError};
use bulkhead_text::chain;

use crate::config::Config;
use crate::digest::Digest;
use crate::failure::FailureKind;
use crate::layer::{Limits, Memory};
use crate::progress::Pulls;
use crate::reference::{Reference, ReferenceError};
use crate::turns::Turns;
use files::LayerFiles;
pub use records::ImageRecord;
use records::Records;
pub use sources::Source;
use sources::Sources;

/// A shorter prefix of an image id is not looked up.
pub const MIN_ID_DIGITS: usize = 4;

/// Why an operation of the store failed.
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
    #[error("records of images")]
    Records(#[from] RecordsError),
    #[error("{name:?} is a prefix of more than one image id")]
    Ambiguous { name: String },
    #[error("layer {layer} is damaged ({why}) and was removed: pull the image again")]
    Damaged { layer: Digest, why: String },
    #[error("image {0} is not in the store")]
    NotFound(String),
}

impl StoreError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Reference(_) | Self::Ambiguous { .. } => FailureKind::Invalid,
            Self::NotFound(_) => FailureKind::NotFound,
            Self::Damaged { .. } => FailureKind::Corrupt,
            Self::Files { source, .. } => FailureKind::of_io(source),
            Self::Records(error) => error.io().map_or(FailureKind::Internal, FailureKind::of_io),
        }
    }
}

/// A layer as an EROFS file.
#[derive(Clone, Debug)]
pub struct LayerBlob {
    pub diff_id: String,
    pub path: PathBuf,
}

/// What the store takes on its file system, apart from the few pages of its records.
#[derive(Clone, Debug)]
pub struct Usage {
    pub directory: PathBuf,
    pub used_bytes: u64,
    pub inodes: u64,
}

/// The state that the store and running pulls share.
#[derive(Debug)]
pub struct Contents {
    pub config: Config,
    pub files: LayerFiles,
    pub sources: Sources,
    pub turns: Turns,
    pub pulls: Pulls,
    memory: Arc<Memory>,
    records: Records,
    intact: Intact,
    /// Layers that running pulls need, each with the number of those pulls. Its lock keeps a removal from running while
    /// someone claims a layer.
    needed: Mutex<HashMap<Digest, usize>>,
    makers: Mutex<HashMap<(Source, Digest), Maker>>,
}

/// The lock for a layer that is being created from one source. Its holder creates the layer; other pulls wait for it.
type Maker = Weak<tokio::sync::Mutex<()>>;

impl Contents {
    /// Opens or creates the directory, and removes what an earlier process left unfinished.
    pub fn open(config: Config) -> Result<Self, StoreError> {
        let root = config.root.clone();
        files::make_directory(&root)?;
        // Open the records first. It fails while another process uses the store, and then its partial files must stay.
        let records = Records::open(config.records(), root.join("reserve"))?;
        let files = LayerFiles::open(&root)?;
        let contents = Self {
            sources: Sources::open(&root)?,
            turns: Turns::new(
                config.max_parallel_layers_per_host,
                config.max_parallel_layers,
            ),
            config,
            files,
            pulls: Pulls::default(),
            memory: Arc::default(),
            records,
            intact: Intact::default(),
            needed: Mutex::default(),
            makers: Mutex::default(),
        };
        contents.collect()?;
        contents.check_lengths()?;
        Ok(contents)
    }

    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        Ok(self.records.images()?)
    }

    /// Finds an image by reference, by id, or by a prefix of an id that no other image has.
    pub fn find(&self, name: &str) -> Result<Option<ImageRecord>, StoreError> {
        if let Ok(id) = name.parse::<Digest>() {
            return Ok(self.records.image(&id)?);
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

    /// Removes an image, and the layers that nothing else needs.
    pub fn remove(&self, id: &Digest) -> Result<(), StoreError> {
        self.records.remove_image(id)?;
        self.collect()?;
        self.records.fill_reserve();
        Ok(())
    }

    /// Keeps an image's layers for `holder` until [`Self::release`]. Returns them, the bottom one first. Reads those that
    /// this process has not checked yet, so it may take long.
    pub fn lease(&self, id: &str, holder: &str) -> Result<Vec<LayerBlob>, StoreError> {
        let exclusive = self.lock_needed();
        let found = self.find(id)?;
        let record = found.ok_or_else(|| StoreError::NotFound(id.to_owned()))?;
        self.records.add_lease(holder, &record.layers)?;
        drop(exclusive);
        for layer in &record.layers {
            self.check(layer)?;
        }
        let blob = |diff_id: &Digest| LayerBlob {
            diff_id: diff_id.to_string(),
            path: self.files.path(diff_id),
        };
        Ok(record.layers.iter().map(blob).collect())
    }

    /// Ends the lease of `holder`. It is no error if there is none.
    pub fn release(&self, holder: &str) -> Result<(), StoreError> {
        if self.records.remove_lease(holder)? {
            self.collect()?;
            self.records.fill_reserve();
        }
        Ok(())
    }

    /// The holders of all leases.
    pub fn holders(&self) -> Result<Vec<String>, StoreError> {
        let leases = self.records.leases()?;
        Ok(leases.into_iter().map(|(holder, _)| holder).collect())
    }

    /// Whether all layers of an image are in the store. One that was damaged is not.
    pub fn is_complete(&self, record: &ImageRecord) -> bool {
        record.layers.iter().all(|layer| self.files.has(layer))
    }

    /// Adds an image to the store. Call it while its layers are claimed by [`Self::need`]. A tag that named another
    /// image moves to this one.
    pub fn publish(&self, record: &ImageRecord) -> Result<ImageRecord, StoreError> {
        Ok(self.records.add_image(record)?)
    }

    /// Claims `layers`, whether they exist or not: none is removed until the guard is dropped.
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

    /// The lock for creating a layer from `source`. Who gets it first creates the layer; the others then find it
    /// finished.
    pub fn maker(&self, source: &Source, layer: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut makers = self.makers.lock().unwrap_or_else(PoisonError::into_inner);
        makers.retain(|_, maker| maker.strong_count() > 0);
        let key = (source.clone(), layer.clone());
        if let Some(maker) = makers.get(&key).and_then(Weak::upgrade) {
            return maker;
        }
        let maker = Arc::default();
        makers.insert(key, Arc::downgrade(&maker));
        maker
    }

    /// What a pull that begins now may take.
    pub fn limits(&self) -> Result<Limits, StoreError> {
        let Config {
            root,
            max_image_bytes,
            keep_free_bytes,
            ..
        } = &self.config;
        Limits::new(root, *max_image_bytes, *keep_free_bytes, &self.memory)
            .map_err(files::failed("read the free space of", root))
    }

    fn lock_needed(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.needed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the layers that no image, lease or pull names.
    fn collect(&self) -> Result<(), StoreError> {
        let needed = self.lock_needed();
        let mut named: std::collections::HashSet<Digest> = needed.keys().cloned().collect();
        for record in self.records.images()? {
            named.extend(record.layers);
        }
        for (_, layers) in self.records.leases()? {
            named.extend(layers);
        }
        self.files.retain(|layer| named.contains(layer))?;
        self.sources.retain(|layer| named.contains(layer))?;
        let is_named = |key: &str| {
            key.parse::<Digest>()
                .is_ok_and(|layer| named.contains(&layer))
        };
        Ok(self.records.retain_sums(is_named)?)
    }
}

/// The claim of a running pull on layers that no record names yet.
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
            tracing::warn!(error = chain(&error), "cannot remove unused layers");
        }
    }
}
