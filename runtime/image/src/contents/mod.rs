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
mod index;
mod records;
mod sources;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_records::{Intact, RecordsError, Sum};
use bulkhead_text::chain;

use crate::config::Config;
use crate::digest::Digest;
use crate::failure::FailureKind;
use crate::layer::{Limits, Memory};
use crate::progress::Pulls;
use crate::reference::{Reference, ReferenceError};
use crate::turns::Turns;
use files::LayerFiles;
use index::Index;
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
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl StoreError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Reference(_) | Self::Ambiguous { .. } => FailureKind::Invalid,
            Self::NotFound(_) => FailureKind::NotFound,
            Self::Damaged { .. } => FailureKind::Corrupt,
            Self::Files { source, .. } => FailureKind::of_io(source),
            Self::Fault(_) => FailureKind::Internal,
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
    index: RwLock<Index>,
    /// Held while records are changed, and then the index. Who reads the index does not wait for it.
    changing: Mutex<()>,
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
        let index = Index::new(records.images()?, records.leases()?);
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
            index: RwLock::new(index),
            changing: Mutex::default(),
            intact: Intact::default(),
            needed: Mutex::default(),
            makers: Mutex::default(),
        };
        contents.collect()?;
        contents.check_lengths()?;
        Ok(contents)
    }

    /// All images. Each record is read by itself, so that nobody waits until all of them are.
    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let ids = self.index().ids();
        let read = |id| match self.records.image(id) {
            // One that cannot be read does not hide the others.
            Err(error @ RecordsError::Decode { .. }) => {
                tracing::error!("{}", chain(&error));
                None
            }
            read => read.transpose(),
        };
        Ok(ids.iter().filter_map(read).collect::<Result<_, _>>()?)
    }

    /// Finds an image by reference, by id, or by a prefix of an id that no other image has.
    pub fn find(&self, name: &str) -> Result<Option<ImageRecord>, StoreError> {
        if let Ok(id) = name.parse::<Digest>() {
            return Ok(self.records.image(&id)?);
        }
        let reference = name.parse::<Reference>();
        if let Ok(reference) = &reference {
            let named = self.index().named(&reference.to_string()).cloned();
            if let Some(id) = named {
                return Ok(self.records.image(&id)?);
            }
        }
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        if digits.len() < MIN_ID_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return reference.map(|_| None).map_err(Into::into);
        }
        let index = self.index();
        let matches: Vec<Digest> = index.beginning_with(digits).take(2).cloned().collect();
        drop(index);
        match matches.as_slice() {
            [] => Ok(None),
            [id] => Ok(self.records.image(id)?),
            _ => Err(StoreError::Ambiguous {
                name: name.to_owned(),
            }),
        }
    }

    /// Removes an image, and the layers that nothing else needs.
    pub fn remove(&self, id: &Digest) -> Result<(), StoreError> {
        let removed = || Ok(self.records.remove_image(id)?);
        self.change(removed, |index, ()| index.remove_image(id))?;
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
        let layers = &record.layers;
        let leased = || Ok(self.records.add_lease(holder, layers)?);
        self.change(leased, |index, ()| index.add_lease(holder, layers))?;
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

    /// The sum of a layer's file system. `None` if there is no such layer.
    pub fn layer_sum(&self, diff_id: &str) -> Result<Option<Sum>, StoreError> {
        match diff_id.parse::<Digest>() {
            Ok(layer) => Ok(self.records.sum(&layer)?),
            Err(_) => Ok(None),
        }
    }

    /// Ends the lease of `holder`. It is no error if there is none.
    pub fn release(&self, holder: &str) -> Result<(), StoreError> {
        let released = || Ok(self.records.remove_lease(holder)?);
        if self.change(released, |index, _| index.remove_lease(holder))? {
            self.collect()?;
            self.records.fill_reserve();
        }
        Ok(())
    }

    /// The holders of all leases.
    pub fn holders(&self) -> Vec<String> {
        self.index().holders()
    }

    /// Whether all layers of an image are in the store. One that was damaged is not.
    pub fn is_complete(&self, record: &ImageRecord) -> bool {
        record.layers.iter().all(|layer| self.files.has(layer))
    }

    /// Adds an image to the store. Call it while its layers are claimed by [`Self::need`]. A tag that named another
    /// image moves to this one.
    pub fn publish(&self, record: &ImageRecord) -> Result<ImageRecord, StoreError> {
        let added = || {
            // Nobody else changes the index meanwhile.
            let named = record
                .repo_tags
                .iter()
                .map(|tag| self.index().named(tag).cloned());
            let others: Vec<Digest> = named.flatten().filter(|id| *id != record.id).collect();
            Ok(self.records.add_image(record, &others)?)
        };
        self.change(added, |index, merged| index.add_image(merged))
    }

    /// Changes the records and then, in the same order for all, the index.
    fn change<T>(
        &self,
        write: impl FnOnce() -> Result<T, StoreError>,
        note: impl FnOnce(&mut Index, &T),
    ) -> Result<T, StoreError> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let written = write();
        let read_again = match &written {
            Ok(_) => None,
            // What failed at its end may be there all the same.
            Err(_) => match (self.records.images(), self.records.leases()) {
                (Ok(images), Ok(leases)) => Some(Index::new(images, leases)),
                _ => None,
            },
        };
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        match (&written, read_again) {
            (Ok(value), _) => note(&mut index, value),
            (Err(_), Some(read_again)) => *index = read_again,
            (Err(_), None) => {}
        }
        written
    }

    fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
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
        faults::within(Step::CollectLayers, || self.collect_now())
    }

    fn collect_now(&self) -> Result<(), StoreError> {
        let needed = self.lock_needed();
        let mut named = self.index().layers();
        named.extend(needed.keys().cloned());
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
