// SPDX-License-Identifier: Apache-2.0
//! Manifests, indexes and image configurations ([`configuration`]), of OCI (image-spec 1.1) and of Docker's schema 2,
//! which differ only in the names of media types. Unknown fields are ignored, as both specifications demand. A manifest
//! of something else than a container image is an [`artifact`].

mod artifact;
mod configuration;
mod platform;

use serde::Deserialize;

use crate::digest::Digest;
use crate::failure::{FailureKind, shorten};
use crate::layer::MAX_LAYER_BYTES;
pub use artifact::Artifact;
use artifact::Names;
pub use configuration::{ImageConfig, ImageDefaults};
use platform::Machine;
pub use platform::Platform;

/// overlayfs accepts 500 lower layers.
const MAX_LAYERS: usize = 500;
const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const IMAGE_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
/// The most entries without a platform that are tried.
const MAX_UNNAMED: usize = 8;

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("parse the {what}: {problem}")]
    Parse { what: &'static str, problem: String },
    #[error("manifest of type {0:?}: only OCI and Docker schema 2 images are supported")]
    MediaType(String),
    #[error("no image for {wanted}, the index has {offered}")]
    Platform { wanted: String, offered: String },
    #[error(
        "an artifact of type {0:?} is in an index that does not say for which platform it is: pull the artifact itself"
    )]
    Artifact(String),
    #[error("file {name:?} (blob {blob}) of the artifact: {problem}")]
    FileName {
        name: String,
        blob: Digest,
        problem: String,
    },
    #[error("image has {layers} layers, but {diff_ids} diff ids in the configuration")]
    LayerCount { layers: usize, diff_ids: usize },
    #[error("image has {0} layers, at most {MAX_LAYERS} can be stacked")]
    TooManyLayers(usize),
    #[error("image has a layer of {0} bytes, at most {MAX_LAYER_BYTES} are allowed")]
    LayerSize(u64),
    #[error(
        "the image configuration has {bytes} bytes of {what}, at most {most_bytes} are allowed"
    )]
    ConfigSize {
        what: &'static str,
        bytes: usize,
        most_bytes: usize,
    },
    #[error("indexes are nested too deeply")]
    Nested,
}

impl ManifestError {
    /// The error for an image whose configuration says that it is for other machines.
    pub fn not_for_this_machine(platform: &Platform) -> Self {
        Self::Platform {
            wanted: Machine::this().to_string(),
            offered: shorten(&platform.to_string()),
        }
    }

    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Platform { .. } => FailureKind::NotFound,
            _ => FailureKind::Invalid,
        }
    }
}

/// A reference from one document to another (OCI descriptor).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    platform: Option<Platform>,
    annotations: Option<Names>,
}

/// What a manifest turned out to be.
#[derive(Debug)]
pub enum Manifest {
    /// An index, with what may be the image for this machine.
    Index(Candidates),
    Image {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
    Artifact(Artifact),
}

/// The entries of an index that may lead to the image for this machine.
#[derive(Debug)]
pub enum Candidates {
    /// The index says that this is the one.
    Named(Box<Descriptor>),
    /// The index says of none of these what it is for. The configuration of each image does.
    Unnamed(Vec<Descriptor>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    media_type: Option<String>,
    artifact_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Manifest {
    /// `served_type` is the media type that the server sent. The one in the document has precedence.
    pub fn parse(bytes: &[u8], served_type: &str) -> Result<Self, ManifestError> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|error| unreadable("manifest", &error))?;
        let media_type = document.media_type.as_deref().unwrap_or(served_type);
        // A document that is both index and image could be one image here and another one elsewhere: refuse it.
        match (document.manifests, document.config, document.layers) {
            (Some(manifests), None, None) if INDEX_TYPES.contains(&media_type) => {
                choose(manifests, &Machine::this()).map(Self::Index)
            }
            (None, Some(config), Some(layers)) if IMAGE_TYPES.contains(&media_type) => {
                if layers.len() > MAX_LAYERS {
                    return Err(ManifestError::TooManyLayers(layers.len()));
                }
                if let Some(layer) = layers.iter().find(|layer| layer.size > MAX_LAYER_BYTES) {
                    return Err(ManifestError::LayerSize(layer.size));
                }
                if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
                    let artifact =
                        Artifact::new(document.artifact_type.as_deref(), &config, layers);
                    return artifact.map(Self::Artifact);
                }
                Ok(Self::Image { config, layers })
            }
            _ => Err(ManifestError::MediaType(shorten(media_type))),
        }
    }
}

/// A parse error. The parser's message may quote the document, which comes from another party, so it is shortened.
fn unreadable(what: &'static str, error: &serde_json::Error) -> ManifestError {
    ManifestError::Parse {
        what,
        problem: shorten(&error.to_string()),
    }
}

