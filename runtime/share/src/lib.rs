// SPDX-License-Identifier: Apache-2.0
//! A file server: host directories for the guest of one VM, in a process of its own.
//!
//! [`jail`] makes an empty root in which only the shares are, [`mod@serve`] moves FUSE messages between
//! the VMM's socket and fuse-backend-rs as [`fuse`] says, [`tree`] makes one file system of all shares and has our
//! rules. Who starts it mounts shares below [`SHARES`] in its mount namespace, at any time: each is
//! a directory or a file named as [`name`] says. It ends when the VMM's socket does.
//!
//! ```text
//!  outer process            main thread                workers
//!  waits, passes on         watches for shares that    a request each: read, check, serve,
//!  the end                  went away                  reply
//! ```

pub mod fuse;
mod idmap;
mod jail;
pub mod name;
mod ready;
mod seccomp;
mod serve;
#[allow(unsafe_code)]
mod sys;
mod tree;

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::inotify;
use serde::{Deserialize, Serialize};

use tree::Tree;

pub use ready::READY;
pub use sys::inherited;

/// Where the shares are in the server's root.
pub const SHARES: &str = "/shares";
/// The most bytes of configuration that are read.
const CONFIG_BYTES: u64 = 4096;

/// What the parent writes to standard input, as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// An inherited descriptor: a stream socket whose other end is a VMM.
    pub socket_fd: i32,
}

/// Why a file server did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("read configuration")]
    Read(#[source] io::Error),
    #[error("parse configuration")]
    Parse(#[source] serde_json::Error),
    #[error("take over descriptor {fd}")]
    Socket { fd: i32, source: io::Error },
    #[error("{step}")]
    Jail {
        step: &'static str,
        source: io::Error,
    },
    #[error("filter system calls")]
    Seccomp(#[from] seccomp::SeccompError),
    #[error("{step}")]
    Serve {
        step: &'static str,
        source: io::Error,
    },
}

/// Runs a file server until its VMM goes away. Call on the only thread.
pub fn run(input: impl Read) -> Result<(), ShareError> {
    let mut text = Vec::new();
    let mut bounded = input.take(CONFIG_BYTES);
    bounded.read_to_end(&mut text).map_err(ShareError::Read)?;
    let config: ShareConfig = serde_json::from_slice(&text).map_err(ShareError::Parse)?;
    let fd = config.socket_fd;
    let socket = sys::inherited(fd).map_err(|source| ShareError::Socket { fd, source })?;
    jail::separate()?;
    // Only a child is inside a new PID namespace.
    if let Some(child) = sys::fork().map_err(jail::failed("fork"))? {
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
    seccomp::confine()?;
    ready::announce().map_err(failed("say that it is ready"))?;
    gate.open();
    let mut events = [0; 4096];
    loop {
        // Which one it was does not matter; the workers end the process.
        match rustix::io::read(&watch, &mut events) {
            Ok(_) | Err(rustix::io::Errno::INTR) => tree.sweep(),
            Err(e) => return Err(errno("watch for shares")(e)),
        }
    }
}
