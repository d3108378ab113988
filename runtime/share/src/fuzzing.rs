// SPDX-License-Identifier: Apache-2.0
//! The door for fuzz targets: one worker of a file server, without its process and its jail.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;

use crate::serve::Desk;
use crate::tree::Tree;

/// A worker and the shares that it serves.
pub struct FileServer {
    server: Server<Arc<Tree>>,
    desk: Desk,
}

impl fmt::Debug for FileServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileServer").finish_non_exhaustive()
    }
}

impl FileServer {
    /// Serves the directories `p1` and `p2` in `root`, which must exist.
    pub fn new(root: &Path) -> io::Result<Self> {
        let tree = Tree::of_directories(root, &["p1", "p2"])?;
        Ok(Self {
            server: Server::new(Arc::new(tree)),
            desk: Desk::new()?,
        })
    }

    /// The reply to a request. `None` if it has none.
    pub fn answer(&mut self, request: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.desk.answer(&self.server, request)
    }
}
