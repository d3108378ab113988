// SPDX-License-Identifier: Apache-2.0
//! The pull side of the distribution protocol (OCI distribution spec 1.1). It asks mirrors and the image's own host.
//!
//! One [`Repository`] serves one pull. It asks the mirrors in order, then the host itself, until one of them delivers
//! what was promised. Responses are limited in size, the time without data is limited, and there is a least throughput.

mod auth;
mod blob;
mod endpoint;
#[cfg(test)]
pub(crate) mod fake;

use std::time::Duration;

use bulkhead_text::chain;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};

use crate::config::{Config, Credentials};
use crate::digest::Digest;
use crate::failure::FailureKind;
use crate::reference::Reference;
#[cfg(feature = "fuzzing")]
pub use auth::Challenge;
pub use blob::{Barred, BlobStream};
use endpoint::Endpoint;
#[cfg(feature = "fuzzing")]
pub use endpoint::{error_message, pause};

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ENDPOINT: &str = "registry-1.docker.io";
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Why a registry did not deliver what was requested.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("set up the connection to {host}: {problem}")]
    Setup { host: String, problem: String },
    #[error("{url} cannot be reached")]
    Send {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{url} answers {status}{message}{}", in_words(.retry_after))]
    Status {
        url: String,
        status: StatusCode,
        /// For how long the host asks not to be asked again.
        retry_after: Option<Duration>,
        message: String,
    },
    #[error("{url} demands authentication of an unsupported kind: {challenge}")]
    Challenge { url: String, challenge: String },
    #[error("the answer of {url} is larger than {limit_bytes} bytes")]
    TooLarge { url: String, limit_bytes: u64 },
    #[error("the answer of {url} is not valid: {problem}")]
    Answer { url: String, problem: String },
    #[error("{url} sent almost no new data in {tries} tries")]
    Stalled { url: String, tries: u32 },
    #[error("the answer of {url} is not complete after {waited:?}")]
    Slow { url: String, waited: Duration },
    #[error(
        "{url} sent {bytes} bytes in {waited:.0?}, at least {least_bytes_per_second} bytes a second are expected \
         (images.min_kib_per_second)"
    )]
    Crawls {
        url: String,
        bytes: u64,
        waited: Duration,
        least_bytes_per_second: u64,
    },
    #[error("{url} has digest {found}, expected {promised}")]
    Digest {
        url: String,
        promised: Digest,
        found: Digest,
    },
    #[error("the mirrors failed ({mirrors}), and so did the host itself")]
    Mirrored {
        mirrors: String,
        source: Box<RegistryError>,
    },
}

impl RegistryError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Setup { .. } | Self::Challenge { .. } | Self::TooLarge { .. } => {
                FailureKind::Invalid
            }
            Self::Mirrored { source, .. } => source.kind(),
            Self::Status { status, .. } => match *status {
                StatusCode::NOT_FOUND => FailureKind::NotFound,
                StatusCode::UNAUTHORIZED => FailureKind::Unauthenticated,
                StatusCode::FORBIDDEN => FailureKind::Denied,
                _ => FailureKind::Unavailable,
            },
            Self::Digest { .. } => FailureKind::Corrupt,
            Self::Send { .. }
            | Self::Answer { .. }
            | Self::Stalled { .. }
            | Self::Slow { .. }
            | Self::Crawls { .. } => FailureKind::Unavailable,
        }
    }

    /// Whether a host sent other bytes than the descriptor promised. Another host may have the right ones.
    pub fn is_of_bytes(&self) -> bool {
        matches!(self, Self::Digest { .. } | Self::TooLarge { .. })
    }

    fn wanted_pause(&self) -> Duration {
        match self {
            Self::Status { retry_after, .. } => retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        }
    }

    /// Whether the same request may succeed a moment later.
    fn may_pass(&self) -> bool {
        match self {
            Self::Status { status, .. } => {
                *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
            }
            // A broken connection may work again. Timeouts were long enough, and other errors would stay the same.
            Self::Send { source, .. } => {
                !(source.is_timeout()
                    || source.is_connect()
                    || source.is_redirect()
                    || source.is_builder())
            }
            _ => false,
        }
    }
}

