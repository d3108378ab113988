// SPDX-License-Identifier: Apache-2.0
//! The pull side of the distribution protocol (OCI distribution spec 1.1), over the mirrors and the host of a
//! reference.
//!
//! One [`Repository`] serves one pull. It asks the mirrors in their order, then the host itself; what a mirror does not
//! have or cannot do, the next one is asked for. Answers are bounded in size, and silence in time.

mod auth;
mod blob;

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE,
};
use reqwest::{Client, Response, StatusCode};
use tokio::sync::Mutex;

use crate::config::{Config, Credentials, HostConfig};
use crate::failure::FailureKind;
use crate::reference::Reference;
use auth::Challenge;
pub use blob::BlobStream;

const MANIFEST_BYTES: usize = 4 << 20;
const ERROR_BODY_BYTES: usize = 8 << 10;
const SHOWN_CHARACTERS: usize = 500;
const REDIRECTS: usize = 5;
/// Tries of one request to one host, when the cause may pass.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(300);
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
    #[error("{url} sent nothing new in {tries} tries")]
    Stalled { url: String, tries: u32 },
}

impl RegistryError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Setup { .. } | Self::Challenge { .. } | Self::TooLarge { .. } => {
                FailureKind::Invalid
            }
            Self::Status { status, .. } => match *status {
                StatusCode::NOT_FOUND => FailureKind::NotFound,
                StatusCode::UNAUTHORIZED => FailureKind::Unauthenticated,
                StatusCode::FORBIDDEN => FailureKind::Denied,
                _ => FailureKind::Unavailable,
            },
            Self::Send { .. } | Self::Answer { .. } | Self::Stalled { .. } => {
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
            // Silence was waited for long enough; a connection that broke is another matter.
            Self::Send { source, .. } => !source.is_timeout() && !source.is_connect(),
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
}

/// One host that may have the repository.
#[derive(Debug)]
struct Endpoint {
    /// `https://host/v2`.
    base: String,
    plain_http: bool,
    client: Client,
    credentials: Option<Credentials>,
    /// What the host wanted to see last time.
    authorization: Mutex<Option<HeaderValue>>,
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
        })
    }

    /// A manifest by tag or digest. Who asks by digest must verify it.
    pub async fn manifest(&self, version: &str) -> Result<RawManifest, RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
        let path = format!("{}/manifests/{version}", self.name);
        let mut last = None;
        for endpoint in &self.endpoints {
            match endpoint.manifest(&self.name, &path, &headers).await {
                Ok(manifest) => return Ok(manifest),
                Err(error) => note_failure(&mut last, error),
            }
        }
        Err(self.no_answer(last))
    }

    fn no_answer(&self, last: Option<RegistryError>) -> RegistryError {
        last.unwrap_or_else(|| RegistryError::Setup {
            host: self.name.clone(),
            problem: "no host to ask".to_owned(),
        })
    }
}

/// The host itself is asked last: its word counts, the mirrors' are for the log.
fn note_failure(last: &mut Option<RegistryError>, error: RegistryError) {
    if let Some(mirror) = last.replace(error) {
        tracing::info!(error = %mirror, "a registry mirror was of no use");
    }
}

