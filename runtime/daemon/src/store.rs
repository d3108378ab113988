// SPDX-License-Identifier: Apache-2.0
//! The store: the records of pods and containers on disk.
//!
//! It is one redb file. A row is a record as JSON, and its key is the record's id. Each call is one transaction, which
//! is on the disk when the call returns. Callers write here first and change memory after that. The store is used by
//! the tasks that own pods, and once at the start.

use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A table's name contains its version. A build that changes the format of records incompatibly uses another table.
const PODS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("pods.v1");
const CONTAINERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("containers.v1");

/// An error from the state store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("open state store {path}")]
    Open {
        path: PathBuf,
        source: Box<redb::Error>,
    },
    #[error("read the state store")]
    Read(#[source] Box<redb::Error>),
    #[error("write {key} to the state store")]
    Write {
        key: String,
        source: Box<redb::Error>,
    },
    #[error("encode the state of {key}")]
    Encode {
        key: String,
        source: serde_json::Error,
    },
    #[error("decode the state of {key}")]
    Decode {
        key: String,
        source: serde_json::Error,
    },
}

/// Which kind of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Pod,
    Container,
}

/// The open store.
#[derive(Debug)]
pub struct Store {
    database: Database,
}

impl Store {
    /// Opens the store at `path`, or makes it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |source: redb::Error| StoreError::Open {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let database = Database::create(path).map_err(|e| failed(e.into()))?;
        let store = Self { database };
        // Reading a table that does not exist would be an error.
        store.make_tables().map_err(failed)?;
        Ok(store)
    }

    fn make_tables(&self) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        for kind in [Kind::Pod, Kind::Container] {
            transaction.open_table(kind.table())?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Writes one record, new or changed.
    pub fn put<T: Serialize>(&self, kind: Kind, key: &str, record: &T) -> Result<(), StoreError> {
        let text = serde_json::to_vec(record).map_err(|source| StoreError::Encode {
            key: key.to_owned(),
            source,
        })?;
        self.change(kind, key, Some(&text))
    }

    /// Removes one record. An unknown key is no error.
    pub fn remove(&self, kind: Kind, key: &str) -> Result<(), StoreError> {
        self.change(kind, key, None)
    }

    /// Reads all records of a kind. A record that cannot be read becomes an error in the list, so that it does not hide
    /// the others.
    pub fn load<T: DeserializeOwned>(
        &self,
        kind: Kind,
    ) -> Result<Vec<Result<T, StoreError>>, StoreError> {
        let rows = self.rows(kind).map_err(|e| StoreError::Read(Box::new(e)))?;
        let decode = |(key, text): (String, Vec<u8>)| {
            serde_json::from_slice(&text).map_err(|source| StoreError::Decode { key, source })
        };
        Ok(rows.into_iter().map(decode).collect())
    }

    fn rows(&self, kind: Kind) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
        let table = self.database.begin_read()?.open_table(kind.table())?;
        let mut rows = Vec::new();
        for row in table.iter()? {
            let (key, value) = row?;
            rows.push((key.value().to_owned(), value.value().to_owned()));
        }
        Ok(rows)
    }

    fn change(&self, kind: Kind, key: &str, value: Option<&[u8]>) -> Result<(), StoreError> {
        self.commit(kind, key, value)
            .map_err(|source| StoreError::Write {
                key: key.to_owned(),
                source: Box::new(source),
            })
    }

    fn commit(&self, kind: Kind, key: &str, value: Option<&[u8]>) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut table = transaction.open_table(kind.table())?;
            match value {
                Some(value) => table.insert(key, value)?,
                None => table.remove(key)?,
            };
        }
        transaction.commit()?;
        Ok(())
    }
}

impl Kind {
    fn table(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        match self {
            Self::Pod => PODS,
            Self::Container => CONTAINERS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_a_reopen_and_kinds_do_not_mix() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.redb");
        {
            let store = Store::open(&path).unwrap();
            store.put(Kind::Pod, "a", &1).unwrap();
            store.put(Kind::Pod, "a", &2).unwrap();
            store.put(Kind::Pod, "b", &3).unwrap();
            store.put(Kind::Container, "a", &4).unwrap();
            store.remove(Kind::Pod, "b").unwrap();
            store.remove(Kind::Pod, "never there").unwrap();
        }
        let store = Store::open(&path).unwrap();
        let read = |kind| -> Vec<i32> {
            let rows = store.load(kind).unwrap();
            rows.into_iter().map(Result::unwrap).collect()
        };
        assert_eq!(read(Kind::Pod), [2]);
        assert_eq!(read(Kind::Container), [4]);
    }

    #[test]
    fn a_record_of_another_form_is_named_and_hides_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("state.redb")).unwrap();
        store.put(Kind::Pod, "odd", &"text").unwrap();
        store.put(Kind::Pod, "plain", &7).unwrap();
        let rows: Vec<Result<i32, _>> = store.load(Kind::Pod).unwrap();
        assert_eq!(rows.iter().flatten().copied().collect::<Vec<_>>(), [7]);
        let error = rows.into_iter().find_map(Result::err).unwrap();
        assert!(error.to_string().contains("odd"));
    }
}
