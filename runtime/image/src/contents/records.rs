// SPDX-License-Identifier: Apache-2.0
//! Records of images and leases.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bulkhead_records::{Place, Records as Tables, RecordsError, Room, Sum, Table};
use bulkhead_text::chain;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::manifest::ImageDefaults;

/// Maps an image id to its [`ImageRecord`].
const IMAGES: Table = Table::new("images");
/// Maps a holder to the diff ids of its layers.
const LEASES: Table = Table::new("leases");
/// Maps a diff id to the [`Sum`] of the layer's file.
const SUMS: Table = Table::new("sums");

/// What is stored about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    pub id: Digest,
    pub repo_tags: BTreeSet<String>,
    pub repo_digests: BTreeSet<String>,
    /// Diff ids, the bottom one first, each only once; for an artifact the names that [`crate::layer::Content`] gives.
    pub layers: Vec<Digest>,
    pub defaults: ImageDefaults,
    /// The size of its manifests and its configuration, as the registry sent them.
    #[serde(default)]
    pub metadata_bytes: u64,
    /// What it is if it is no container image but an artifact.
    #[serde(default)]
    pub artifact_type: Option<String>,
}

/// The records. One that cannot be read is logged and left out: its image is not there, and the next pull replaces it.
#[derive(Debug)]
pub struct Records(Tables);

impl Records {
    /// Opens or creates the records.
    pub fn open(path: PathBuf, reserve: PathBuf) -> Result<Self, RecordsError> {
        let place = Place {
            path,
            reserve,
            tables: &[IMAGES, LEASES, SUMS],
        };
        let records = Self(Tables::open(place)?);
        records.forget_unreadable()?;
        Ok(records)
    }

    /// Forgets what cannot be read. Otherwise it would stay for ever, because nobody can name it.
    fn forget_unreadable(&self) -> Result<(), RecordsError> {
        let images = self.0.all::<ImageRecord>(IMAGES)?;
        let leases = self.0.all::<Vec<Digest>>(LEASES)?;
        let images = images
            .iter()
            .filter_map(|(key, row)| Some((IMAGES, key, row.as_ref().err()?)));
        let leases = leases
            .iter()
            .filter_map(|(key, row)| Some((LEASES, key, row.as_ref().err()?)));
        for (table, key, error) in images.chain(leases) {
            tracing::error!(
                "{}; it is forgotten. An image must be pulled again",
                chain(error)
            );
            self.0
                .change(Room::Reserve, |change| change.remove(table, key))?;
        }
        Ok(())
    }

    pub fn image(&self, id: &Digest) -> Result<Option<ImageRecord>, RecordsError> {
        self.0.get(IMAGES, id.as_str())
    }

    pub fn images(&self) -> Result<Vec<ImageRecord>, RecordsError> {
        let records = self.all(IMAGES)?;
        Ok(records.into_iter().map(|(_, record)| record).collect())
    }

    pub fn leases(&self) -> Result<Vec<(String, Vec<Digest>)>, RecordsError> {
        self.all(LEASES)
    }

    fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, RecordsError> {
        let rows = self.0.all(table)?;
        Ok(rows.into_iter().filter_map(readable).collect())
    }