fn in_words(retry_after: &Option<Duration>) -> String {
    match retry_after {
        Some(pause) => format!(", and asks not to be asked again for {} s", pause.as_secs()),
        None => String::new(),
    }
}

/// A manifest as a host sent it.
#[derive(Debug)]
pub struct ServedManifest {
    pub bytes: Vec<u8>,
    /// The media type that the server sent. Manifests may contain it themselves.
    pub media_type: String,
}

/// A manifest, and how far the search for it came.
#[derive(Debug)]
pub struct RawManifest {
    pub served: ServedManifest,
    pub digest: Digest,
    /// How many hosts were asked, in order.
    pub asked_hosts: usize,
    /// Whether it is from the image's own host, so that no other can be asked.
    pub is_last_word: bool,
}

/// The hosts that may have one repository.
#[derive(Debug)]
pub struct Repository {
    name: String,
    endpoints: Vec<Endpoint>,
    stall_timeout: Duration,
    min_bytes_per_second: u64,
}

impl Repository {
    /// `credentials` are for the host of the reference, never for its mirrors.
    pub fn new(
        reference: &Reference,
        credentials: Option<Credentials>,
        config: &Config,
    ) -> Result<Self, RegistryError> {
        let settings = &config.registries;
        let own = settings.get(&reference.host).cloned().unwrap_or_default();
        let mut endpoints = Vec::with_capacity(own.mirrors.len() + 1);
        for mirror in &own.mirrors {
            let settings = settings.get(mirror).cloned().unwrap_or_default();
            endpoints.push(Endpoint::new(
                mirror,
                &settings,
                None,
                config.stall_timeout,
            )?);
        }
        let host = match reference.host.as_str() {
            DOCKER_HUB => DOCKER_HUB_ENDPOINT,
            host => host,
        };
        endpoints.push(Endpoint::new(
            host,
            &own,
            credentials,
            config.stall_timeout,
        )?);
        Ok(Self {
            name: reference.repository.clone(),
            endpoints,
            stall_timeout: config.stall_timeout,
            min_bytes_per_second: config.min_bytes_per_second,
        })
    }

    /// Fetches a manifest by tag or digest, from the first host after `skip` others that sends what was `promised`.
    pub async fn manifest(
        &self,
        version: &str,
        promised: Option<&Digest>,
        skip: usize,
    ) -> Result<RawManifest, RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
        let path = format!("{}/manifests/{version}", self.name);
        let mut failures = Vec::new();
        for (host, endpoint) in self.endpoints.iter().enumerate().skip(skip) {
            let error = match endpoint.manifest(&self.name, &path, &headers).await {
                Err(error) => error,
                Ok(served) => {
                    let found = Digest::of(&served.bytes);
                    match promised {
                        Some(promised) if *promised != found => RegistryError::Digest {
                            url: path.clone(),
                            promised: promised.clone(),
                            found,
                        },
                        _ => {
                            return Ok(RawManifest {
                                served,
                                digest: found,
                                is_last_word: host + 1 == self.endpoints.len(),
                                asked_hosts: host + 1,
                            });
                        }
                    }
                }
            };
            failures.push(error);
        }
        Err(self.no_answer(failures))
    }

    /// The error after all hosts failed. Its kind is that of the last one, the host itself. Its text has the mirrors'
    /// errors, too.
    fn no_answer(&self, mut failures: Vec<RegistryError>) -> RegistryError {
        let Some(last) = failures.pop() else {
            return RegistryError::Setup {
                host: self.name.clone(),
                problem: "no host to ask".to_owned(),
            };
        };
        if failures.is_empty() {
            return last;
        }
        let mirrors: Vec<_> = failures.iter().map(|error| chain(error)).collect();
        RegistryError::Mirrored {
            mirrors: mirrors.join("; "),
            source: Box::new(last),
        }
    }
}

#[cfg(test)]
mod tests;
