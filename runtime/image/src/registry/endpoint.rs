// SPDX-License-Identifier: Apache-2.0
//! One host of a repository: connection, authentication, retries and time limits.

use std::collections::BTreeMap;
use std::time::Duration;

use bulkhead_text::chain;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::sync::Mutex;

use super::auth::Challenge;
use super::{RawManifest, RegistryError};
use crate::config::{Credentials, HostConfig};
use crate::failure::shorten;

const MANIFEST_BYTES: usize = 4 << 20;
const ERROR_BODY_BYTES: usize = 8 << 10;
pub(super) const REDIRECTS: usize = 5;
/// How often one request is sent to one host, if the error may be temporary.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(300);

/// One host that may have the repository.
#[derive(Debug)]
pub struct Endpoint {
    /// `https://host/v2`.
    base: String,
    pub(super) plain_http: bool,
    client: Client,
    pub(super) credentials: Option<Credentials>,
    /// The `Authorization` header that the host accepted last.
    authorization: Mutex<Option<HeaderValue>>,
    stall_timeout: Duration,
}

impl Endpoint {
    pub fn new(
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
            // This also applies to redirects.
            .https_only(!settings.plain_http)
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
            client: builder.build().map_err(|e| failed(chain(&e)))?,
            credentials: credentials.or(configured),
            authorization: Mutex::new(None),
            stall_timeout,
        })
    }

    pub async fn manifest(
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
            bytes: self.read_bounded(response, MANIFEST_BYTES).await?,
            media_type,
        })
    }

    /// Sends GET for a path below `/v2/`, with the authentication that the host demands. Retries temporary errors.
    pub async fn get(
        &self,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            match self.get_authorized(repository, path, headers).await {
                Err(error) if error.may_pass() && attempt < TRIES => {
                    tracing::debug!(%error, "retrying a request to the registry");
                    tokio::time::sleep(pause).await;
                    pause *= 3;
                }
                result => return result,
            }
        }
        unreachable!("the last attempt returns");
    }

    /// Sends GET once. If the host demands authentication, answers its challenge and sends it again.
    async fn get_authorized(
        &self,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let url = format!("{}/{path}", self.base);
        let known = self.authorization.lock().await.clone();
        let response = self.send(&url, headers, known).await?;
        // After a redirect to another host, that host must not decide where our password is sent.
        let is_ours = Url::parse(&url).is_ok_and(|url| url.origin() == response.url().origin());
        if response.status() != StatusCode::UNAUTHORIZED || !is_ours {
            return self.accept(response).await;
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<_> = challenges
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let Some(challenge) = Challenge::parse(&challenges) else {
            if challenges.is_empty() {
                return self.accept(response).await;
            }
            return Err(RegistryError::Challenge {
                url,
                challenge: shorten(&challenges.join(", ")),
            });
        };
        let Some(authorization) = self.answer(&challenge, repository).await? else {
            return self.accept(response).await;
        };
        *self.authorization.lock().await = Some(authorization.clone());
        let response = self.send(&url, headers, Some(authorization)).await?;
        self.accept(response).await
    }

    pub(super) async fn send(
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

    pub(super) async fn post_form(
        &self,
        url: Url,
        fields: &[(&str, &str)],
    ) -> Result<Response, RegistryError> {
        let body = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs(fields)
            .finish();
        let request = self.client.post(url.clone()).body(body);
        let request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        request.send().await.map_err(|source| RegistryError::Send {
            url: url.into(),
            source: source.without_url(),
        })
    }

    /// Returns a successful response, or an error with the registry's message.
    pub(super) async fn accept(&self, response: Response) -> Result<Response, RegistryError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let url = shown_url(response.url());
        let body = self.read_bounded(response, ERROR_BODY_BYTES).await;
        Err(RegistryError::Status {
            url,
            status,
            message: error_message(&body.unwrap_or_default()),
        })
    }

    /// Reads a small response completely within the stall timeout: a server that sends byte by byte counts as silent.
    pub(super) async fn read_bounded(
        &self,
        mut response: Response,
        limit: usize,
    ) -> Result<Vec<u8>, RegistryError> {
        let url = shown_url(response.url());
        let read = read_bounded(&mut response, limit);
        match tokio::time::timeout(self.stall_timeout, read).await {
            Ok(Ok(Some(bytes))) => Ok(bytes),
            Ok(Ok(None)) => Err(RegistryError::TooLarge {
                url,
                limit_bytes: limit as u64,
            }),
            Ok(Err(source)) => Err(RegistryError::Send {
                url,
                source: source.without_url(),
            }),
            Err(_) => Err(RegistryError::Slow {
                url,
                waited: self.stall_timeout,
            }),
        }
    }
}

/// A URL without its query, which may contain the credentials for a storage server.
fn shown_url(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

/// The messages in `errors` of the distribution spec, as text.
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

/// Reads a response. `None` if it has more than `limit` bytes.
async fn read_bounded(
    response: &mut Response,
    limit: usize,
) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > limit {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Some(bytes))
}
