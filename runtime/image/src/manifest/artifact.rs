// SPDX-License-Identifier: Apache-2.0
//! Artifacts (image-spec, manifest.md, "Guidelines for Artifact Usage"): manifests whose configuration is none of a
//! container image. A volume shows their blobs: archives unpacked, all others as files with the names that annotations
//! give them.

use serde::Deserialize;

use super::{Descriptor, ManifestError};
use crate::failure::shorten;
use crate::layer::{Content, file_path};

/// The blob of an artifact that has none.
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// How the media type of an archive ends. Those of images, Helm charts and models do.
const ARCHIVE_ENDS: [&str; 7] = [
    ".tar",
    ".tar+gzip",
    ".tar+zstd",
    ".tar.gzip",
    ".tar.zstd",
    "/x-tar",
    "/tar+gzip",
];

/// The annotations of a blob that say what its file is called, the first one before the second.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Names {
    #[serde(rename = "org.opencontainers.image.title")]
    title: Option<String>,
    /// Of the specification of models.
    #[serde(rename = "org.cnai.model.filepath")]
    file_path: Option<String>,
}

/// An artifact, with what each of its blobs is.
#[derive(Debug)]
pub struct Artifact {
    /// What it says it is. Shortened.
    pub artifact_type: String,
    pub blobs: Vec<(Content, Descriptor)>,
}

impl Artifact {
    /// `artifact_type` is empty if the type of the configuration says what it is.
    pub fn new(
        artifact_type: Option<&str>,
        config: &Descriptor,
        blobs: Vec<Descriptor>,
    ) -> Result<Self, ManifestError> {
        let blobs = blobs.into_iter();
        let blobs = blobs.filter(|blob| blob.media_type != EMPTY_TYPE);
        let blobs: Vec<_> = blobs.map(|blob| (content(&blob), blob)).collect();
        check_names(&blobs)?;
        Ok(Self {
            artifact_type: type_of(artifact_type, config),
            blobs,
        })
    }
}

fn type_of(artifact_type: Option<&str>, config: &Descriptor) -> String {
    let said = artifact_type.filter(|said| !said.is_empty());
    shorten(said.unwrap_or(&config.media_type))
}

/// What a blob is. A file without a name is called by its digest, so that none is missing.
fn content(blob: &Descriptor) -> Content {
    let names = blob.annotations.clone().unwrap_or_default();
    let said = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
    let name = said(&names.title).or_else(|| said(&names.file_path));
    let media_type = blob
        .media_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim_end();
    if ARCHIVE_ENDS.iter().any(|end| media_type.ends_with(end)) {
        // An archive says itself how its files are called.
        return Content::Archive {
            name: name.filter(|name| file_path(name).is_ok()),
        };
    }
    Content::File {
        name: name.unwrap_or_else(|| blob.digest.to_string()),
    }
}

/// Checks that each file can have its name, which must be no other's and no part of another's.
fn check_names(blobs: &[(Content, Descriptor)]) -> Result<(), ManifestError> {
    let mut files = Vec::new();
    for (content, blob) in blobs {
        if let Content::File { name } = content {
            let path = file_path(name).map_err(|error| refused(name, blob, &error.to_string()))?;
            files.push((path, name, blob));
        }
    }
    // A path is followed by those that are below it.
    files.sort_by(|(one, ..), (other, ..)| one.cmp(other));
    for ((path, ..), (next, name, blob)) in files.iter().zip(files.iter().skip(1)) {
        if next.starts_with(path) {
            return Err(refused(
                name,
                blob,
                "another file has that name or is on the way",
            ));
        }
    }
    Ok(())
}

fn refused(name: &str, blob: &Descriptor, problem: &str) -> ManifestError {
    ManifestError::FileName {
        name: shorten(name),
        blob: blob.digest.clone(),
        problem: problem.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{IMAGE_TYPES, Manifest};
    use super::*;
    use crate::digest::Digest;

    const TITLE: &str = "org.opencontainers.image.title";

    fn blob(media_type: &str, annotations: Value) -> Value {
        let digest = Digest::of(annotations.to_string().as_bytes());
        json!({ "mediaType": media_type, "digest": digest, "size": 1, "annotations": annotations })
    }

    fn parse(blobs: &[Value]) -> Result<Artifact, ManifestError> {
        let document = json!({
            "schemaVersion": 2, "artifactType": "application/vnd.example",
            "config": { "mediaType": EMPTY_TYPE, "digest": Digest::of(b"{}"), "size": 2 },
            "layers": blobs,
        });
        match Manifest::parse(document.to_string().as_bytes(), IMAGE_TYPES[0])? {
            Manifest::Artifact(artifact) => Ok(artifact),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn blobs_are_archives_by_their_type_and_else_files_by_their_title() {
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        let digest = Digest::of(b"{}").to_string();
        let named = |name: &str| Some(name.to_owned());
        let file = |name: &str| Content::File { name: name.into() };
        for (media_type, annotations, expected) in [
            ("text/plain", json!({ TITLE: "a.txt" }), file("a.txt")),
            (
                "text/plain",
                json!({ TITLE: "dir/a.txt", "x": 1 }),
                file("dir/a.txt"),
            ),
            ("application/gzip", json!({ TITLE: "a.gz" }), file("a.gz")),
            (
                "a/b",
                json!({ TITLE: "", "org.cnai.model.filepath": "m" }),
                file("m"),
            ),
            ("text/plain", json!({}), file(&digest)),
            (
                tar,
                json!({ TITLE: "/models" }),
                Content::Archive { name: None },
            ),
            (tar, json!({}), Content::Archive { name: None }),
            (
                tar,
                json!({ TITLE: "d" }),
                Content::Archive { name: named("d") },
            ),
            (
                "application/x-tar; a=b",
                json!({}),
                Content::Archive { name: None },
            ),
        ] {
            let artifact = parse(&[blob(media_type, annotations)]).unwrap();
            assert_eq!(artifact.artifact_type, "application/vnd.example");
            let contents: Vec<_> = artifact.blobs.into_iter().map(|(one, _)| one).collect();
            assert_eq!(contents, [expected], "{media_type}");
        }
        let nothing = json!({ "mediaType": EMPTY_TYPE, "digest": Digest::of(b"{}"), "size": 2 });
        assert!(parse(&[nothing]).unwrap().blobs.is_empty());
        assert!(parse(&[]).unwrap().blobs.is_empty());
    }

    #[test]
    fn names_that_lead_out_or_are_not_unique_are_refused() {
        let titled = |title: &str| blob("text/plain", json!({ TITLE: title }));
        for titles in [
            &["../x"][..],
            &["/etc/passwd"],
            &["a/../../b"],
            &["."],
            &["a/"],
            &["a", "a"],
            &["a", "./a"],
            &["a", "a/b"],
            &["a/b", "a"],
        ] {
            let blobs: Vec<_> = titles.iter().map(|title| titled(title)).collect();
            let error = parse(&blobs).unwrap_err();
            assert!(
                matches!(error, ManifestError::FileName { .. }),
                "{titles:?}: {error}"
            );
            assert!(error.to_string().contains("sha256:"), "{error}");
        }
        let blobs = ["a/b", "a/c", "d"].map(titled);
        assert_eq!(parse(&blobs).unwrap().blobs.len(), 3);
    }
}