impl Endpoint {
    fn new(
        host: &str,
        settings: &HostConfig,
        credentials: Option<Credentials>,
        stall_timeout: Duration,
    ) -> Result<Self, RegistryError> {
        let failed = |problem: String| RegistryError::Setup {
            host: host.to_owned(),
            problem,
        };
        let mut builder = Client::builder()
            .user_agent(concat!("bulkhead/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(stall_timeout)
            .read_timeout(stall_timeout)
            .redirect(reqwest::redirect::Policy::limited(REDIRECTS))
            .danger_accept_invalid_certs(settings.skip_verify);
        if let Some(path) = &settings.ca_file {
            let pem =
                std::fs::read(path).map_err(|e| failed(format!("read {}: {e}", path.display())))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|e| failed(format!("certificates in {}: {e}", path.display())))?;
            for certificate in certificates {
                builder = builder.add_root_certificate(certificate);
            }
        }
        let configured = match (&settings.username, &settings.password) {
            (Some(username), Some(password)) => Some(Credentials::Basic {
                username: username.clone(),
                password: password.clone(),
            }),
            _ => None,
        };
        let scheme = if settings.plain_http { "http" } else { "https" };
        Ok(Self {
            base: format!("{scheme}://{host}/v2"),
            plain_http: settings.plain_http,
            client: builder
                .build()
                .map_err(|e| failed(crate::failure::chain(&e)))?,
            credentials: credentials.or(configured),
            authorization: Mutex::new(None),
        })
    }

    async fn manifest(
        &self,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<RawManifest, RegistryError> {
        let response = self.get(repository, path, headers).await?;
        let media_type = response.headers().get(CONTENT_TYPE);
        let media_type = media_type
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let media_type = media_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        Ok(RawManifest {
            bytes: read_bounded(response, MANIFEST_BYTES).await?,
            media_type,
        })
    }

    /// GET below `/v2/`, with what authentication the host asks for; tried again when the cause may pass.
    async fn get(
        &self,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            match self.get_authorized(repository, path, headers).await {
                Err(error) if error.may_pass() && attempt < TRIES => {
                    tracing::debug!(%error, "asking the registry again");
                    tokio::time::sleep(pause).await;
                    pause *= 3;
                }
                result => return result,
            }
        }
        unreachable!("the last attempt returns");
    }

    async fn get_authorized(
        &self,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let url = format!("{}/{path}", self.base);
        let known = self.authorization.lock().await.clone();
        let response = self.send(&url, headers, known).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return accept(response).await;
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<_> = challenges
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let Some(challenge) = Challenge::parse(&challenges) else {
            if challenges.is_empty() {
                return accept(response).await;
            }
            return Err(RegistryError::Challenge {
                url,
                challenge: shorten(&challenges.join(", ")),
            });
        };
        let Some(authorization) = self.answer(&challenge, repository).await? else {
            return accept(response).await;
        };
        *self.authorization.lock().await = Some(authorization.clone());
        accept(self.send(&url, headers, Some(authorization)).await?).await
    }

    async fn send(
        &self,
        url: &str,
        headers: &HeaderMap,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, RegistryError> {
        let mut request = self.client.get(url).headers(headers.clone());
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.send().await.map_err(|source| RegistryError::Send {
            url: url.to_owned(),
            source: source.without_url(),
        })
    }
}

/// A good answer, or what the registry says is wrong.
async fn accept(response: Response) -> Result<Response, RegistryError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let url = response.url().to_string();
    let url = url.split('?').next().unwrap_or_default().to_owned();
    let body = read_bounded(response, ERROR_BODY_BYTES)
        .await
        .unwrap_or_default();
    Err(RegistryError::Status {
        url,
        status,
        message: error_message(&body),
    })
}

/// `errors` of the distribution spec, for people.
fn error_message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Body {
        errors: Vec<BTreeMap<String, serde_json::Value>>,
    }
    let Ok(body) = serde_json::from_slice::<Body>(body) else {
        return String::new();
    };
    let messages = body.errors.iter().filter_map(|error| {
        let message = error.get("message").or(error.get("code"))?;
        message.as_str().map(str::to_owned)
    });
    let text = messages.collect::<Vec<_>>().join("; ");
    if text.is_empty() {
        text
    } else {
        format!(" ({})", shorten(&text))
    }
}

async fn read_bounded(mut response: Response, limit: usize) -> Result<Vec<u8>, RegistryError> {
    let url = response.url().to_string();
    let mut bytes = Vec::new();
    loop {
        let chunk = response
            .chunk()
            .await
            .map_err(|source| RegistryError::Send {
                url: url.clone(),
                source: source.without_url(),
            })?;
        let Some(chunk) = chunk else { return Ok(bytes) };
        if bytes.len() + chunk.len() > limit {
            return Err(RegistryError::TooLarge {
                url,
                limit_bytes: limit as u64,
            });
        }
        bytes.extend_from_slice(&chunk);
    }
}

/// What a stranger wrote, made fit for a message: short and on one line.
fn shorten(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(SHOWN_CHARACTERS).collect()
}

#[cfg(test)]
mod tests;
