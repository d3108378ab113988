// SPDX-License-Identifier: Apache-2.0
//! The images that each delegate listed last, in a file that outlives the daemon.
//!
//! While a delegate is down, kubelet must not take its images for gone: it would forget which credentials have opened a
//! private image, and let any pod use it once the delegate is back.

use std::path::Path;
use std::sync::Arc;

use bulkhead_delegate::Delegate;
use bulkhead_proto::cri;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::super::kept::{Kept, OfSocket};

/// What is kept of one delegate.
#[derive(Clone, Debug)]
pub struct KeptImages {
    name: String,
    socket: String,
    file: Kept,
    list: Arc<Mutex<Last>>,
}

/// The last list, and when it was asked for.
#[derive(Debug, Default)]
struct Last {
    saved: SavedImages,
    asked: Option<Instant>,
}

/// What is kept on disk.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SavedImages {
    /// The delegate's socket. Empty: nothing is kept.
    #[prost(string, tag = "1")]
    pub socket: String,
    #[prost(message, repeated, tag = "2")]
    pub images: Vec<cri::Image>,
}

impl OfSocket for SavedImages {
    fn socket(&self) -> &str {
        &self.socket
    }
}

impl KeptImages {
    /// Begins with what the daemon before this one kept in the directory.
    pub fn new(delegate: &Delegate, directory: &Path) -> Self {
        let first = delegate.name().split(',').next().unwrap_or_default();
        let file = Kept::new(directory, &format!("{first}.images"));
        let saved = file.read(&delegate.socket().to_string_lossy());
        let last = Last {
            saved: saved.unwrap_or_default(),
            asked: None,
        };
        Self {
            name: delegate.name().to_owned(),
            file,
            list: Arc::new(Mutex::new(last)),
            socket: delegate.socket().to_string_lossy().into_owned(),
        }
    }

    /// Keeps a list that was asked for at this time, unless a later one is kept. The file is written only if the list has
    /// changed.
    pub async fn keep(&self, asked: Instant, images: Vec<cri::Image>) {
        let socket = self.socket.clone();
        self.replace(asked, SavedImages { socket, images }).await;
    }

    /// Forgets the list, because it lacks an image that may be there.
    pub async fn forget(&self) {
        self.replace(Instant::now(), SavedImages::default()).await;
    }

    async fn replace(&self, asked: Instant, saved: SavedImages) {
        let mut last = self.list.lock().await;
        if last.asked.is_some_and(|known| known > asked) {
            return;
        }
        last.asked = Some(asked);
        if last.saved == saved {
            return;
        }
        last.saved = saved.clone();
        let file = self.file.clone();
        let written = tokio::task::spawn_blocking(move || file.write(&saved)).await;
        if let Err(error) = written.unwrap_or_else(|error| Err(error.into())) {
            tracing::warn!(delegate = self.name, "its images are not kept: {error}");
        }
    }

    /// What the delegate listed last, of all images or of those called `name`. `None` if that is not known.
    pub async fn last(&self, name: &str) -> Option<Vec<cri::Image>> {
        let last = self.list.lock().await;
        if last.saved.socket.is_empty() {
            return None;
        }
        let is_it = |image: &&cri::Image| {
            let mut names = image.repo_tags.iter().chain(&image.repo_digests);
            name.is_empty() || image.id == name || names.any(|one| one == name)
        };
        Some(last.saved.images.iter().filter(is_it).cloned().collect())
    }
}
