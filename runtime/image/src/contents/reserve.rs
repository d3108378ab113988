// SPDX-License-Identifier: Apache-2.0
//! Reserved disk space, so that images can be removed on a full disk. A removal frees space, but has to write records
//! before.

use std::fs;
use std::path::PathBuf;

use super::StoreError;
use crate::failure::FailureKind;

/// Enough for some pages of the records.
const RESERVE_BYTES: usize = 1 << 20;

/// A file that is deleted when its space is needed.
#[derive(Debug)]
pub struct Reserve {
    path: PathBuf,
}

impl Reserve {
    pub fn new(path: PathBuf) -> Self {
        let reserve = Self { path };
        reserve.fill();
        reserve
    }

    /// Does `work`. If the disk is full, frees the reserve and does it again.
    pub fn with<T>(&self, work: impl Fn() -> Result<T, StoreError>) -> Result<T, StoreError> {
        match work() {
            Err(error) if error.kind() == FailureKind::NoSpace => {
                fs::remove_file(&self.path).map_err(|_| error)?;
                work()
            }
            result => result,
        }
    }

    /// Reserves the space, if it is not reserved. Does nothing if the disk is full.
    pub fn fill(&self) {
        let is_there =
            fs::metadata(&self.path).is_ok_and(|file| file.len() == RESERVE_BYTES as u64);
        // Not zeroes, because some file systems do not store them.
        if !is_there && fs::write(&self.path, vec![0xa5; RESERVE_BYTES]).is_err() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;

    use super::*;

    #[test]
    fn the_reserve_is_given_up_once_for_work_that_finds_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("reserve");
        let reserve = Reserve::new(path.clone());
        let fail = |kind: io::ErrorKind| StoreError::Files {
            operation: "write",
            path: path.clone(),
            source: kind.into(),
        };
        let tries = Cell::new(0);
        let work = |is_full: &dyn Fn() -> bool, kind| {
            tries.set(tries.get() + 1);
            if is_full() { Err(fail(kind)) } else { Ok(()) }
        };
        let needs_room = || work(&|| path.exists(), io::ErrorKind::StorageFull);
        reserve.with(needs_room).unwrap();
        assert_eq!((tries.get(), path.exists()), (2, false));
        reserve.fill();
        assert!(path.exists());
        let other = reserve.with(|| work(&|| true, io::ErrorKind::PermissionDenied));
        assert_eq!(other.unwrap_err().kind(), FailureKind::Internal);
        assert_eq!((tries.get(), path.exists()), (3, true));
        for tries_after in [5, 6] {
            let hopeless = reserve.with(|| work(&|| true, io::ErrorKind::StorageFull));
            assert_eq!(hopeless.unwrap_err().kind(), FailureKind::NoSpace);
            assert_eq!(tries.get(), tries_after);
        }
    }
}
