// SPDX-License-Identifier: Apache-2.0
//! The entry point: lists and removes the images of the store, and pulls others. [`crate::contents`] stores them,
//! [`crate::pull`] downloads them.

use std::sync::Arc;

use bulkhead_records::Sum;

use crate::config::{Config, Credentials};
use crate::contents::{Contents, ImageRecord, LayerBlob, StoreError, Usage};
use crate::digest::Digest;
use crate::manifest::ImageDefaults;
use crate::progress::PullProgress;
use crate::pull::{self, PullError};
use crate::reference::Reference;

/// An image in the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// The digest of its configuration. Of an artifact, that of its manifest, because many have the same configuration.
    pub id: Digest,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    /// What its layers take on disk, plus the size of its manifests and configuration. Never 0, because kubelet takes 0
    /// for an error.
    pub size_bytes: u64,
    /// Whether one of its names is in [`Config::pinned`].
    pub pinned: bool,
    pub defaults: ImageDefaults,
    /// What it is if it is no container image but an artifact. It can be mounted, but no container can run it.
    pub artifact_type: Option<String>,
}

/// The store. Cloning is cheap; all clones are the same store.
#[derive(Clone, Debug)]
pub struct Store {
    contents: Arc<Contents>,
}

impl Store {
    /// Opens or creates the store below `config.root`, and removes what an earlier process left unfinished.
    pub fn open(config: Config) -> Result<Self, StoreError> {
        Ok(Self {
            contents: Arc::new(Contents::open(config)?),
        })
    }

    /// Finds an image by reference, by id, or by a prefix of an id that no other image has. An image of which a layer is
    /// missing, because it was damaged, is not there: it must be pulled again.
    pub fn find(&self, name: &str) -> Result<Option<Image>, StoreError> {
        self.contents
            .find(name)?
            .filter(|record| self.contents.is_complete(record))
            .map(|record| self.image(record))
            .transpose()
    }

    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let records = self.contents.images()?;
        records
            .into_iter()
            .map(|record| self.image(record))
            .collect()
    }

    /// Downloads the missing parts of an image. If the future is dropped, nothing is left behind.
    pub async fn pull(
        &self,
        name: &str,
        credentials: Option<Credentials>,
    ) -> Result<Image, PullError> {
        let reference: Reference = name.parse().map_err(StoreError::from)?;
        let record = pull::pull(&self.contents, &reference, credentials).await?;
        Ok(self.image(record)?)
    }

    /// How far the pull of `name` is, if one is running.
    pub fn progress(&self, name: &str) -> Option<PullProgress> {
        let reference: Reference = name.parse().ok()?;
        self.contents.pulls.read(&reference.to_string())
    }

    /// Removes an image with all its names, and the layers that nothing else needs. It is no error if there is none.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        match self.contents.find(name)? {
            Some(record) => self.contents.remove(&record.id),
            None => Ok(()),
        }
    }

    /// Keeps an image's layers for `holder` until [`Self::release`]. Returns them, the bottom one first.
    pub fn lease(&self, id: &str, holder: &str) -> Result<Vec<LayerBlob>, StoreError> {
        self.contents.lease(id, holder)
    }

    /// Ends the lease of `holder`. It is no error if there is none.
    pub fn release(&self, holder: &str) -> Result<(), StoreError> {
        self.contents.release(holder)
    }

    /// The sum of a layer's file system, by the layer's diff id. `None` if there is no such layer.
    pub fn layer_sum(&self, diff_id: &str) -> Result<Option<Sum>, StoreError> {
        self.contents.layer_sum(diff_id)
    }

    /// The holders of all leases.
    pub fn holders(&self) -> Vec<String> {
        self.contents.holders()
    }

    pub fn usage(&self) -> Result<Usage, StoreError> {
        self.contents.files.usage()
    }

    fn image(&self, record: ImageRecord) -> Result<Image, StoreError> {
        let sizes = record
            .layers
            .iter()
            .map(|layer| self.contents.files.size(layer));
        let pinned = self.contents.config.pinned.iter().map(ToString::to_string);
        let is_name =
            |name: String| record.repo_tags.contains(&name) || record.repo_digests.contains(&name);
        Ok(Image {
            pinned: pinned.into_iter().any(is_name),
            // Records of an earlier version have no metadata size, so it may be 0.
            size_bytes: sizes
                .sum::<Result<u64, _>>()?
                .saturating_add(record.metadata_bytes)
                .max(1),
            id: record.id,
            repo_tags: record.repo_tags.into_iter().collect(),
            repo_digests: record.repo_digests.into_iter().collect(),
            defaults: record.defaults,
            artifact_type: record.artifact_type,
        })
    }
}

#[cfg(test)]
mod tests;
