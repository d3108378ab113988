// SPDX-License-Identifier: Apache-2.0
//! Records of images and leases in redb; every change is one durable transaction.

use std::collections::BTreeSet;
use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::digest::Digest;
use crate::manifest::ImageDefaults;

/// Image id to [`ImageRecord`] as JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Holder to the diff ids of its layers as JSON.
const LEASES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("leases");

/// What is kept of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    pub id: Digest,
    pub repo_tags: BTreeSet<String>,
    pub repo_digests: BTreeSet<String>,
    /// Diff ids, bottom first, each once.
    pub layers: Vec<Digest>,
    pub defaults: ImageDefaults,
}

#[derive(Debug)]
pub struct Records {
    database: Database,
}

impl Records {
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|source| StoreError::Open {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let records = Self { database };
        // Reading needs the tables to be there.
        records.change(|_, _| Ok(()))?;
        Ok(records)
    }

    pub fn image(&self, id: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(IMAGES).map_err(failed)?;
        let value = table.get(id.as_str()).map_err(failed)?;
        value
            .map(|value| parse(id.as_str(), value.value()))
            .transpose()
    }

    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let records = self.all(IMAGES)?;
        Ok(records.into_iter().map(|(_, record)| record).collect())
    }

    pub fn leases(&self) -> Result<Vec<(String, Vec<Digest>)>, StoreError> {
        self.all(LEASES)
    }

    /// Adds an image, or names to one that is known; its tags are taken from all others. Tells what is there now.
    pub fn add_image(&self, record: &ImageRecord) -> Result<ImageRecord, StoreError> {
        let mut merged = record.clone();
        let others = self.images()?;
        self.change(|images, _| {
            for mut other in others {
                if other.id == record.id {
                    merged.repo_tags.extend(other.repo_tags);
                    merged.repo_digests.extend(other.repo_digests);
                    continue;
                }
                let before = other.repo_tags.len();
                other
                    .repo_tags
                    .retain(|tag| !record.repo_tags.contains(tag));
                if other.repo_tags.len() < before {
                    images
                        .insert(other.id.as_str(), json(&other)?.as_slice())
                        .map_err(failed)?;
                }
            }
            images
                .insert(merged.id.as_str(), json(&merged)?.as_slice())
                .map_err(failed)?;
            Ok(())
        })?;
        Ok(merged)
    }

    pub fn remove_image(&self, id: &Digest) -> Result<(), StoreError> {
        self.change(|images, _| {
            images.remove(id.as_str()).map_err(failed)?;
            Ok(())
        })
    }

    /// Adds to what `holder` has.
    pub fn add_lease(&self, holder: &str, layers: &[Digest]) -> Result<(), StoreError> {
        self.change(|_, leases| {
            let held = leases.get(holder).map_err(failed)?;
            let held: Option<BTreeSet<Digest>> =
                held.map(|value| parse(holder, value.value())).transpose()?;
            let mut held = held.unwrap_or_default();
            held.extend(layers.iter().cloned());
            leases
                .insert(holder, json(&held)?.as_slice())
                .map_err(failed)?;
            Ok(())
        })
    }

    /// Whether there was one.
    pub fn remove_lease(&self, holder: &str) -> Result<bool, StoreError> {
        let mut was_there = false;
        self.change(|_, leases| {
            was_there = leases.remove(holder).map_err(failed)?.is_some();
            Ok(())
        })?;
        Ok(was_there)
    }

    fn all<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'_, &'static str, &'static [u8]>,
    ) -> Result<Vec<(String, T)>, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(table).map_err(failed)?;
        let mut all = Vec::new();
        for entry in table.iter().map_err(failed)? {
            let (key, value) = entry.map_err(failed)?;
            all.push((key.value().to_owned(), parse(key.value(), value.value())?));
        }
        Ok(all)
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Table<'_>, &mut Table<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let transaction = self.database.begin_write().map_err(failed)?;
        {
            let mut images = transaction.open_table(IMAGES).map_err(failed)?;
            let mut leases = transaction.open_table(LEASES).map_err(failed)?;
            change(&mut images, &mut leases)?;
        }
        transaction.commit().map_err(failed)
    }
}

type Table<'a> = redb::Table<'a, &'static str, &'static [u8]>;

fn failed(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Records(Box::new(error.into()))
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|source| StoreError::Damaged {
        what: what.to_owned(),
        source,
    })
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|source| StoreError::Damaged {
        what: "an image or a lease".to_owned(),
        source,
    })
}
