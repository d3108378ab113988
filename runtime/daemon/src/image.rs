// SPDX-License-Identifier: Apache-2.0
//! The image store as pods and CRI see it: our words for what `bulkhead_image` has.

use std::collections::HashSet;
use std::path::PathBuf;

use bulkhead_image as store;

pub use store::{Credentials, FailureKind, PullProgress};

/// An error of the image store.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Pull(#[from] store::PullError),
    #[error(transparent)]
    Store(#[from] store::StoreError),
}

/// An image that is here.
#[derive(Clone, Debug)]
pub struct Image {
    pub id: String,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    pub size_bytes: u64,
    pub pinned: bool,
    pub defaults: Defaults,
}

/// What an image says about the containers made from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    /// `NAME=value`.
    pub environment: Vec<String>,
    pub working_directory: String,
    pub user: String,
    pub stop_signal: String,
}

/// A layer as a file.
#[derive(Clone, Debug)]
pub struct Layer {
    pub diff_id: String,
    pub path: PathBuf,
}

/// What the store takes on its file system.
#[derive(Clone, Debug)]
pub struct Usage {
    pub directory: PathBuf,
    pub used_bytes: u64,
    pub inodes: u64,
}

/// The image store. Cheap calls answer at once; a pull takes as long as it takes.
#[derive(Debug)]
pub struct Images {
    store: store::Store,
}

impl Images {
    pub fn open(config: store::Config) -> Result<Self, ImageError> {
        Ok(Self {
            store: store::Store::open(config)?,
        })
    }

    /// By a reference, an id or a unique beginning of one.
    pub async fn find(&self, name: &str) -> Result<Option<Image>, ImageError> {
        Ok(self.store.find(name)?.map(image))
    }

    pub async fn list(&self) -> Result<Vec<Image>, ImageError> {
        Ok(self.store.list()?.into_iter().map(image).collect())
    }

    pub async fn pull(
        &self,
        name: &str,
        credentials: Option<Credentials>,
    ) -> Result<Image, ImageError> {
        Ok(image(self.store.pull(name, credentials).await?))
    }

    /// How far the pull of `name` is, if one is in progress.
    pub fn progress(&self, name: &str) -> Option<PullProgress> {
        self.store.progress(name)
    }

    /// One that is not there is fine.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        Ok(self.store.remove(name)?)
    }

    /// Keeps an image's layers for `holder` until they are released; bottom first.
    pub async fn lease(&self, id: &str, holder: &str) -> Result<Vec<Layer>, ImageError> {
        let blobs = self.store.lease(id, holder)?;
        let layer = |blob: store::LayerBlob| Layer {
            diff_id: blob.diff_id,
            path: blob.path,
        };
        Ok(blobs.into_iter().map(layer).collect())
    }

    /// An unknown holder is fine.
    pub fn release(&self, holder: &str) -> Result<(), ImageError> {
        Ok(self.store.release(holder)?)
    }

    pub fn holders(&self) -> Result<HashSet<String>, ImageError> {
        Ok(self.store.holders()?.into_iter().collect())
    }

    pub async fn usage(&self) -> Result<Usage, ImageError> {
        let usage = self.store.usage()?;
        Ok(Usage {
            directory: usage.directory,
            used_bytes: usage.used_bytes,
            inodes: usage.inodes,
        })
    }
}

impl ImageError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Pull(error) => error.kind(),
            Self::Store(error) => error.kind(),
        }
    }
}

fn image(image: store::Image) -> Image {
    let defaults = image.defaults;
    Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags,
        repo_digests: image.repo_digests,
        size_bytes: image.size_bytes,
        pinned: false,
        defaults: Defaults {
            entrypoint: defaults.entrypoint,
            command: defaults.cmd,
            environment: defaults.env,
            working_directory: defaults.working_dir,
            user: defaults.user,
            stop_signal: defaults.stop_signal,
        },
    }
}
