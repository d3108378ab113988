// SPDX-License-Identifier: Apache-2.0
//! A pull, step by step: manifest, configuration, all layers at the same time ([`layers`]), record. An artifact's
//! configuration says nothing to us, and its blobs are its layers.
//!
//! Nothing is taken over from the store on the word of a manifest. A manifest names a configuration and layers by
//! digests, which its author may have from somebody else's private image. The configuration is always downloaded, and
//! each layer that is in the store is asked for at the registry, with the credentials of this pull.
//!
//! The future may be dropped at any point: guards release what it has claimed (`Needed`, `PartialLayer`), and the
//! threads that convert layers are told to end.

mod layers;

use std::collections::BTreeSet;
use std::sync::Arc;

use bulkhead_faults::{self as faults, Fault, Step};
use tokio::task::spawn_blocking;

use crate::config::Credentials;
use crate::contents::{Contents, ImageRecord, StoreError};
use crate::digest::Digest;
use crate::failure::FailureKind;
use crate::layer::{Content, Excess, LayerError, Limits, Promise};
use crate::manifest::{Artifact, Candidates, Descriptor, ImageConfig, Manifest, ManifestError};
use crate::progress::Counters;
use crate::reference::{Reference, Version};
use crate::registry::{RegistryError, Repository};
use crate::turns::{MAX_PULLS, PullTurns};

const CONFIG_BYTES: u64 = 8 << 20;
/// The most documents on the way to an image: an index may refer to an index, and that to an image.
const MANIFEST_DEPTH: usize = 3;
/// The most documents that are read until the image is found: indexes need not say which entry is for which machine.
const MAX_MANIFESTS: usize = 16;

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
    #[error("pull {reference}")]
    Excess { reference: String, source: Excess },
    #[error("pull {reference}: {MAX_PULLS} pulls are running, try again later")]
    Busy { reference: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("pull {reference}: one of its tasks panicked or was cancelled")]
    TaskFailed { reference: String },
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl PullError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Registry { source, .. } => source.kind(),
            Self::Manifest { source, .. } => source.kind(),
            Self::Layer { source, .. } => source.kind(),
            Self::Excess { source, .. } => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Busy { .. } => FailureKind::Unavailable,
            Self::TaskFailed { .. } | Self::Fault(_) => FailureKind::Internal,
        }
    }

    /// Whether a host sent other bytes than were promised.
    fn is_of_bytes(&self) -> bool {
        match self {
            Self::Registry { source, .. } => source.is_of_bytes(),
            Self::Layer { source, .. } => source.is_of_bytes(),
            _ => false,
        }
    }
}

/// The state that all steps of one pull share.
struct Pull {
    contents: Arc<Contents>,
    reference: String,
    host: String,
    repository: Repository,
    progress: Arc<Counters>,
    turns: PullTurns,
    limits: Arc<Limits>,
}

/// What a reference refers to.
struct Resolved {
    /// The digest of the manifest that the reference names, which may be an index.
    top: Digest,
    found: Found,
    manifest_bytes: u64,
}

enum Found {
    Image {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
    Artifact {
        /// Of its manifest.
        digest: Digest,
        artifact: Artifact,
    },
}

/// A document that may lead to the image.
struct Candidate {
    version: String,
    promised: Option<Digest>,
    /// How many documents lead to it, itself included.
    depth: usize,
    /// Whether the reference and each index on the way name it as the one for this machine.
    is_named: bool,
}

impl Candidate {
    /// An entry of the index `before`.
    fn behind(before: &Self, entry: Descriptor, is_named: bool) -> Self {
        Self {
            version: entry.digest.to_string(),
            promised: Some(entry.digest),
            depth: before.depth + 1,
            is_named,
        }
    }
}

/// Downloads what is missing and records the image under `reference`.
pub async fn pull(
    contents: &Arc<Contents>,
    reference: &Reference,
    credentials: Option<Credentials>,
) -> Result<ImageRecord, PullError> {
    let shown = reference.to_string();
    let Some(turns) = contents.turns.pull(&reference.host) else {
        return Err(PullError::Busy { reference: shown });
    };
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
        host: reference.host.clone(),
        repository,
        turns,
        limits: Arc::new(contents.limits()?),
    });
    let Resolved {
        top,
        found,
        manifest_bytes,
    } = faults::around(Step::ReadManifest, pull.resolve(reference)).await?;
    let tag = match &reference.version {
        Version::Tag(_) => Some(reference.to_string()),
        Version::Digest(_) => None,
    };
    let named = |id: Digest| ImageRecord {
        id,
        repo_tags: BTreeSet::from_iter(tag),
        repo_digests: BTreeSet::from([reference.with_digest(&top)]),
        layers: Vec::new(),
        defaults: Default::default(),
        metadata_bytes: manifest_bytes,
        artifact_type: None,
    };
    let (mut record, layers) = match found {
        Found::Image { config, layers } => {
            let mut record = named(config.digest.clone());
            record.metadata_bytes = manifest_bytes.saturating_add(config.size);
            let parsed = pull.config(&config, layers.len());
            let parsed = faults::around(Step::ReadConfiguration, parsed).await?;
            record.defaults = parsed.defaults;
            let diff_ids = parsed.diff_ids.into_iter();
            let layers = layers.into_iter().zip(diff_ids);
            let layers = layers.map(|(layer, diff_id)| promise(layer, Content::Layer { diff_id }));
            (record, layers.collect())
        }
        Found::Artifact { digest, artifact } => {
            let mut record = named(digest);
            record.artifact_type = Some(artifact.artifact_type);
            let blobs = artifact.blobs.into_iter();
            let layers = blobs.map(|(content, blob)| promise(blob, content));
            (record, layers.collect())
        }
    };
    let layers = topmost(layers);
    record.layers = layers.iter().map(Promise::layer).collect();
    let needed = Arc::new(contents.need(&record.layers));
    pull.layers(layers, &needed).await?;
    Ok(contents.publish(&record)?)
}

