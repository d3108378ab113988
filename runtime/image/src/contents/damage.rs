// SPDX-License-Identifier: Apache-2.0
//! Notices layers whose files are not as they were made.
//!
//! A damaged layer is removed. Then its images are incomplete, so they are not found, and the next pull brings the layer
//! anew. VMs that have the file open keep it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bulkhead_records::Sum;
use tokio::task::spawn_blocking;

use super::files::PartialLayer;
use super::{Contents, StoreError};
use crate::digest::Digest;

impl Contents {
    /// Gives a finished layer its name, and records what it contains.
    pub fn keep(&self, partial: PartialLayer, layer: &Digest, sum: &Sum) -> Result<(), StoreError> {
        self.records.add_sum(layer, sum)?;
        self.files.keep(partial, layer)?;
        // Then the first container need not read it again.
        let trusted = self.intact.trust(&self.files.path(layer));
        trusted.map_err(|source| self.unread(layer, source))
    }

    /// Compares a layer with its sum, unless it was found intact and has not changed since.
    pub fn check(&self, layer: &Digest) -> Result<(), StoreError> {
        let path = self.files.path(layer);
        let file = File::open(&path).map_err(|source| self.unread(layer, source))?;
        let Some(sum) = self.records.sum(layer)? else {
            // An earlier version has made it, so what it contains now must do.
            let sum = Sum::of(&file).map_err(|source| self.unread(layer, source))?;
            self.records.add_sum(layer, &sum)?;
            return Ok(());
        };
        let why = match self.intact.is(&path, &file, &sum) {
            Ok(true) => return Ok(()),
            Ok(false) => match file.metadata().map(|metadata| metadata.len()) {
                Ok(bytes) if bytes != sum.bytes => {
                    format!("it has {bytes} bytes instead of {}", sum.bytes)
                }
                _ => "its contents have changed".to_owned(),
            },
            // A block that the disk cannot read any more.
            Err(error) => format!("it cannot be read: {error}"),
        };
        self.discard(layer)?;
        let layer = layer.clone();
        Err(StoreError::Damaged { layer, why })
    }

    /// Whether a layer is in the store and intact.
    pub async fn has_intact(self: &Arc<Self>, layer: &Digest) -> Result<bool, StoreError> {
        if !self.files.has(layer) {
            return Ok(false);
        }
        let (contents, layer) = (Arc::clone(self), layer.clone());
        let checked = spawn_blocking(move || contents.check(&layer)).await;
        match checked {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error @ StoreError::Damaged { .. })) => {
                tracing::error!("{error}");
                Ok(false)
            }
            Ok(Err(error)) => Err(error),
            // It panicked; the caller makes the layer anew.
            Err(_) => Ok(false),
        }
    }

    /// Removes layers of a wrong length. This is done at the start, because it reads no file.
    pub(super) fn check_lengths(&self) -> Result<(), StoreError> {
        for (layer, sum) in self.records.sums()? {
            let length = std::fs::metadata(self.files.path(&layer)).map(|file| file.len());
            if let Ok(bytes) = length
                && bytes != sum.bytes
            {
                tracing::error!(
                    "layer {layer} is damaged (it has {bytes} bytes instead of {}); removing it, so that its images are \
                     pulled again",
                    sum.bytes
                );
                self.discard(&layer)?;
            }
        }
        Ok(())
    }

    /// Removes the file of a damaged layer.
    fn discard(&self, layer: &Digest) -> Result<(), StoreError> {
        self.intact.forget(&self.files.path(layer));
        self.files.remove(layer)
    }

    fn unread(&self, layer: &Digest, source: io::Error) -> StoreError {
        StoreError::Files {
            operation: "read",
            path: self.files.path(layer),
            source,
        }
    }
}

#[cfg(test)]
impl Contents {
    /// Leaves the store as an earlier version has left it.
    pub fn forget_sums(&self) {
        self.records.retain_sums(|_| false).unwrap();
    }

    pub fn has_no_sums(&self) -> bool {
        self.records.sums().unwrap().is_empty()
    }
}
