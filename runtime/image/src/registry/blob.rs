// SPDX-License-Identifier: Apache-2.0
//! A blob as it arrives: continued where it stopped when a connection breaks, on the next host if need be.

use std::time::{Duration, Instant};

use bulkhead_text::chain;
use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};

use super::{RegistryError, Repository};
use crate::digest::Digest;

/// Connections in a row that brought less than [`LEAST_BYTES`] of what is new.
const FRUITLESS_TRIES: u32 = 3;
/// Less than this in a stall timeout's time of waiting is as good as silence: who drips must not hold a pull forever.
const LEAST_BYTES: u64 = 64 << 10;

/// A download in progress.
#[derive(Debug)]
pub struct BlobStream<'a> {
    repository: &'a Repository,
    path: String,
    size_bytes: u64,
    received_bytes: u64,
    response: Option<Response>,
    /// Bytes to pass over, for a server that begins anew.
    skip_bytes: u64,
    /// What of this connection was new.
    new_bytes: u64,
    fruitless_tries: u32,
    pace: Pace,
}

/// What came in how long, waited for since the last look.
#[derive(Debug, Default)]
struct Pace {
    bytes: u64,
    waited: Duration,
}

impl Repository {
    /// The blob `digest` of `size_bytes` as its descriptor says. Nothing is sent before the first
    /// [`BlobStream::next`]. Verifying the digest is the caller's.
    pub fn blob(&self, digest: &Digest, size_bytes: u64) -> BlobStream<'_> {
        BlobStream {
            repository: self,
            path: format!("{}/blobs/{digest}", self.name),
            size_bytes,
            received_bytes: 0,
            response: None,
            skip_bytes: 0,
            new_bytes: 0,
            fruitless_tries: 0,
            pace: Pace::default(),
        }
    }

    /// A small blob, whole.
    pub async fn small_blob(
        &self,
        digest: &Digest,
        size_bytes: u64,
        limit_bytes: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let mut stream = self.blob(digest, size_bytes);
        if size_bytes > limit_bytes {
            return Err(RegistryError::TooLarge {
                url: stream.path,
                limit_bytes,
            });
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

impl BlobStream<'_> {
    /// The next bytes; nothing when all are there.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            if self.received_bytes == self.size_bytes && self.response.is_none() {
                return Ok(None);
            }
            if self.fruitless_tries >= FRUITLESS_TRIES {
                return Err(RegistryError::Stalled {
                    url: self.path.clone(),
                    tries: self.fruitless_tries,
                });
            }
            let mut response = match self.response.take() {
                Some(response) => response,
                None => self.connect().await?,
            };
            let asked = Instant::now();
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    let stall_timeout = self.repository.stall_timeout;
                    let crawls = self.pace.crawls(&chunk, asked.elapsed(), stall_timeout);
                    let chunk = self.take_new(chunk)?;
                    if crawls {
                        self.count_break("next to nothing arrives".to_owned());
                    } else {
                        self.response = Some(response);
                    }
                    if chunk.is_some() {
                        return Ok(chunk);
                    }
                }
                Ok(None) if self.received_bytes == self.size_bytes => return Ok(None),
                Ok(None) => self.count_break("the connection ended early".to_owned()),
                Err(error) => self.count_break(chain(&error.without_url())),
            }
        }
    }

    /// The part of `chunk` that was not seen before.
    fn take_new(&mut self, mut chunk: Bytes) -> Result<Option<Bytes>, RegistryError> {
        let known =
            usize::try_from(self.skip_bytes).map_or(chunk.len(), |skip| skip.min(chunk.len()));
        let new = chunk.split_off(known);
        self.skip_bytes -= known as u64;
        if new.is_empty() {
            return Ok(None);
        }
        self.new_bytes += new.len() as u64;
        self.received_bytes += new.len() as u64;
        if self.received_bytes > self.size_bytes {
            return Err(RegistryError::TooLarge {
                url: self.path.clone(),
                limit_bytes: self.size_bytes,
            });
        }
        Ok(Some(new))
    }

    fn count_break(&mut self, cause: String) {
        if self.new_bytes >= LEAST_BYTES {
            self.fruitless_tries = 0;
        }
        self.fruitless_tries += 1;
        tracing::info!(
            blob = self.path,
            at = self.received_bytes,
            cause,
            "download interrupted"
        );
    }

    /// Asks for what is still missing.
    async fn connect(&mut self) -> Result<Response, RegistryError> {
        self.new_bytes = 0;
        self.pace = Pace::default();
        let mut headers = HeaderMap::new();
        if self.received_bytes > 0 {
            let range = format!("bytes={}-", self.received_bytes);
            if let Ok(range) = HeaderValue::from_str(&range) {
                headers.insert(RANGE, range);
            }
        }
        let mut failures = Vec::new();
        for endpoint in &self.repository.endpoints {
            match endpoint
                .get(&self.repository.name, &self.path, &headers)
                .await
            {
                Ok(response) => {
                    let continues = response.status() == StatusCode::PARTIAL_CONTENT;
                    self.skip_bytes = if continues { 0 } else { self.received_bytes };
                    return Ok(response);
                }
                Err(error) => failures.push(error),
            }
        }
        Err(self.repository.no_answer(failures))
    }
}

impl Pace {
    fn crawls(&mut self, chunk: &Bytes, waited: Duration, stall_timeout: Duration) -> bool {
        self.bytes += chunk.len() as u64;
        self.waited += waited;
        if self.waited < stall_timeout {
            return false;
        }
        std::mem::take(self).bytes < LEAST_BYTES
    }
}
