// SPDX-License-Identifier: Apache-2.0
//! Records of images and leases in redb. Every change is one durable transaction.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::digest::Digest;
use crate::manifest::ImageDefaults;

/// Maps an image id to its [`ImageRecord`] as JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Maps a holder to the diff ids of its layers as JSON.
const LEASES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("leases");

/// What is stored about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    pub id: Digest,
    pub repo_tags: BTreeSet<String>,
    pub repo_digests: BTreeSet<String>,
    /// Diff ids, the bottom one first, each only once.
    pub layers: Vec<Digest>,
    pub defaults: ImageDefaults,
    /// The size of its manifests and its configuration, as the registry sent them.
    #[serde(default)]
    pub metadata_bytes: u64,
}

/// The database. It is opened again after an I/O error.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    create: Create,
    /// `None` after an I/O error such as a full disk: redb refuses all further work until the file is opened again.
    database: Mutex<Option<Database>>,
}

/// How a database is opened or created. Tests use another function.
type Create = fn(&Path) -> Result<Database, DatabaseError>;

impl Records {
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, |path| Database::create(path))
    }

    fn open_with(path: &Path, create: Create) -> Result<Self, StoreError> {
        let records = Self {
            path: path.to_owned(),
            create,
            database: Mutex::default(),
        };
        // An empty change creates the tables, without which reads fail.
        records.change(|_, _| Ok(()))?;
        Ok(records)
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match slot.take() {
            Some(database) => database,
            None => (self.create)(&self.path).map_err(|source| StoreError::Open {
                path: self.path.clone(),
                source: Box::new(source),
            })?,
        };
        let result = work(&database);
        if !result.as_ref().is_err_and(is_io) {
            *slot = Some(database);
        }
        result
    }

    pub fn image(&self, id: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        self.with(|database| {
            let transaction = database.begin_read().map_err(failed)?;
            let table = transaction.open_table(IMAGES).map_err(failed)?;
            let value = table.get(id.as_str()).map_err(failed)?;
            value
                .map(|value| parse(id.as_str(), value.value()))
                .transpose()
        })
    }

    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let records = self.all(IMAGES)?;
        Ok(records.into_iter().map(|(_, record)| record).collect())
    }

    pub fn leases(&self) -> Result<Vec<(String, Vec<Digest>)>, StoreError> {
        self.all(LEASES)
    }

    /// Adds an image, or more names to a known image. Its tags are taken away from `others`, the images that have them.
    /// Returns the record as it is stored now.
    pub fn add_image(
        &self,
        record: &ImageRecord,
        others: &[Digest],
    ) -> Result<ImageRecord, StoreError> {
        let mut merged = record.clone();
        self.change(|images, _| {
            // Read within the transaction, so that nobody else can change the records in between.
            for id in others.iter().chain([&record.id]) {
                let known = images.get(id.as_str()).map_err(failed)?;
                let known = known.map(|value| parse::<ImageRecord>(id.as_str(), value.value()));
                let Some(mut other) = known.transpose()? else {
                    continue;
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

    /// Adds layers to the lease of `holder`.
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

    /// Removes a lease. Returns whether there was one.
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
        self.with(|database| {
            let transaction = database.begin_read().map_err(failed)?;
            parse_all(&transaction.open_table(table).map_err(failed)?)
        })
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Table<'_>, &mut Table<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.with(|database| {
            let transaction = database.begin_write().map_err(failed)?;
            {
                let mut images = transaction.open_table(IMAGES).map_err(failed)?;
                let mut leases = transaction.open_table(LEASES).map_err(failed)?;
                change(&mut images, &mut leases)?;
            }
            transaction.commit().map_err(failed)
        })
    }
}

type Table<'a> = redb::Table<'a, &'static str, &'static [u8]>;

fn failed(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Records(Box::new(error.into()))
}

fn is_io(error: &StoreError) -> bool {
    let StoreError::Records(error) = error else {
        return false;
    };
    matches!(error.as_ref(), redb::Error::Io(_) | redb::Error::PreviousIo)
}

fn parse_all<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Vec<(String, T)>, StoreError> {
    let mut all = Vec::new();
    for entry in table.iter().map_err(failed)? {
        let (key, value) = entry.map_err(failed)?;
        all.push((key.value().to_owned(), parse(key.value(), value.value())?));
    }
    Ok(all)
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use redb::StorageBackend;
    use redb::backends::FileBackend;

    use super::*;

    static DISK_IS_FULL: AtomicBool = AtomicBool::new(false);

    /// A file on a disk that is full when the test says so.
    #[derive(Debug)]
    struct FillingDisk(FileBackend);

    impl StorageBackend for FillingDisk {
        fn len(&self) -> Result<u64, std::io::Error> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
            self.0.read(offset, out)
        }

        fn set_len(&self, bytes: u64) -> Result<(), std::io::Error> {
            self.0.set_len(bytes)
        }

        fn sync_data(&self) -> Result<(), std::io::Error> {
            self.0.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
            if DISK_IS_FULL.load(Ordering::SeqCst) {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            self.0.write(offset, data)
        }
    }

    fn record(id: &[u8], tag: &str) -> ImageRecord {
        ImageRecord {
            id: Digest::of(id),
            repo_tags: BTreeSet::from([tag.to_owned()]),
            repo_digests: BTreeSet::new(),
            layers: Vec::new(),
            defaults: ImageDefaults::default(),
            metadata_bytes: 0,
        }
    }

    #[test]
    fn a_full_disk_fails_a_change_and_not_those_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open_with(&directory.path().join("db"), |path| {
            let options = std::fs::File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            Database::builder().create_with_backend(FillingDisk(FileBackend::new(options)?))
        })
        .unwrap();
        records.add_image(&record(b"a", "a"), &[]).unwrap();
        DISK_IS_FULL.store(true, Ordering::SeqCst);
        let error = records.add_image(&record(b"b", "b"), &[]).unwrap_err();
        assert_eq!(error.kind(), crate::FailureKind::NoSpace, "{error:?}");
        DISK_IS_FULL.store(false, Ordering::SeqCst);
        assert_eq!(records.images().unwrap(), [record(b"a", "a")]);
        records.remove_image(&Digest::of(b"a")).unwrap();
        assert_eq!(records.images().unwrap(), []);
    }

    #[test]
    fn names_added_at_the_same_time_are_all_kept() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(&directory.path().join("db")).unwrap();
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
}
