// SPDX-License-Identifier: Apache-2.0
//! A file server: gives the guest of one VM access to host directories, in a process of its own.
//!
//! [`jail`] creates a root that contains only the shares. [`mod@serve`] moves FUSE messages, whose format is in
//! [`fuse`], between the VMM's socket and fuse-backend-rs. [`tree`] joins all shares in one file system and
//! enforces our rules. The parent may mount shares below [`SHARES`] in the server's mount namespace at any
//! time; each is a directory or a file, named as in [`name`]. The server ends when the VMM closes the socket.
//!
//! ```text
//!  outer process            main thread                workers
//!  waits for the server,    watches for shares that    one request each: read, check,
//!  ends as it does          were unmounted             serve, reply
//! ```

pub mod fuse;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod idmap;
mod jail;
pub mod name;
mod ready;
mod serve;
#[allow(unsafe_code)]
mod sys;
pub mod syscalls;
mod tree;

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bulkhead_jail::namespaces::Side;
use bulkhead_jail::syscalls::SyscallsError;
use bulkhead_jail::{JailError, descriptors};
use rustix::fs::inotify;
use serde::{Deserialize, Serialize};

use tree::Tree;

pub use ready::READY;

/// The directory of the shares in the server's root.
pub const SHARES: &str = "/shares";
/// Configuration beyond this many bytes is not read.
const CONFIG_BYTES: u64 = 4096;

/// The configuration, which the parent writes to standard input as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// An inherited file descriptor: a stream socket whose other end is a VMM.
    pub socket_fd: i32,
}

/// Why a file server did not start, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("read configuration")]
    Read(#[source] io::Error),
    #[error("parse configuration")]
    Parse(#[source] serde_json::Error),
    #[error("take over descriptor {fd}")]
    Socket { fd: i32, source: io::Error },
    #[error("enter the jail")]
    Jail(#[from] JailError),
    #[error("filter system calls")]
    Syscalls(#[from] SyscallsError),
    #[error("{step}")]
    Outside {
        step: &'static str,
        source: io::Error,
    },
    #[error("{step}")]
    Serve {
        step: &'static str,
        source: io::Error,
    },
}

/// Runs a file server until its VMM closes the socket. Call it while the process has only one thread.
pub fn run(input: impl Read) -> Result<(), ShareError> {
    let mut text = Vec::new();
    let mut bounded = input.take(CONFIG_BYTES);
    bounded.read_to_end(&mut text).map_err(ShareError::Read)?;
    let config: ShareConfig = serde_json::from_slice(&text).map_err(ShareError::Parse)?;
    let fd = config.socket_fd;
    let socket = descriptors::inherited(fd).map_err(|source| ShareError::Socket { fd, source })?;
    if let Side::Parent { child } = jail::separate()? {
        drop(socket);
        return jail::guard(child);
    }
    let socket = UnixStream::from(OwnedFd::from(socket));
    jail::enter()?;
    serve(socket)
}

fn serve(socket: UnixStream) -> Result<(), ShareError> {
    let failed = |step| move |source: io::Error| ShareError::Serve { step, source };
    let errno = |step| move |source: rustix::io::Errno| failed(step)(source.into());
    let tree = Arc::new(Tree::new(SHARES.into()));
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).map_err(errno("watch for shares"))?;
    inotify::add_watch(&watch, SHARES, inotify::WatchFlags::DELETE)
        .map_err(errno("watch for shares"))?;
    let gate = serve::start(&socket, &tree).map_err(failed("start workers"))?;
    gate.wait();
    bulkhead_jail::syscalls::prepare(None)?;
    bulkhead_jail::syscalls::apply_to_all_threads(&syscalls::SERVER)?;
    ready::announce().map_err(failed("report that the server is ready"))?;
    gate.open();
    let mut events = [0; 4096];
    loop {
        // It does not matter which share it was. This loop has no end: a worker ends the process.
        match rustix::io::read(&watch, &mut events) {
            Ok(_) | Err(rustix::io::Errno::INTR) => tree.sweep(),
            Err(e) => return Err(errno("watch for shares")(e)),
        }
    }
}
