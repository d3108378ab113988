// SPDX-License-Identifier: Apache-2.0
//! Checks a file of records before it is used.
//!
//! redb checks what it reads neither against the checksums in its file, unless it was closed uncleanly, nor for being a
//! database at all in every place: a page of zeroes makes it panic. A release build aborts on a panic, so a caller that
//! must live on runs this in a process of its own.

use std::fs;
use std::io;
use std::path::Path;

use redb::Database;

use crate::error::RecordsError;
use crate::file::empty;

/// How a file was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Intact,
    /// It was damaged where no record was lost, or only one whose change was not complete.
    Repaired,
}

/// Reads all of the file and compares it with its checksums. A file that does not exist is intact.
pub fn check(path: &Path) -> Result<Found, RecordsError> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Intact),
        Err(error) => return Err(RecordsError::file("look at", path)(error)),
        Ok(metadata) if metadata.len() == 0 => return Err(empty(path)),
        Ok(_) => {}
    }
    let failed = |error: redb::Error| RecordsError::of("check", path, error);
    let mut database = Database::open(path).map_err(|error| failed(error.into()))?;
    let is_clean = database.check_integrity();
    match is_clean.map_err(|error| failed(error.into()))? {
        true => Ok(Found::Intact),
        false => Ok(Found::Repaired),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Place, Records, Room, Table};

    const TABLE: Table = Table::new("table");

    /// What happens to a file: it is found to be damaged, by an error or by a panic of redb, or its records are as they
    /// were.
    fn verdict(path: &Path, place: &Place) -> &'static str {
        let checked = std::panic::catch_unwind(|| check(path));
        match checked {
            Err(_) | Ok(Err(RecordsError::Damaged { .. })) => return "damaged",
            Ok(Err(error)) => panic!("{error:?}"),
            Ok(Ok(_)) => {}
        }
        let records = Records::open(place.clone()).unwrap();
        let all = records.all::<String>(TABLE).unwrap();
        assert_eq!(all.len(), 20, "records are lost");
        for (key, value) in all {
            assert_eq!(value.unwrap(), format!("{key}{key}"));
        }
        "as it was"
    }

    #[test]
    fn damage_anywhere_is_noticed_or_harmless_also_after_a_clean_stop() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("records.redb");
        let place = Place {
            path: path.clone(),
            reserve: directory.path().join("reserve"),
            tables: &[TABLE],
        };
        let records = Records::open(place.clone()).unwrap();
        let put = |change: &crate::Change<'_>| {
            (0..20).try_for_each(|number| {
                let key = format!("{number:0200}");
                change.put(TABLE, &key, &format!("{key}{key}"))
            })
        };
        records.change(Room::Free, put).unwrap();
        drop(records);
        assert_eq!(check(&path).unwrap(), Found::Intact);
        let good = fs::read(&path).unwrap();
        let mut damaged = 0;
        let mut found = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            damaged += usize::from(verdict(&path, &place) == "damaged");
        };
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let is_used = |page: &usize| good[*page..].iter().take(4096).any(|byte| *byte != 0);
        for page in (0..good.len()).step_by(4096).filter(is_used) {
            let mut bytes = good.clone();
            bytes[page..(page + 4096).min(good.len())].fill(0);
            found(&bytes);
            for at in [page + 1, page + 70, page + 900] {
                let mut bytes = good.clone();
                bytes[at] ^= 0x10;
                found(&bytes);
            }
        }
        std::panic::set_hook(hook);
        assert!(
            damaged > 5,
            "only {damaged} of the damaged files were noticed"
        );
        for (what, bytes) in [
            ("empty", Vec::new()),
            ("cut", good[..good.len() / 2].to_vec()),
            ("cut in its header", good[..100].to_vec()),
            ("zeroes", vec![0; good.len()]),
            ("text", b"not a database".repeat(1000)),
        ] {
            fs::write(&path, bytes).unwrap();
            let error = check(&path).unwrap_err();
            assert!(
                matches!(error, RecordsError::Damaged { .. }),
                "{what}: {error:?}"
            );
            let error = Records::open(place.clone()).unwrap_err();
            assert!(
                matches!(error, RecordsError::Damaged { .. }),
                "{what}: {error:?}"
            );
        }
        fs::remove_file(&path).unwrap();
        check(&path).unwrap();
        assert!(!path.exists(), "a check makes no file");
    }
}
