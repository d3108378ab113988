// SPDX-License-Identifier: Apache-2.0
//! The store: the records of pods and containers on disk.
//!
//! A record's key is its id. Each call is one transaction, which is on the disk when the call returns. Callers write
//! here first and change memory after that. The store is used by the tasks that own pods, and once at the start.

use std::path::Path;

use bulkhead_records::{Place, Records, RecordsError, Rows, Table};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use bulkhead_records::{RecordsError as StoreError, Room};

/// A table's name contains its version. A build that changes the format of records incompatibly uses another table.
const PODS: Table = Table::new("pods.v1");
const CONTAINERS: Table = Table::new("containers.v1");
/// The names of the files in the state directory.
pub const FILE: &str = "pods.redb";
const RESERVE: &str = "pods.reserve";

/// Which kind of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Pod,
    Container,
}

/// The open store.
#[derive(Debug)]
pub struct Store(Records);

impl Store {
    /// Opens the store in the directory, or makes it.
    pub fn open(directory: &Path) -> Result<Self, RecordsError> {
        let place = Place {
            path: directory.join(FILE),
            reserve: directory.join(RESERVE),
            tables: &[PODS, CONTAINERS],
        };
        Records::open(place).map(Self)
    }

    /// Writes one record, new or changed.
    pub fn put<T: Serialize>(
        &self,
        room: Room,
        kind: Kind,
        key: &str,
        record: &T,
    ) -> Result<(), RecordsError> {
        self.0
            .change(room, |change| change.put(kind.table(), key, record))
    }

    /// Removes one record. An unknown key is no error.
    pub fn remove(&self, kind: Kind, key: &str) -> Result<(), RecordsError> {
        self.0
            .change(Room::Reserve, |change| change.remove(kind.table(), key))?;
        self.0.fill_reserve();
        Ok(())
    }

    /// Reads all records of a kind with their keys. A record that cannot be read becomes an error in the list, so that
    /// it does not hide the others.
    pub fn load<T: DeserializeOwned>(&self, kind: Kind) -> Result<Rows<T>, RecordsError> {
        self.0.all(kind.table())
    }
}

impl Kind {
    fn table(self) -> Table {
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
        {
            let store = Store::open(directory.path()).unwrap();
            let put = |kind, key, value: i32| store.put(Room::Free, kind, key, &value).unwrap();
            put(Kind::Pod, "a", 1);
            put(Kind::Pod, "a", 2);
            put(Kind::Pod, "b", 3);
            put(Kind::Container, "a", 4);
            store.remove(Kind::Pod, "b").unwrap();
            store.remove(Kind::Pod, "never there").unwrap();
        }
        let store = Store::open(directory.path()).unwrap();
        let read = |kind| -> Vec<(String, i32)> {
            let rows = store.load(kind).unwrap();
            rows.into_iter()
                .map(|(key, row)| (key, row.unwrap()))
                .collect()
        };
        assert_eq!(read(Kind::Pod), [("a".to_owned(), 2)]);
        assert_eq!(read(Kind::Container), [("a".to_owned(), 4)]);
    }
}
