// SPDX-License-Identifier: Apache-2.0
//! A pull, step by step: manifest, configuration, all layers at the same time, record.
//!
//! The future may be dropped at any point: guards release what it has claimed ([`Needed`], `PartialLayer`), and the
//! thread that converts a layer ends when no more bytes arrive.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::sync::Arc;

use bulkhead_records::Sum;
use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};

use crate::config::Credentials;
use crate::contents::{Contents, ImageRecord, Needed, StoreError};
use crate::digest::Digest;
use crate::failure::FailureKind;
use crate::layer::{self, LayerError};
use crate::manifest::{Descriptor, ImageConfig, Manifest, ManifestError};
use crate::progress::Counters;
use crate::reference::{Reference, Version};
use crate::registry::{BlobStream, RegistryError, Repository};

const CONFIG_BYTES: u64 = 8 << 20;
/// How many chunks of a download (about 16 KiB each) may wait for the thread that converts them.
const CHUNKS_WAITING: usize = 16;
/// The most documents on the way to an image: an index may refer to an index, and that to an image.
const MANIFEST_DEPTH: usize = 3;

/// Why an image was not pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("pull {reference}")]
    Registry {
        reference: String,
        source: RegistryError,
    },
    #[error("pull {reference}")]
    Manifest {
        reference: String,
        source: ManifestError,
    },
    #[error("pull {reference}: layer {digest}")]
    Layer {
        reference: String,
        digest: Digest,
        source: LayerError,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("pull {reference}: one of its tasks panicked or was cancelled")]
    TaskFailed { reference: String },
}

impl PullError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Registry { source, .. } => source.kind(),
            Self::Manifest { source, .. } => source.kind(),
            Self::Layer { source, .. } => source.kind(),
            Self::Store(source) => source.kind(),
            Self::TaskFailed { .. } => FailureKind::Internal,
        }
    }
}

/// The state that all steps of one pull share.
struct Pull {
    contents: Arc<Contents>,
    reference: String,
    repository: Repository,
    progress: Arc<Counters>,
}

/// What a reference refers to.
struct Resolved {
    /// The digest of the manifest that the reference names, which may be an index.
    top: Digest,
    config: Descriptor,
    layers: Vec<Descriptor>,
    manifest_bytes: u64,
}

/// Downloads what is missing and records the image under `reference`.
pub async fn pull(
    contents: &Arc<Contents>,
    reference: &Reference,
    credentials: Option<Credentials>,
) -> Result<ImageRecord, PullError> {
    let shown = reference.to_string();
    let repository =
        Repository::new(reference, credentials, &contents.config).map_err(|source| {
            PullError::Registry {
                reference: shown.clone(),
                source,
            }
        })?;
    let pull = Arc::new(Pull {
        contents: Arc::clone(contents),
        progress: contents.pulls.begin(&shown),
        reference: shown,
        repository,
    });
    let Resolved {
        top,
        config,
        layers,
        manifest_bytes,
    } = pull.resolve(reference).await?;
    let tag = match &reference.version {
        Version::Tag(_) => Some(reference.to_string()),
        Version::Digest(_) => None,
    };
    let mut record = ImageRecord {
        id: config.digest.clone(),
        repo_tags: BTreeSet::from_iter(tag),
        repo_digests: BTreeSet::from([reference.with_digest(&top)]),
        layers: Vec::new(),
        defaults: Default::default(),
        metadata_bytes: manifest_bytes.saturating_add(config.size),
    };
    if let Some(known) = contents.complete_image(&config.digest)? {
        let _needed = contents.need(&known.layers);
        // A layer that was damaged is removed by this.
        for layer in &known.layers {
            contents.has_intact(layer).await?;
        }
        // The image may also have been removed between the check and the claim, so check again.
        if let Some(known) = contents.complete_image(&config.digest)? {
            record.layers = known.layers;
            record.defaults = known.defaults;
            return Ok(contents.publish(&record)?);
        }
    }
    let parsed = pull.config(&config, layers.len()).await?;
    record.defaults = parsed.defaults;
    let pairs = topmost(layers.into_iter().zip(parsed.diff_ids).collect());
    record.layers = pairs.iter().map(|(_, diff_id)| diff_id.clone()).collect();
    let needed = Arc::new(contents.need(&record.layers));
    pull.layers(pairs, &needed).await?;
    Ok(contents.publish(&record)?)
}

/// If a layer appears more than once, keeps only the topmost: it hides what the others show, and overlayfs does not
/// accept a directory twice.
fn topmost(mut layers: Vec<(Descriptor, Digest)>) -> Vec<(Descriptor, Digest)> {
    let mut seen = BTreeSet::new();
    layers.reverse();
    layers.retain(|(_, diff_id)| seen.insert(diff_id.clone()));
    layers.reverse();
    layers
}