fn promise(descriptor: Descriptor, content: Content) -> Promise {
    Promise {
        digest: descriptor.digest,
        bytes: descriptor.size,
        content,
    }
}

/// If a layer appears more than once, keeps only the topmost: it hides what the others show, and overlayfs does not
/// accept a directory twice.
fn topmost(mut layers: Vec<Promise>) -> Vec<Promise> {
    let mut seen = BTreeSet::new();
    layers.reverse();
    layers.retain(|layer| seen.insert(layer.layer()));
    layers.reverse();
    layers
}

impl Pull {
    /// Follows the reference, through indexes, to the image for this machine, or to an artifact.
    async fn resolve(&self, reference: &Reference) -> Result<Resolved, PullError> {
        let promised = match &reference.version {
            Version::Digest(digest) => Some(digest.clone()),
            Version::Tag(_) => None,
        };
        // The last one is tried first.
        let mut untried = vec![Candidate {
            version: reference.version_text().to_owned(),
            promised,
            depth: 1,
            is_named: true,
        }];
        let (mut top, mut manifest_bytes) = (None, 0u64);
        let mut unsuitable = ManifestError::Nested;
        for _ in 0..MAX_MANIFESTS {
            let Some(one) = untried.pop() else { break };
            let read = self.one_manifest(&one.version, one.promised.as_ref()).await;
            let (manifest, digest, bytes) = match read {
                // Something else than an image for this machine may stand beside one.
                Err(PullError::Manifest { source, .. }) if !one.is_named => {
                    unsuitable = source;
                    continue;
                }
                read => read?,
            };
            manifest_bytes = manifest_bytes.saturating_add(bytes);
            let top = top.get_or_insert_with(|| digest.clone()).clone();
            match manifest {
                // It may stand beside an image, and says nothing of machines.
                Manifest::Artifact(artifact) if !one.is_named => {
                    unsuitable = ManifestError::Artifact(artifact.artifact_type);
                }
                Manifest::Artifact(artifact) => {
                    return Ok(Resolved {
                        top,
                        found: Found::Artifact { digest, artifact },
                        manifest_bytes,
                    });
                }
                Manifest::Image { config, layers } => {
                    if !one.is_named
                        && let Err(error) = self.suits(&config, layers.len()).await?
                    {
                        unsuitable = error;
                        continue;
                    }
                    return Ok(Resolved {
                        top,
                        found: Found::Image { config, layers },
                        manifest_bytes,
                    });
                }
                Manifest::Index(_) if one.depth == MANIFEST_DEPTH => {
                    unsuitable = ManifestError::Nested;
                }
                Manifest::Index(Candidates::Named(next)) => {
                    untried.push(Candidate::behind(&one, *next, one.is_named));
                }
                Manifest::Index(Candidates::Unnamed(list)) => {
                    let next = list.into_iter().rev();
                    untried.extend(next.map(|next| Candidate::behind(&one, next, false)));
                }
            }
        }
        Err(self.manifest(unsuitable))
    }

    /// Whether an image is for this machine, by its configuration.
    async fn suits(
        &self,
        config: &Descriptor,
        layers: usize,
    ) -> Result<Result<(), ManifestError>, PullError> {
        match self.config(config, layers).await {
            Ok(parsed) if parsed.platform.suits_this_machine() => Ok(Ok(())),
            Ok(parsed) => Ok(Err(ManifestError::not_for_this_machine(&parsed.platform))),
            Err(PullError::Manifest { source, .. }) => Ok(Err(source)),
            Err(error) => Err(error),
        }
    }

    /// One manifest with its digest and size. If a mirror sends something else for a tag, the next host is asked.
    async fn one_manifest(
        &self,
        version: &str,
        promised: Option<&Digest>,
    ) -> Result<(Manifest, Digest, u64), PullError> {
        let mut skip = 0;
        loop {
            let raw = self.repository.manifest(version, promised, skip).await;
            let raw = raw.map_err(|e| self.registry(e))?;
            let bytes = raw.served.bytes.len() as u64;
            let served = raw.served;
            let parsed = self.apart(move || Manifest::parse(&served.bytes, &served.media_type));
            match parsed.await {
                Err(error) if promised.is_none() && !raw.is_last_word => {
                    tracing::warn!(%error, "a mirror sent no manifest, the next host is asked");
                    skip = raw.asked_hosts;
                }
                parsed => return Ok((parsed?, raw.digest, bytes)),
            }
        }
    }

    async fn config(&self, config: &Descriptor, layers: usize) -> Result<ImageConfig, PullError> {
        let bytes = self
            .repository
            .small_blob(&config.digest, config.size, CONFIG_BYTES)
            .await;
        let bytes = bytes.map_err(|e| self.registry(e))?;
        self.apart(move || ImageConfig::parse(&bytes, layers)).await
    }

    /// Parses a document on a thread that may block: one of some MiB takes long.
    async fn apart<T: Send + 'static>(
        &self,
        parse: impl FnOnce() -> Result<T, ManifestError> + Send + 'static,
    ) -> Result<T, PullError> {
        let parsed = spawn_blocking(parse).await;
        parsed
            .map_err(|_| self.task_failed())?
            .map_err(|e| self.manifest(e))
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

    fn excess(&self, source: Excess) -> PullError {
        PullError::Excess {
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
