// SPDX-License-Identifier: Apache-2.0
//! The pull side of the distribution protocol (OCI distribution spec 1.1), over the mirrors and the host of a
//! reference.
//!
//! One [`Repository`] serves one pull. It asks the mirrors in their order, then the host itself; what a mirror does not
//! have or cannot do, the next one is asked for. Answers are bounded in size, and silence in time.

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
use crate::failure::FailureKind;
use crate::reference::Reference;
pub use blob::BlobStream;
use endpoint::Endpoint;

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ENDPOINT: &str = "registry-1.docker.io";
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Why a registry did not give what was asked for.
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
    #[error("{url} answers {status}{message}")]
    Status {
        url: String,
        status: StatusCode,
        message: String,
    },
    #[error("{url} asks for an authentication that is not supported: {challenge}")]
    Challenge { url: String, challenge: String },
    #[error("the answer of {url} is larger than {limit_bytes} bytes")]
    TooLarge { url: String, limit_bytes: u64 },
    #[error("the answer of {url} makes no sense: {problem}")]
    Answer { url: String, problem: String },
    #[error("{url} sent next to nothing new in {tries} tries")]
    Stalled { url: String, tries: u32 },
    #[error("the answer of {url} is not complete after {waited:?}")]
    Slow { url: String, waited: Duration },
    #[error("the mirrors were of no use ({mirrors}), nor was the host itself")]
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
            Self::Send { .. } | Self::Answer { .. } | Self::Stalled { .. } | Self::Slow { .. } => {
                FailureKind::Unavailable
            }
        }
    }

    /// Whether the same request may succeed a moment later.
    fn may_pass(&self) -> bool {
        match self {
            Self::Status { status, .. } => {
                *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
            }
            // A connection that broke. Silence was waited for long enough, and the rest stays as it is.
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

/// A manifest as it came.
#[derive(Debug)]
pub struct RawManifest {
    pub bytes: Vec<u8>,
    /// What the server says it is; manifests also say it themselves.
    pub media_type: String,
}

/// Where one repository is found.
#[derive(Debug)]
pub struct Repository {
    name: String,
    endpoints: Vec<Endpoint>,
    stall_timeout: Duration,
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
        })
    }

    /// A manifest by tag or digest. Who asks by digest must verify it.
    pub async fn manifest(&self, version: &str) -> Result<RawManifest, RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
        let path = format!("{}/manifests/{version}", self.name);
        let mut failures = Vec::new();
        for endpoint in &self.endpoints {
            match endpoint.manifest(&self.name, &path, &headers).await {
                Ok(manifest) => return Ok(manifest),
                Err(error) => failures.push(error),
            }
        }
        Err(self.no_answer(failures))
    }

    /// The host itself was asked last: what its word means counts; what the mirrors said is told.
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
