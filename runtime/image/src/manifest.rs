// SPDX-License-Identifier: Apache-2.0
//! Manifests, indexes and image configurations ([`configuration`]), of OCI (image-spec 1.1) and of Docker's schema 2,
//! which differ only in the names of media types. Unknown fields are ignored, as both specifications demand.

mod configuration;

use serde::Deserialize;

use crate::digest::Digest;
use crate::failure::{FailureKind, shorten};
use crate::layer::MAX_LAYER_BYTES;
pub use configuration::{ImageConfig, ImageDefaults};

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
const OS: &str = "linux";

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("parse the {what}: {problem}")]
    Parse { what: &'static str, problem: String },
    #[error("manifest of type {0:?}: only OCI and Docker schema 2 images are supported")]
    MediaType(String),
    #[error("no image for {wanted}, the index has {offered}")]
    Platform { wanted: String, offered: String },
    #[error("a manifest with configuration type {0:?} is an artifact, not a container image")]
    Artifact(String),
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
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
    variant: Option<String>,
}

/// What a manifest turned out to be.
#[derive(Debug)]
pub enum Manifest {
    /// An index. The descriptor is that of the image for this machine.
    Index(Descriptor),
    Image {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    media_type: Option<String>,
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
                choose(manifests, &machine()).map(Self::Index)
            }
            (None, Some(config), Some(layers)) if IMAGE_TYPES.contains(&media_type) => {
                if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
                    return Err(ManifestError::Artifact(shorten(&config.media_type)));
                }
                if layers.len() > MAX_LAYERS {
                    return Err(ManifestError::TooManyLayers(layers.len()));
                }
                if let Some(layer) = layers.iter().find(|layer| layer.size > MAX_LAYER_BYTES) {
                    return Err(ManifestError::LayerSize(layer.size));
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

/// This machine's architecture, by Go's name.
fn machine() -> String {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
    .to_owned()
}

/// The first manifest of an index that is for Linux on this architecture.
fn choose(manifests: Vec<Descriptor>, architecture: &str) -> Result<Descriptor, ManifestError> {
    let show = |platform: &Platform| {
        let variant = platform.variant.iter().map(|variant| format!("/{variant}"));
        format!(
            "{}/{}{}",
            platform.os,
            platform.architecture,
            variant.collect::<String>()
        )
    };
    let offered = manifests
        .iter()
        .filter_map(|one| one.platform.as_ref())
        .map(show);
    let offered = offered.take(20).collect::<Vec<_>>().join(", ");
    let fits = |one: &Descriptor| {
        let platform = one.platform.as_ref();
        platform.is_some_and(|platform| platform.os == OS && platform.architecture == architecture)
    };
    manifests
        .into_iter()
        .find(fits)
        .ok_or_else(|| ManifestError::Platform {
            wanted: format!("{OS}/{architecture}"),
            offered: if offered.is_empty() {
                "none with a platform".to_owned()
            } else {
                shorten(&offered)
            },
        })
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
    fn only_container_images_are_taken() {
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
                false,
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
                    r#"{{"config":{{"mediaType":{quoted},"digest":"{DIGEST}","size":1}},"layers":[]}}"#
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