    /// Adds an image, or more names to a known image. Its tags are taken away from `others`, the images that have them.
    /// Returns the record as it is stored now.
    pub fn add_image(
        &self,
        record: &ImageRecord,
        others: &[Digest],
    ) -> Result<ImageRecord, RecordsError> {
        // Read within the change, so that nobody else can change the records in between.
        self.0.change(Room::Free, |change| {
            let mut merged = record.clone();
            for id in others.iter().chain([&record.id]) {
                let mut other: ImageRecord = match change.get(IMAGES, id.as_str()) {
                    Ok(Some(other)) => other,
                    // What cannot be read is replaced.
                    Ok(None) | Err(RecordsError::Decode { .. }) => continue,
                    Err(error) => return Err(error),
                };
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
                    change.put(IMAGES, other.id.as_str(), &other)?;
                }
            }
            change.put(IMAGES, merged.id.as_str(), &merged)?;
            Ok(merged)
        })
    }

    pub fn remove_image(&self, id: &Digest) -> Result<(), RecordsError> {
        self.0.change(Room::Reserve, |change| {
            change.remove(IMAGES, id.as_str()).map(drop)
        })
    }

    /// Adds layers to the lease of `holder`.
    pub fn add_lease(&self, holder: &str, layers: &[Digest]) -> Result<(), RecordsError> {
        self.0.change(Room::Free, |change| {
            let held: Option<BTreeSet<Digest>> = change.get(LEASES, holder)?;
            let mut held = held.unwrap_or_default();
            held.extend(layers.iter().cloned());
            change.put(LEASES, holder, &held)
        })
    }

    /// Removes a lease. Returns whether there was one.
    pub fn remove_lease(&self, holder: &str) -> Result<bool, RecordsError> {
        self.0
            .change(Room::Reserve, |change| change.remove(LEASES, holder))
    }

    /// Records what a layer's file contains, before it gets its name.
    pub fn add_sum(&self, layer: &Digest, sum: &Sum) -> Result<(), RecordsError> {
        self.0
            .change(Room::Free, |change| change.put(SUMS, layer.as_str(), sum))
    }

    /// What a layer's file must contain. `None` if an earlier version has made it, or if that cannot be read.
    pub fn sum(&self, layer: &Digest) -> Result<Option<Sum>, RecordsError> {
        match self.0.get(SUMS, layer.as_str()) {
            Err(error @ RecordsError::Decode { .. }) => {
                tracing::error!("{}", chain(&error));
                Ok(None)
            }
            sum => sum,
        }
    }

    /// All sums that can be read.
    pub fn sums(&self) -> Result<Vec<(Digest, Sum)>, RecordsError> {
        let all = self.all::<Sum>(SUMS)?.into_iter();
        Ok(all
            .filter_map(|(key, sum)| Some((key.parse().ok()?, sum)))
            .collect())
    }

    /// Forgets the sums of layers for which `is_kept` returns false.
    pub fn retain_sums(&self, is_kept: impl Fn(&str) -> bool) -> Result<(), RecordsError> {
        let all = self.0.all::<Sum>(SUMS)?;
        let keys = all.iter().map(|(key, _)| key);
        let gone: Vec<&String> = keys.filter(|key| !is_kept(key)).collect();
        if gone.is_empty() {
            return Ok(());
        }
        self.0.change(Room::Reserve, |change| {
            let mut gone = gone.iter();
            gone.try_for_each(|key| change.remove(SUMS, key).map(drop))
        })
    }

    /// Takes the reserved disk space again. Call it when space was freed.
    pub fn fill_reserve(&self) {
        self.0.fill_reserve();
    }
}

fn readable<T>((key, row): (String, Result<T, RecordsError>)) -> Option<(String, T)> {
    match row {
        Ok(record) => Some((key, record)),
        Err(error) => {
            tracing::error!("{}", chain(&error));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_records::Change;

    use super::*;

    fn open(directory: &tempfile::TempDir) -> Records {
        let at = |name: &str| directory.path().join(name);
        Records::open(at("db"), at("reserve")).unwrap()
    }

    fn record(id: &[u8], tag: &str) -> ImageRecord {
        ImageRecord {
            id: Digest::of(id),
            repo_tags: BTreeSet::from([tag.to_owned()]),
            repo_digests: BTreeSet::new(),
            layers: Vec::new(),
            defaults: ImageDefaults::default(),
            metadata_bytes: 0,
            artifact_type: None,
        }
    }

    #[test]
    fn names_added_at_the_same_time_are_all_kept() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(&directory);
        let tags: Vec<_> = (0..16).map(|number| format!("tag{number}")).collect();
        std::thread::scope(|scope| {
            for tag in &tags {
                scope.spawn(|| records.add_image(&record(b"a", tag), &[]).unwrap());
            }
        });
        let images = records.images().unwrap();
        assert_eq!(images.len(), 1);
        assert_eq!(images[0].repo_tags, tags.into_iter().collect());
    }

    #[test]
    fn a_record_that_cannot_be_read_hides_no_other_and_is_forgotten_at_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(&directory);
        records.add_image(&record(b"a", "a"), &[]).unwrap();
        records
            .add_lease("holder", &[Digest::of(b"layer")])
            .unwrap();
        let damage = |change: &Change<'_>| {
            change.put(IMAGES, Digest::of(b"b").as_str(), &"garbage")?;
            change.put(LEASES, "other", &7)
        };
        records.0.change(Room::Free, damage).unwrap();
        let check = |records: &Records| {
            assert_eq!(records.images().unwrap(), [record(b"a", "a")]);
            assert_eq!(records.leases().unwrap().len(), 1);
        };
        check(&records);
        drop(records);
        let records = open(&directory);
        check(&records);
        assert_eq!(records.image(&Digest::of(b"b")).unwrap(), None);
        records.add_image(&record(b"b", "b"), &[]).unwrap();
        assert_eq!(records.images().unwrap().len(), 2);
    }
}
