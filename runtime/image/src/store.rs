// SPDX-License-Identifier: Apache-2.0
//! The way in: the images that are here, and pulls of those that are not. [`crate::contents`] keeps them,
//! [`crate::pull`] fetches them.

use std::sync::Arc;

use crate::config::{Config, Credentials};
use crate::contents::{Contents, ImageRecord, LayerBlob, StoreError, Usage};
use crate::digest::Digest;
use crate::manifest::ImageDefaults;
use crate::progress::PullProgress;
use crate::pull::{self, PullError};
use crate::reference::Reference;

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

/// The store. Cheap to clone; all clones are the same store.
#[derive(Clone, Debug)]
pub struct Store {
    contents: Arc<Contents>,
}

impl Store {
    /// Opens or makes the store below `config.root`, and removes what an earlier process left half done.
    pub fn open(config: Config) -> Result<Self, StoreError> {
        Ok(Self {
            contents: Arc::new(Contents::open(config)?),
        })
    }

    /// By reference, by id, or by a beginning of an id that no other has.
    pub fn find(&self, name: &str) -> Result<Option<Image>, StoreError> {
        self.contents
            .find(name)?
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

    /// Fetches what of the image is missing here. A dropped pull leaves nothing behind.
    pub async fn pull(
        &self,
        name: &str,
        credentials: Option<Credentials>,
    ) -> Result<Image, PullError> {
        let reference: Reference = name.parse().map_err(StoreError::from)?;
        let record = pull::pull(&self.contents, &reference, credentials).await?;
        Ok(self.image(record)?)
    }

    /// How far the pull of `name` is, if one is in progress.
    pub fn progress(&self, name: &str) -> Option<PullProgress> {
        let reference: Reference = name.parse().ok()?;
        self.contents.pulls.read(&reference.to_string())
    }

    /// Forgets an image with all its names; the layers that nobody else needs go. One that is not here is fine.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        match self.contents.find(name)? {
            Some(record) => self.contents.remove(&record.id),
            None => Ok(()),
        }
    }

    /// Keeps an image's layers for `holder` until [`Self::release`]; bottom first.
    pub fn lease(&self, id: &str, holder: &str) -> Result<Vec<LayerBlob>, StoreError> {
        self.contents.lease(id, holder)
    }

    /// An unknown holder is fine.
    pub fn release(&self, holder: &str) -> Result<(), StoreError> {
        self.contents.release(holder)
    }

    /// All that have leases.
    pub fn holders(&self) -> Result<Vec<String>, StoreError> {
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

#[cfg(test)]
mod tests;
