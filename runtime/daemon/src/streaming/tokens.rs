// SPDX-License-Identifier: Apache-2.0
//! Tokens: the secret part of a streaming URL. A token allows one request and expires soon.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_text::hex;

use crate::random::random;

/// The most tokens that wait to be used.
const MAX_TOKENS: usize = 1000;
const LIFETIME: Duration = Duration::from_secs(60);
const TOKEN_BYTES: usize = 24;

/// A request by `Exec`, `Attach` or `PortForward`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Exec {
        container: String,
        args: Vec<String>,
        streams: Streams,
    },
    Attach {
        container: String,
        streams: Streams,
    },
    PortForward {
        pod: String,
        /// Used for WebSocket clients of the older protocol, which do not send them themselves.
        ports: Vec<u16>,
    },
}

/// Which standard streams a client takes part in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub terminal: bool,
}

impl Request {
    /// The first part of the URL's path.
    pub fn path(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{MAX_TOKENS} streaming URLs were requested but not used yet: try again later")]
pub struct TooMany;

#[derive(Debug, Default)]
pub struct Tokens(Mutex<HashMap<String, (Request, Instant)>>);

impl Tokens {
    pub fn insert(&self, request: Request) -> Result<String, TooMany> {
        self.insert_at(request, Instant::now())
    }

    /// Takes the request of a token. The token cannot be used again, even if the request fails.
    pub fn take(&self, path: &str, token: &str) -> Option<Request> {
        self.take_at(path, token, Instant::now())
    }

    fn insert_at(&self, request: Request, now: Instant) -> Result<String, TooMany> {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= MAX_TOKENS {
            tokens.retain(|_, (_, made)| now.duration_since(*made) < LIFETIME);
        }
        if tokens.len() >= MAX_TOKENS {
            return Err(TooMany);
        }
        let token = hex(&random::<TOKEN_BYTES>());
        tokens.insert(token.clone(), (request, now));
        Ok(token)
    }

    fn take_at(&self, path: &str, token: &str, now: Instant) -> Option<Request> {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (request, made) = tokens.remove(token)?;
        let valid = now.duration_since(made) < LIFETIME && request.path() == path;
        valid.then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::PortForward {
            pod: "p".into(),
            ports: Vec::new(),
        }
    }

    #[test]
    fn a_token_is_good_once_for_its_own_path_and_for_a_minute() {
        let tokens = Tokens::default();
        let now = Instant::now();
        let insert = || tokens.insert_at(request(), now).unwrap();
        let token = insert();
        assert_eq!(tokens.take_at("portforward", &token, now), Some(request()));
        assert_eq!(tokens.take_at("portforward", &token, now), None);
        assert_eq!(tokens.take_at("exec", &insert(), now), None);
        let late = now + LIFETIME;
        assert_eq!(tokens.take_at("portforward", &insert(), late), None);
        assert_eq!(tokens.take_at("portforward", "guessed", now), None);
    }

    #[test]
    fn tokens_are_bounded_and_expired_ones_make_room() {
        let tokens = Tokens::default();
        let now = Instant::now();
        for _ in 0..MAX_TOKENS {
            tokens.insert_at(request(), now).unwrap();
        }
        assert!(tokens.insert_at(request(), now).is_err());
        assert!(tokens.insert_at(request(), now + LIFETIME).is_ok());
    }
}
