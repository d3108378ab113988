// SPDX-License-Identifier: Apache-2.0
//! Authentication: Basic (RFC 7617) and bearer tokens (distribution spec, "Token Authentication").

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Method, Url};

use super::{Endpoint, RegistryError};
use crate::config::Credentials;
use crate::failure::shorten;

const TOKEN_BYTES: usize = 256 << 10;

/// The demand of a `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// Chooses a supported challenge; bearer tokens are preferred.
    pub fn parse(headers: &[&str]) -> Option<Self> {
        let parsed: Vec<_> = headers
            .iter()
            .filter_map(|header| Self::parse_one(header))
            .collect();
        let is_bearer = |challenge: &Self| matches!(challenge, Self::Bearer { .. });
        let best = parsed.iter().position(is_bearer).unwrap_or(0);
        parsed.into_iter().nth(best)
    }

    fn parse_one(header: &str) -> Option<Self> {
        let (scheme, parameters) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        let mut rest = parameters;
        while let Some((key, after)) = rest.split_once('=') {
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_at(after.find(',').unwrap_or(after.len())),
            };
            match key.trim().to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value.to_owned()),
                "service" => service = Some(value.to_owned()),
                "scope" => scope = Some(value.to_owned()),
                _ => {}
            }
            rest = after.trim_start_matches([',', ' ']);
        }
        Some(Self::Bearer {
            realm: realm?,
            service,
            scope,
        })
    }
}

impl Endpoint {
    /// The `Authorization` header for `challenge`. `None` if there are no credentials for it.
    pub(super) async fn answer(
        &self,
        challenge: &Challenge,
        repository: &str,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        if let Some(Credentials::Bearer(token)) = &self.credentials {
            return Ok(secret(&format!("Bearer {token}")));
        }
        match challenge {
            Challenge::Basic => Ok(self.basic()),
            Challenge::Bearer {
                realm,
                service,
                scope,
            } => {
                let scope = match scope {
                    Some(scope) => scope.clone(),
                    None => format!("repository:{repository}:pull"),
                };
                let token = self.token(realm, service.as_deref(), &scope).await?;
                Ok(secret(&format!("Bearer {token}")))
            }
        }
    }

    fn basic(&self) -> Option<HeaderValue> {
        match &self.credentials {
            Some(Credentials::Basic { username, password }) => {
                let pair = STANDARD.encode(format!("{username}:{password}"));
                secret(&format!("Basic {pair}"))
            }
            _ => None,
        }
    }

    /// Gets a token from the server `realm`, with the endpoint's credentials or without any.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
    ) -> Result<String, RegistryError> {
        let bad_answer = |problem: &str| RegistryError::Answer {
            url: shorten(realm),
            problem: problem.to_owned(),
        };
        let mut url =
            Url::parse(realm).map_err(|_| bad_answer("the realm of its challenge is not a URL"))?;
        // The password is sent to this URL, so the connection must be protected as well as that to the registry.
        if url.scheme() != "https" && !(self.plain_http && url.scheme() == "http") {
            return Err(bad_answer("its token server is without TLS"));
        }
        let response = if let Some(Credentials::Identity(token)) = &self.credentials {
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("client_id", "bulkhead"),
                ("refresh_token", token),
                ("scope", scope),
            ];
            form.extend(service.map(|service| ("service", service)));
            self.post_form(url, &form).await?
        } else {
            url.query_pairs_mut()
                .extend_pairs(service.map(|service| ("service", service)))
                .append_pair("scope", scope);
            self.send(&Method::GET, url.as_str(), &HeaderMap::new(), self.basic())
                .await?
        };
        let response = self.accept(response).await?;
        let body = self.read_bounded(response, TOKEN_BYTES).await?;
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let answer: Answer =
            serde_json::from_slice(&body).map_err(|_| bad_answer("not JSON with a token"))?;
        let token = answer.token.or(answer.access_token);
        token.ok_or_else(|| bad_answer("no token"))
    }
}

/// A header value that is never logged. `None` if the text cannot be a header value.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_understood() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        };
        let docker = "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",scope=\"repository:a/b:pull,push\"";
        for (headers, expected) in [
            (vec!["Basic realm=\"x\""], Some(Challenge::Basic)),
            (vec!["basic"], Some(Challenge::Basic)),
            (
                vec![docker],
                Some(bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    Some("repository:a/b:pull,push"),
                )),
            ),
            (
                vec!["Basic realm=x", "BEARER realm=https://t, service=s"],
                Some(bearer("https://t", Some("s"), None)),
            ),
            (vec!["Bearer service=\"s\""], None),
            (vec!["Bearer realm=\"open"], None),
            (vec!["Negotiate"], None),
            (vec![], None),
        ] {
            assert_eq!(Challenge::parse(&headers), expected, "{headers:?}");
        }
    }
}
