// SPDX-License-Identifier: Apache-2.0
//! One host of a repository: connection, authentication, retries and time limits.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use bulkhead_text::chain;
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Method, Response, StatusCode, Url};
use tokio::sync::Mutex;

use super::auth::Challenge;
use super::{RegistryError, ServedManifest};
use crate::config::{Credentials, HostConfig};
use crate::failure::shorten;

const MANIFEST_BYTES: usize = 4 << 20;
const ERROR_BODY_BYTES: usize = 8 << 10;
pub(super) const REDIRECTS: usize = 5;
/// How often one request is sent to one host, if the error may be temporary.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(300);
/// The longest pause that a host may ask for (`Retry-After`). If it asks for more, the request fails: kubelet asks again
/// by itself, and meanwhile this pull takes no place from others.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

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
    ) -> Result<ServedManifest, RegistryError> {
        let response = self.request(Method::GET, repository, path, headers).await?;
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
        Ok(ServedManifest {
            bytes: self.read_bounded(response, MANIFEST_BYTES).await?,
            media_type,
        })
    }

    /// Asks whether a blob is there and may be had. A host that does not know HEAD is asked for the first byte.
    pub async fn has(&self, repository: &str, path: &str) -> Result<(), RegistryError> {
        let known = self
            .request(Method::HEAD, repository, path, &HeaderMap::new())
            .await;
        let knows_no_head = known.as_ref().is_err_and(|error| {
            matches!(error, RegistryError::Status { status, .. }
                if matches!(*status, StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED))
        });
        if !knows_no_head {
            return known.map(drop);
        }
        let first = HeaderMap::from_iter([(RANGE, HeaderValue::from_static("bytes=0-0"))]);
        let first = self.request(Method::GET, repository, path, &first).await;
        first.map(drop)
    }

    /// Sends a request for a path below `/v2/`, with the authentication that the host demands. Retries temporary
    /// errors, after the time for which the host asks.
    pub async fn request(
        &self,
        method: Method,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let answer = self.request_authorized(&method, repository, path, headers);
            match answer.await {
                Err(error) if error.may_pass() && attempt < TRIES => {
                    let wanted = error.wanted_pause();
                    if wanted > LONGEST_PAUSE {
                        return Err(error);
                    }
                    tracing::debug!(%error, "retrying a request to the registry");
                    tokio::time::sleep(pause.max(wanted)).await;
                    pause *= 3;
                }
                result => return result,
            }
        }
        unreachable!("the last attempt returns");
    }

    /// Sends a request once. If the host demands authentication, answers its challenge and sends it again.
    async fn request_authorized(
        &self,
        method: &Method,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let url = format!("{}/{path}", self.base);
        let known = self.authorization.lock().await.clone();
        let response = self.send(method, &url, headers, known).await?;
        // After a redirect to another host, that host must not decide where our password is sent.
        let is_ours = is_from(&response, &url);
        if *method == Method::HEAD && !is_ours {
            // By the redirect, the registry has said yes. Storage servers often answer only GET at such a place.
            return Ok(response);
        }
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
        let response = self
            .send(method, &url, headers, Some(authorization))
            .await?;
        if *method == Method::HEAD && !is_from(&response, &url) {
            return Ok(response);
        }
        self.accept(response).await
    }

    pub(super) async fn send(
        &self,
        method: &Method,
        url: &str,
        headers: &HeaderMap,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, RegistryError> {
        let request = self.client.request(method.clone(), url);
        let mut request = request.headers(headers.clone());
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
        let retry_after = response.headers().get(RETRY_AFTER);
        let retry_after = retry_after.and_then(|value| pause(value, SystemTime::now()));
        let body = self.read_bounded(response, ERROR_BODY_BYTES).await;
        Err(RegistryError::Status {
            url,
            status,
            retry_after,
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

/// Whether the response to a request for `url` is from the host of `url`, and not from one that a redirect led to.
fn is_from(response: &Response, url: &str) -> bool {
    Url::parse(url).is_ok_and(|url| url.origin() == response.url().origin())
}

/// The pause that `Retry-After` asks for: seconds, or the time of its end (RFC 9110, 10.2.3).
pub fn pause(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let end = httpdate::parse_http_date(text).ok()?;
    Some(end.duration_since(now).unwrap_or_default())
}

/// A URL without its query, which may contain the credentials for a storage server.
fn shown_url(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

/// The messages in `errors` of the distribution spec, as text.
pub fn error_message(body: &[u8]) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_told_in_seconds_or_by_its_end() {
        let now = httpdate::parse_http_date("Sun, 29 Nov 2026 12:00:00 GMT").unwrap();
        for (text, seconds) in [
            ("120", Some(120)),
            ("Sun, 29 Nov 2026 12:00:30 GMT", Some(30)),
            ("Sun, 29 Nov 2026 11:00:00 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
        ] {
            let found = pause(&HeaderValue::from_static(text), now);
            assert_eq!(found, seconds.map(Duration::from_secs), "{text}");
        }
    }
}
