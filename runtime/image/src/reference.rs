// SPDX-License-Identifier: Apache-2.0
//! Image references, by the rules and defaults that Docker introduced: `busybox` means
//! `docker.io/library/busybox:latest`.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
const MAX_NAME_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;
const SHOWN_CHARACTERS: usize = 300;

/// Why a string is not a reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("image reference {text:?}: {problem}")]
pub struct ReferenceError {
    text: String,
    problem: &'static str,
}

/// Which version of a repository a reference names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Version {
    Tag(String),
    Digest(Digest),
}

/// A complete reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The host as users write it, with its port, such as `docker.io`.
    pub host: String,
    /// Such as `library/busybox`.
    pub repository: String,
    /// If there are a tag and a digest, the digest.
    pub version: Version,
}

impl Reference {
    /// Host and repository.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// The name with a digest, as `repo_digests` has it.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }

    /// The last part of the registry's URL, after `manifests/`.
    pub fn version_text(&self) -> &str {
        match &self.version {
            Version::Tag(tag) => tag,
            Version::Digest(digest) => digest.as_str(),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        parse(text).map_err(|problem| ReferenceError {
            text: text.chars().take(SHOWN_CHARACTERS).collect(),
            problem,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Tag(tag) => write!(f, "{}:{tag}", self.name()),
            Version::Digest(digest) => write!(f, "{}@{digest}", self.name()),
        }
    }
}

/// Splits `HOST/REPOSITORY:TAG@DIGEST` and adds the defaults. The error says what is wrong.
fn parse(text: &str) -> Result<Reference, &'static str> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest.parse().map_err(
                |_| "after the @ there must be sha256: and 64 lower-case hexadecimal digits",
            )?;
            (rest, Some(digest))
        }
        None => (text, None),
    };
    // A colon before the last slash belongs to a port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err("the tag must be 1 to 128 letters, digits, '_', '.' or '-'");
    }
    let (host, path) = match name.split_once('/') {
        Some((host, path)) if is_host(host) => (host, path),
        _ => (DEFAULT_HOST, name),
    };
    if !path.split('/').all(is_component) {
        return Err(
            "the repository must be lower-case letters and digits, with single separators ('.', '_', '__', '-') between them",
        );
    }
    let host = if host == "index.docker.io" {
        DEFAULT_HOST
    } else {
        host
    };
    let repository = if host == DEFAULT_HOST && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    // With the defaults, because this is the name under which the image will be asked for.
    if host.len() + 1 + repository.len() > MAX_NAME_BYTES {
        return Err("the name is longer than 255 bytes");
    }
    let version = match digest {
        Some(digest) => Version::Digest(digest),
        None => Version::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
    };
    Ok(Reference {
        host: host.to_owned(),
        repository,
        version,
    })
}

/// Whether the part before the first slash is a host and not the first part of the repository.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let looks_like_one = text == "localhost" || text.contains('.') || text.contains(':');
    let bracketed = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    let name_is_good = match bracketed {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let label = |label: &str| {
                !label.is_empty()
                    && label
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            };
            name.split('.').all(label)
        }
    };
    looks_like_one && name_is_good && port.is_none_or(is_port)
}

/// Rust's parser also takes a sign before the digits, but no URL can have it.
fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

fn is_component(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends_are_good = text.bytes().next().is_some_and(alphanumeric)
        && text.bytes().next_back().is_some_and(alphanumeric);
    let separators = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let separator_is_good =
        |part: &str| matches!(part, "" | "." | "_" | "__") || part.bytes().all(|byte| byte == b'-');
    ends_are_good && separators.into_iter().all(separator_is_good)
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG_BYTES
        && text.bytes().next().is_some_and(word)
        && text
            .bytes()
            .all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn for_all_texts_that_are_references_the_canonical_text_is_the_same_one(
            text in "([a-z0-9.]{1,9}(:[+0-9]{1,6})?/)?[a-z0-9._/-]{1,40}(:[A-Za-z0-9._-]{1,9})?",
            more in 0usize..250,
        ) {
            for text in [format!("{}{text}", "a/".repeat(more / 2)), text] {
                let Ok(reference) = text.parse::<Reference>() else {
                    continue;
                };
                let canonical = reference.to_string();
                prop_assert_eq!(canonical.parse::<Reference>(), Ok(reference), "{}", canonical);
            }
        }
    }

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn short_names_are_completed() {
        let by_digest = format!("busybox:1@{DIGEST}");
        let canonical = format!("docker.io/library/busybox@{DIGEST}");
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/a/b", "docker.io/a/b:latest"),
            ("localhost/app", "localhost/app:latest"),
            (
                "127.0.0.1:5000/a/b__c.d-e:X_1",
                "127.0.0.1:5000/a/b__c.d-e:X_1",
            ),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("registry:5000/app", "registry:5000/app:latest"),
            (&by_digest, &canonical),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), full, "{text}");
            assert_eq!(full.parse::<Reference>().unwrap(), reference, "{full}");
        }
    }

    #[test]
    fn mistakes_are_refused_with_the_text() {
        let long = "a/".repeat(200) + "b";
        // "docker.io/" comes before it.
        let long_with_host = "a/".repeat(123) + "b";
        for text in [
            "",
            ":tag",
            "a:",
            "UPPER/case image",
            "a/../b",
            "a//b",
            "a._b",
            "-a",
            "host:port/app",
            "localhost:+500/a",
            "a@sha256:12",
            "http://host/app",
            "app:tag with blank",
            &long,
            &long_with_host,
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("{text:?}")[..text.len().min(20)]),
                "{error}"
            );
        }
    }
}
