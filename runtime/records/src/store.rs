// SPDX-License-Identifier: Apache-2.0
//! The open file: reads, changes, and what happens after a change that failed.

use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bulkhead_faults::Step;
use redb::{Database, ReadableDatabase, ReadableTable, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::RecordsError;
use crate::file::{Open, Place, Table, open_or_make};
use crate::reserve::Reserve;

/// Which space a change may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// What is free on the disk.
    Free,
    /// The reserve too. For what frees space, and for what has happened already.
    Reserve,
}

/// Records that can be read and changed by several threads.
#[derive(Debug)]
pub struct Records {
    place: Place,
    reserve: Reserve,
    open: Open,
    /// `None` after an error, because redb refuses all further work until the file is opened again.
    database: Mutex<Option<Database>>,
}

/// A change in progress. Nothing of it is visible or on the disk until its end.
pub struct Change<'a> {
    transaction: &'a WriteTransaction,
    path: &'a Path,
}

/// What a table holds: each key with its record, or with the error why that cannot be read.
pub type Rows<T> = Vec<(String, Result<T, RecordsError>)>;

impl Records {
    /// Opens the records, or makes a file without records.
    pub fn open(place: Place) -> Result<Self, RecordsError> {
        Self::open_with(place, |path| Database::open(path))
    }

    fn open_with(place: Place, open: Open) -> Result<Self, RecordsError> {
        let database = match open_or_make(&place, open) {
            // What an unclean stop has left must be repaired, and that may need space.
            Err(error) if error.is_full() => {
                let _ = std::fs::remove_file(&place.reserve);
                open_or_make(&place, open)?
            }
            opened => opened?,
        };
        Ok(Self {
            reserve: Reserve::new(place.reserve.clone()),
            place,
            open,
            database: Mutex::new(Some(database)),
        })
    }

    /// Reads one record.
    pub fn get<T: DeserializeOwned>(
        &self,
        table: Table,
        key: &str,
    ) -> Result<Option<T>, RecordsError> {
        self.with(|database| {
            let read = || -> Result<Option<Vec<u8>>, redb::Error> {
                let table = database.begin_read()?.open_table(table.definition())?;
                Ok(table.get(key)?.map(|value| value.value().to_owned()))
            };
            let value = read().map_err(|error| self.failed("read", error))?;
            value.map(|value| decode(key, &value)).transpose()
        })
    }

    /// Reads a whole table. A record that cannot be read does not hide the others.
    pub fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Rows<T>, RecordsError> {
        self.with(|database| {
            let read = || -> Result<Rows<T>, redb::Error> {
                rows(&database.begin_read()?.open_table(table.definition())?)
            };
            read().map_err(|error| self.failed("read", error))
        })
    }

    /// Makes a change. If `change` fails, nothing has changed. It may be called twice.
    pub fn change<T>(
        &self,
        room: Room,
        change: impl Fn(&Change<'_>) -> Result<T, RecordsError>,
    ) -> Result<T, RecordsError> {
        match self.commit(&change) {
            Err(error) if room == Room::Reserve && error.is_full() => {
                if self.reserve.give_up() {
                    return self.commit(&change);
                }
                Err(error)
            }
            result => result,
        }
    }

    /// Takes the reserved space again, if it was given up and there is room for it. Call it when space was freed.
    pub fn fill_reserve(&self) {
        self.reserve.fill();
    }

    fn commit<T>(
        &self,
        change: &impl Fn(&Change<'_>) -> Result<T, RecordsError>,
    ) -> Result<T, RecordsError> {
        self.with(|database| {
            let begun = database.begin_write();
            let transaction = begun.map_err(|error| self.failed("write", error))?;
            let result = change(&Change {
                transaction: &transaction,
                path: &self.place.path,
            })?;
            bulkhead_faults::within(Step::CommitRecords, || {
                let committed = transaction.commit();
                committed.map_err(|error| self.failed("write", error))
            })?;
            Ok(result)
        })
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, RecordsError>,
    ) -> Result<T, RecordsError> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match slot.take() {
            Some(database) => database,
            None => (self.open)(&self.place.path).map_err(|error| self.failed("open", error))?,
        };
        let result = work(&database);
        if !result.as_ref().is_err_and(RecordsError::is_of_database) {
            *slot = Some(database);
        }
        result
    }

    fn failed(&self, operation: &'static str, error: impl Into<redb::Error>) -> RecordsError {
        RecordsError::of(operation, &self.place.path, error)
    }
}

impl fmt::Debug for Change<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_struct("Change")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Change<'_> {
    pub fn get<T: DeserializeOwned>(
        &self,
        table: Table,
        key: &str,
    ) -> Result<Option<T>, RecordsError> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let table = self.transaction.open_table(table.definition())?;
            Ok(table.get(key)?.map(|value| value.value().to_owned()))
        };
        let value = read().map_err(|error| self.failed("read", error))?;
        value.map(|value| decode(key, &value)).transpose()
    }

    pub fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Rows<T>, RecordsError> {
        let read = || -> Result<Rows<T>, redb::Error> {
            rows(&self.transaction.open_table(table.definition())?)
        };
        read().map_err(|error| self.failed("read", error))
    }

    /// Writes one record, new or changed.
    pub fn put(
        &self,
        table: Table,
        key: &str,
        record: &impl Serialize,
    ) -> Result<(), RecordsError> {
        let text = serde_json::to_vec(record).map_err(|source| RecordsError::Encode {
            key: key.to_owned(),
            source,
        })?;
        let write = || -> Result<(), redb::Error> {
            let mut table = self.transaction.open_table(table.definition())?;
            table.insert(key, text.as_slice())?;
            Ok(())
        };
        write().map_err(|error| self.failed("write", error))
    }

    /// Removes one record. Returns whether there was one.
    pub fn remove(&self, table: Table, key: &str) -> Result<bool, RecordsError> {
        let write = || -> Result<bool, redb::Error> {
            let mut table = self.transaction.open_table(table.definition())?;
            Ok(table.remove(key)?.is_some())
        };
        write().map_err(|error| self.failed("write", error))
    }

    fn failed(&self, operation: &'static str, error: redb::Error) -> RecordsError {
        RecordsError::of(operation, self.path, error)
    }
}

fn rows<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Rows<T>, redb::Error> {
    let mut all = Vec::new();
    for row in table.iter()? {
        let (key, value) = row?;
        let record = decode(key.value(), value.value());
        all.push((key.value().to_owned(), record));
    }
    Ok(all)
}

fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, RecordsError> {
    serde_json::from_slice(bytes).map_err(|source| RecordsError::Decode {
        key: key.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests;
