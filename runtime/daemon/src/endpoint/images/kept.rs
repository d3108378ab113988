// SPDX-License-Identifier: Apache-2.0
//! The images that each delegate listed last, in a file that outlives the daemon.
//!
//! While a delegate is down, kubelet must not take its images for gone: it would forget which credentials have opened a
//! private image, and let any pod use it once the delegate is back.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_proto::cri;
use prost::Message;
use tokio::sync::Mutex;

/// The longest list that is kept in a file.
const MOST_BYTES: usize = 16 << 20;

/// What is kept, by the delegate's name. Clones share it.
#[derive(Clone, Debug)]
pub struct KeptImages {
    directory: PathBuf,
    lists: Arc<Mutex<HashMap<String, Vec<cri::Image>>>>,
}

impl KeptImages {
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            lists: Arc::default(),
        }
    }

    /// Keeps a list. The file is written only if the list has changed.
    pub async fn keep(&self, delegate: &str, images: &[cri::Image]) {
        let mut lists = self.lists.lock().await;
        if self.known(&mut lists, delegate).map(Vec::as_slice) == Some(images) {
            return;
        }
        lists.insert(delegate.to_owned(), images.to_vec());
        let list = cri::ListImagesResponse {
            images: images.to_vec(),
        };
        let bytes = list.encode_to_vec();
        if bytes.len() > MOST_BYTES {
            tracing::warn!(
                delegate,
                "has too many images to be remembered: {} bytes",
                bytes.len()
            );
        } else if let Err(error) = self.write(delegate, &bytes) {
            tracing::warn!(delegate, "its images are not remembered: {error}");
        }
    }

    /// What the delegate listed last, of all images or of those called `name`. `None` if that is not known.
    pub async fn last(&self, delegate: &str, name: &str) -> Option<Vec<cri::Image>> {
        let mut lists = self.lists.lock().await;
        let images = self.known(&mut lists, delegate)?.iter();
        let is_it = |image: &&cri::Image| {
            name.is_empty()
                || image.id == name
                || image
                    .repo_tags
                    .iter()
                    .chain(&image.repo_digests)
                    .any(|one| one == name)
        };
        Some(images.filter(is_it).cloned().collect())
    }

    fn known<'a>(
        &self,
        lists: &'a mut HashMap<String, Vec<cri::Image>>,
        delegate: &str,
    ) -> Option<&'a Vec<cri::Image>> {
        if !lists.contains_key(delegate) {
            let images = self.read(delegate)?;
            lists.insert(delegate.to_owned(), images);
        }
        lists.get(delegate)
    }

    fn read(&self, delegate: &str) -> Option<Vec<cri::Image>> {
        let bytes = std::fs::read(self.path(delegate)).ok()?;
        let list = cri::ListImagesResponse::decode(bytes.as_slice()).ok()?;
        Some(list.images)
    }

    fn write(&self, delegate: &str, bytes: &[u8]) -> io::Result<()> {
        std::fs::create_dir_all(&self.directory)?;
        let path = self.path(delegate);
        let new = path.with_extension("new");
        std::fs::write(&new, bytes)?;
        std::fs::rename(new, path)
    }

    fn path(&self, delegate: &str) -> PathBuf {
        self.directory.join(format!("{delegate}.images"))
    }
}
