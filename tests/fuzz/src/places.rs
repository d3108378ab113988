// SPDX-License-Identifier: Apache-2.0
//! Directories and files for the host's side of a target. A target runs thousands of times a second, so they are made
//! once for all runs, or are in memory.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
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

/// The port of the host to which a guest can connect.
pub const READY_PORT: u32 = 52;

/// The sockets of a muxer: the address at which it listens, its listener, its end of the connection at [`READY_PORT`], and
/// the host's end.
pub fn vsock_sockets() -> (PathBuf, UnixListener, (u32, UnixStream), UnixStream) {
    let path = directory().join("v");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    let (ours, host) = UnixStream::pair().expect("a connection");
    for socket in [&ours, &host] {
        let quick = socket.set_nonblocking(true);
        quick.expect("a socket that does not wait");
    }
    (path, listener, (READY_PORT, ours), host)
}