/// The entry of an index that suits the machine best, else those that do not say what they are for.
fn choose(manifests: Vec<Descriptor>, machine: &Machine) -> Result<Candidates, ManifestError> {
    let platforms = manifests.iter().filter_map(|one| one.platform.as_ref());
    let offered = platforms.map(ToString::to_string).take(20);
    let offered = offered.collect::<Vec<_>>().join(", ");
    let mut best: Option<(u8, Descriptor)> = None;
    let mut unnamed = Vec::new();
    for one in manifests {
        let Some(platform) = &one.platform else {
            if unnamed.len() < MAX_UNNAMED {
                unnamed.push(one);
            }
            continue;
        };
        let Some(level) = machine.suits(platform) else {
            continue;
        };
        // Of two that suit as well, the first.
        if best.as_ref().is_none_or(|(highest, _)| level > *highest) {
            best = Some((level, one));
        }
    }
    match best {
        Some((_, one)) => Ok(Candidates::Named(Box::new(one))),
        None if !unnamed.is_empty() => Ok(Candidates::Unnamed(unnamed)),
        None => Err(ManifestError::Platform {
            wanted: machine.to_string(),
            offered: if offered.is_empty() {
                "none".to_owned()
            } else {
                shorten(&offered)
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn descriptor(media_type: &str, more: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"{DIGEST}","size":1{more}}}"#)
    }

    #[test]
    fn an_index_leads_to_this_machines_image() {
        let list = |architectures: &[&str]| {
            let one = |architecture: &&str| {
                let platform =
                    format!(r#","platform":{{"os":"linux","architecture":"{architecture}"}}"#);
                descriptor(IMAGE_TYPES[0], &platform)
            };
            let manifests: Vec<_> = architectures.iter().map(one).collect();
            format!(
                r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
                manifests.join(",")
            )
        };
        for media_type in INDEX_TYPES {
            let found = Manifest::parse(list(&["arm64", "amd64"]).as_bytes(), media_type).unwrap();
            assert!(matches!(found, Manifest::Index(_)));
        }
        let error =
            Manifest::parse(list(&["arm64", "s390x"]).as_bytes(), INDEX_TYPES[0]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no image for linux/amd64, the index has linux/arm64, linux/s390x"
        );
        assert_eq!(error.kind(), FailureKind::NotFound);
    }

    #[test]
    fn the_highest_level_that_the_cpu_has_is_taken() {
        let entry = |platform: &str, size: u64| {
            let text = format!(r#"{{"digest":"{DIGEST}","size":{size}{platform}}}"#);
            serde_json::from_str::<Descriptor>(&text).unwrap()
        };
        let amd64 = |variant: &str| {
            let variant = match variant {
                "" => String::new(),
                variant => format!(r#","variant":"{variant}""#),
            };
            format!(r#","platform":{{"os":"linux","architecture":"amd64"{variant}}}"#)
        };
        let taken = |level, variants: &[&str]| {
            let list = variants.iter().zip(1..);
            let list = list.map(|(variant, size)| match *variant {
                "unnamed" => entry("", size),
                variant => entry(&amd64(variant), size),
            });
            match choose(list.collect(), &Machine::new("amd64", level)).ok()? {
                Candidates::Named(one) => Some(vec![one.size]),
                Candidates::Unnamed(list) => Some(list.iter().map(|one| one.size).collect()),
            }
        };
        let all = ["v4", "v3", "v2", ""];
        for (level, variants, expected) in [
            (1, &all[..], Some(vec![4])),
            (2, &all, Some(vec![3])),
            (3, &all, Some(vec![2])),
            (4, &all, Some(vec![1])),
            (3, &["", "v1", "v2", "v2"], Some(vec![3])),
            (1, &["v1", ""], Some(vec![1])),
            (1, &["v3", "v2"], None),
            (1, &["v3", "unnamed", "unnamed"], Some(vec![2, 3])),
            (1, &["unnamed", ""], Some(vec![2])),
            (4, &["vX"], None),
        ] {
            assert_eq!(taken(level, variants), expected, "{level} {variants:?}");
        }
    }

    #[test]
    fn only_images_and_artifacts_are_taken() {
        let config = descriptor(CONFIG_TYPES[1], "");
        let chart = descriptor("application/vnd.cncf.helm.config.v1+json", "");
        for (document, served_type, is_good) in [
            (
                format!(r#"{{"config":{config},"layers":[]}}"#),
                IMAGE_TYPES[1],
                true,
            ),
            (
                format!(r#"{{"config":{config},"layers":[]}}"#),
                "text/html",
                false,
            ),
            (
                format!(r#"{{"config":{config},"layers":[],"manifests":[]}}"#),
                IMAGE_TYPES[0],
                false,
            ),
            (
                format!(r#"{{"config":{chart},"layers":[]}}"#),
                IMAGE_TYPES[0],
                true,
            ),
            (
                r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
                "application/json",
                false,
            ),
            ("no json".to_owned(), IMAGE_TYPES[0], false),
        ] {
            let result = Manifest::parse(document.as_bytes(), served_type);
            assert_eq!(
                result.is_ok(),
                is_good,
                "{document} as {served_type}: {result:?}"
            );
        }
    }

    #[test]
    fn an_error_quotes_little_of_a_hostile_manifest() {
        let long = "long\u{1b}".repeat(100_000);
        let quoted = serde_json::to_string(&long).unwrap();
        let config = descriptor(CONFIG_TYPES[0], "");
        let layer = config.replace(r#""size":1"#, r#""size":18446744073709551615"#);
        for (document, media_type) in [
            (format!(r#"{{"layers":{quoted}}}"#), IMAGE_TYPES[0]),
            (format!(r#"{{"mediaType":{quoted}}}"#), IMAGE_TYPES[0]),
            (
                format!(
                    r#"{{"config":{{"mediaType":"x/y","digest":"{DIGEST}","size":1}},"layers":[{{"mediaType":"x/y","digest":"{DIGEST}","size":1,"annotations":{{"org.opencontainers.image.title":{quoted}}}}}]}}"#
                ),
                IMAGE_TYPES[0],
            ),
            (
                format!(
                    r#"{{"manifests":[{{"digest":"{DIGEST}","size":1,"platform":{{"os":{quoted},"architecture":"x"}}}}]}}"#
                ),
                INDEX_TYPES[0],
            ),
            (
                format!(r#"{{"config":{config},"layers":[{layer}]}}"#),
                IMAGE_TYPES[0],
            ),
        ] {
            let text = Manifest::parse(document.as_bytes(), media_type)
                .unwrap_err()
                .to_string();
            assert!(
                text.len() < 2000 && !text.contains('\u{1b}'),
                "{text:.3000}"
            );
        }
    }
}
