// SPDX-License-Identifier: Apache-2.0
//! Directories and files for the host's side of a target. A target runs thousands of times a second, so they are made
//! once for all runs, or are in memory.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
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

/// The path of a VMM's vsock socket. Who calls the guest listens at it, and a program of the host at the port that the
/// seeds name, which the guest can connect to.
pub fn vsock_sockets() -> (PathBuf, [UnixListener; 2]) {
    let path = directory().join("v");
    let listeners = [path.clone(), directory().join("v_52")].map(|path| {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).expect("a socket");
        listener
            .set_nonblocking(true)
            .expect("a socket that does not wait");
        listener
    });
    (path, listeners)
}
