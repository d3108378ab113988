// SPDX-License-Identifier: Apache-2.0
//! Reserved disk space, so that things can be removed on a full disk. A removal frees space, but has to write records
//! before.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Enough for some pages of a database.
const RESERVE_BYTES: usize = 1 << 20;

/// A file that is deleted when its space is needed.
#[derive(Debug)]
pub struct Reserve(PathBuf);

impl Reserve {
    pub fn new(path: PathBuf) -> Self {
        let reserve = Self(path);
        reserve.fill();
        reserve
    }

    /// Frees the space. Returns false if there was none.
    pub fn give_up(&self) -> bool {
        fs::remove_file(&self.0).is_ok()
    }

    /// Reserves the space, if it is not reserved. Does nothing if the disk is full.
    pub fn fill(&self) {
        let is_there = fs::metadata(&self.0).is_ok_and(|file| file.len() == RESERVE_BYTES as u64);
        if !is_there && self.write().is_err() {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn write(&self) -> std::io::Result<()> {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        // Not zeroes, because some file systems do not store them.
        options.open(&self.0)?.write_all(&vec![0xa5; RESERVE_BYTES])
    }
}
