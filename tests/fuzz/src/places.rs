// SPDX-License-Identifier: Apache-2.0
//! Directories and files for the host's side of a target. A target runs thousands of times a second, so they are made
//! once for all runs, or are in memory.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;

/// The directory of this process.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<TempDir> = OnceLock::new();
    let make = || TempDir::new().expect("a directory in TMPDIR");
    DIRECTORY.get_or_init(make).path()
}

/// A file in memory.
pub fn file(content: &[u8]) -> File {
    let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all(content).expect("its content");
    file
}
