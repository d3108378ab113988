// SPDX-License-Identifier: Apache-2.0
//! The download of a blob. If a connection breaks, it continues where it stopped, if necessary on another host.

use std::time::{Duration, Instant};

use bulkhead_text::chain;
use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};

use super::{RegistryError, Repository};
use crate::digest::Digest;

/// After this many connections in a row with less than [`LEAST_BYTES`] of new data each, the download fails.
const FRUITLESS_TRIES: u32 = 3;
/// A connection that delivers less than this per stall timeout counts as silent. Otherwise a server that sends byte by
/// byte could hold up a pull forever.
const LEAST_BYTES: u64 = 64 << 10;

/// A running download.
#[derive(Debug)]
pub struct BlobStream<'a> {
    repository: &'a Repository,
    path: String,
    size_bytes: u64,
    received_bytes: u64,
    response: Option<Response>,
    /// How many bytes to skip, if the server starts again at the beginning.
    skip_bytes: u64,
    /// How many bytes of this connection were new.
    new_bytes: u64,
    fruitless_tries: u32,
    pace: Pace,
}

/// How many bytes came, and how long we waited for them, since the last check.
#[derive(Debug, Default)]
struct Pace {
    bytes: u64,
    waited: Duration,
}

impl Repository {
    /// A download of blob `digest`, which has `size_bytes` by its descriptor. Nothing is sent before the first call of
    /// [`BlobStream::next`]. The caller has to verify the digest.
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

    /// Downloads a small blob completely.
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
    /// The next bytes. `None` at the end.
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
                        self.count_break("almost no data arrives".to_owned());
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

    /// The part of `chunk` that has not been received before.
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

    /// Requests the rest of the blob, from the first host that delivers it.
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