impl Pull {
    /// Follows the reference, through indexes, to the image for this machine.
    async fn resolve(&self, reference: &Reference) -> Result<Resolved, PullError> {
        let mut version = reference.version_text().to_owned();
        let mut promised = match &reference.version {
            Version::Digest(digest) => Some(digest.clone()),
            Version::Tag(_) => None,
        };
        let (mut top, mut manifest_bytes) = (None, 0u64);
        for _ in 0..MANIFEST_DEPTH {
            let raw = self
                .repository
                .manifest(&version)
                .await
                .map_err(|e| self.registry(e))?;
            manifest_bytes = manifest_bytes.saturating_add(raw.bytes.len() as u64);
            let found = Digest::of(&raw.bytes);
            verify("manifest", promised.as_ref(), &found).map_err(|e| self.manifest(e))?;
            let top = top.get_or_insert(found).clone();
            match Manifest::parse(&raw.bytes, &raw.media_type).map_err(|e| self.manifest(e))? {
                Manifest::Image { config, layers } => {
                    return Ok(Resolved {
                        top,
                        config,
                        layers,
                        manifest_bytes,
                    });
                }
                Manifest::Index(next) => {
                    version = next.digest.to_string();
                    promised = Some(next.digest);
                }
            }
        }
        Err(self.manifest(ManifestError::Nested))
    }

    async fn config(&self, config: &Descriptor, layers: usize) -> Result<ImageConfig, PullError> {
        let bytes = self
            .repository
            .small_blob(&config.digest, config.size, CONFIG_BYTES)
            .await;
        let bytes = bytes.map_err(|e| self.registry(e))?;
        let found = Digest::of(&bytes);
        verify("image configuration", Some(&config.digest), &found)
            .map_err(|e| self.manifest(e))?;
        ImageConfig::parse(&bytes, layers).map_err(|e| self.manifest(e))
    }

    /// Fetches all layers at the same time. The first failure aborts the others. Each task holds the claim, so a layer
    /// that an aborted task has just finished is removed when the last task has ended.
    async fn layers(
        self: &Arc<Self>,
        layers: Vec<(Descriptor, Digest)>,
        needed: &Arc<Needed>,
    ) -> Result<(), PullError> {
        let mut tasks = JoinSet::new();
        for (descriptor, _) in &layers {
            self.progress.expect(descriptor.size);
        }
        for (descriptor, diff_id) in layers {
            let (pull, needed) = (Arc::clone(self), Arc::clone(needed));
            tasks.spawn(async move {
                let _needed = needed;
                pull.layer(&descriptor, &diff_id).await
            });
        }
        while let Some(result) = tasks.join_next().await {
            result.map_err(|_| self.task_failed())??;
        }
        Ok(())
    }

    /// Creates a layer, unless it is in the store or another pull is creating it.
    async fn layer(&self, descriptor: &Descriptor, diff_id: &Digest) -> Result<(), PullError> {
        let maker = self.contents.maker(diff_id);
        let _making = maker.lock().await;
        if self.contents.has_intact(diff_id).await? {
            self.progress.receive(descriptor.size);
            return Ok(());
        }
        let Ok(_turn) = self.contents.downloads.acquire().await else {
            return Err(self.task_failed());
        };
        let partial = self.contents.files.create()?;
        let layer_failed = |source| PullError::Layer {
            reference: self.reference.clone(),
            digest: descriptor.digest.clone(),
            source,
        };
        let file = partial
            .file()
            .map_err(|e| layer_failed(LayerError::Write(e)))?;
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
        let (digest, promised) = (descriptor.digest.clone(), diff_id.clone());
        let conversion = spawn_blocking(move || {
            let made = file.try_clone().map_err(LayerError::Write)?;
            layer::convert(ChunkReader::new(receiver), file, &digest, &promised)?;
            Sum::of(&made).map_err(LayerError::Write)
        });
        let blob = self.repository.blob(&descriptor.digest, descriptor.size);
        // A failed download ends the conversion's input, so that fails, too. The download's error is the real cause.
        let downloaded = forward(blob, sender, &self.progress).await;
        let converted = conversion.await.map_err(|_| self.task_failed())?;
        downloaded.map_err(|e| self.registry(e))?;
        let sum = converted.map_err(layer_failed)?;
        Ok(self.contents.keep(partial, diff_id, &sum)?)
    }

    fn registry(&self, source: RegistryError) -> PullError {
        PullError::Registry {
            reference: self.reference.clone(),
            source,
        }
    }

    fn manifest(&self, source: ManifestError) -> PullError {
        PullError::Manifest {
            reference: self.reference.clone(),
            source,
        }
    }

    fn task_failed(&self) -> PullError {
        PullError::TaskFailed {
            reference: self.reference.clone(),
        }
    }
}

fn verify(
    what: &'static str,
    promised: Option<&Digest>,
    found: &Digest,
) -> Result<(), ManifestError> {
    match promised {
        Some(promised) if promised != found => Err(ManifestError::Digest {
            what,
            promised: promised.clone(),
            found: found.clone(),
        }),
        _ => Ok(()),
    }
}

/// Passes a download on until it ends or the receiver is dropped.
async fn forward(
    mut blob: BlobStream<'_>,
    sender: mpsc::Sender<Bytes>,
    progress: &Counters,
) -> Result<(), RegistryError> {
    while let Some(chunk) = blob.next().await? {
        progress.receive(chunk.len() as u64);
        if sender.send(chunk).await.is_err() {
            // The conversion has failed. Its own result says why.
            break;
        }
    }
    Ok(())
}

/// Lets blocking code read a download.
struct ChunkReader {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl ChunkReader {
    fn new(chunks: mpsc::Receiver<Bytes>) -> Self {
        Self {
            chunks,
            current: Bytes::new(),
        }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = chunk,
                None => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        self.current
            .copy_to_slice(buffer.get_mut(..count).unwrap_or_default());
        Ok(count)
    }
}
