// SPDX-License-Identifier: Apache-2.0
//! The download of a blob. If a connection breaks, it continues where it stopped. A host that breaks too often, is too
//! slow or sends wrong bytes is barred, and the next one is asked.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bulkhead_text::chain;
use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::task::spawn_blocking;

use super::{RegistryError, Repository};
use crate::digest::Digest;

/// After this many connections in a row with less than [`LEAST_BYTES`] of new data each, a host is given up.
const FRUITLESS_TRIES: u32 = 3;
/// A connection that delivered less than this was in vain. Otherwise a server could go on for ever with connections
/// that break.
const LEAST_BYTES: u64 = 64 << 10;
/// The average throughput of a host is judged after this many stall timeouts of waiting for it.
const TIMEOUTS_BEFORE_AVERAGE: u32 = 4;

/// The hosts of a repository that are not asked any more for a blob, by their place in the list.
pub type Barred = BTreeSet<usize>;

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
    barred: Barred,
    /// The host of the present or the last connection.
    host: usize,
    /// The hosts from which received bytes are.
    senders: BTreeSet<usize>,
    /// Since the last check of the present connection.
    pace: Pace,
    /// Since the present host was asked first.
    average: Pace,
}

/// How many bytes came, and how long we waited for them. Time in which nobody read from the connection does not count.
#[derive(Debug, Default)]
struct Pace {
    bytes: u64,
    waited: Duration,
}

impl Repository {
    /// A download of blob `digest`, which has `size_bytes` by its descriptor, from a host that is not in `barred`.
    /// Nothing is sent before the first call of [`BlobStream::next`]. The caller has to verify the digest.
    pub fn blob(&self, digest: &Digest, size_bytes: u64, barred: &Barred) -> BlobStream<'_> {
        BlobStream {
            repository: self,
            path: self.blob_path(digest),
            size_bytes,
            received_bytes: 0,
            response: None,
            skip_bytes: 0,
            new_bytes: 0,
            fruitless_tries: 0,
            barred: barred.clone(),
            host: 0,
            senders: BTreeSet::new(),
            pace: Pace::default(),
            average: Pace::default(),
        }
    }

    /// Downloads a small blob completely and verifies it. If a host sends other bytes, the next one is asked.
    pub async fn small_blob(
        &self,
        digest: &Digest,
        size_bytes: u64,
        limit_bytes: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        if size_bytes > limit_bytes {
            return Err(RegistryError::TooLarge {
                url: self.blob_path(digest),
                limit_bytes,
            });
        }
        let mut barred = Barred::new();
        loop {
            let mut stream = self.blob(digest, size_bytes, &barred);
            let error = match stream.read_all(digest).await {
                Err(error) if error.is_of_bytes() => error,
                result => return result,
            };
            barred = stream.bar_senders().ok_or(error)?;
        }
    }

    /// Asks whether the registry has blob `digest` in this repository and lets us have it. One of the hosts has to say
    /// so.
    pub async fn has_blob(&self, digest: &Digest) -> Result<(), RegistryError> {
        let path = self.blob_path(digest);
        let mut failures = Vec::new();
        for endpoint in &self.endpoints {
            match endpoint.has(&self.name, &path).await {
                Ok(()) => return Ok(()),
                Err(error) => failures.push(error),
            }
        }
        Err(self.no_answer(failures))
    }

    fn blob_path(&self, digest: &Digest) -> String {
        format!("{}/blobs/{digest}", self.name)
    }
}

impl BlobStream<'_> {
    /// The next bytes. `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            if self.received_bytes == self.size_bytes && self.response.is_none() {
                return Ok(None);
            }
            if let Some(error) = self.hopeless() {
                self.response = None;
                self.bar(error)?;
            }
            let asked = Instant::now();
            let mut response = match self.response.take() {
                Some(response) => response,
                None => self.connect().await?,
            };
            let answer = response.chunk().await;
            let waited = asked.elapsed();
            self.average.waited += waited;
            match answer {
                Ok(Some(chunk)) => {
                    self.average.bytes += chunk.len() as u64;
                    let crawls = self.crawls(&chunk, waited);
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

    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// After bytes that were wrong: the hosts that must not be asked again. `None` if no other is left. If the bytes
    /// are from more than one host, only the image's own host, the last one, is asked again.
    pub fn bar_senders(&self) -> Option<Barred> {
        if self.senders.is_empty() {
            return None;
        }
        let own = self.repository.endpoints.len().saturating_sub(1);
        let mut barred: Barred = self.barred.union(&self.senders).copied().collect();
        if self.senders.len() > 1 {
            barred = (0..own).collect();
        }
        let is_left = barred.len() <= own;
        is_left.then_some(barred)
    }

    async fn read_all(&mut self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        let hashed = spawn_blocking(move || (Digest::of(&bytes), bytes)).await;
        let (found, bytes) = hashed.map_err(|_| RegistryError::Answer {
            url: self.path.clone(),
            problem: "its digest could not be computed".to_owned(),
        })?;
        if found != *digest {
            return Err(RegistryError::Digest {
                url: self.path.clone(),
                promised: digest.clone(),
                found,
            });
        }
        Ok(bytes)
    }

    /// Why the present host should not be asked any more.
    fn hopeless(&self) -> Option<RegistryError> {
        if self.fruitless_tries >= FRUITLESS_TRIES {
            return Some(RegistryError::Stalled {
                url: self.path.clone(),
                tries: self.fruitless_tries,
            });
        }
        let waited = self.average.waited;
        let is_early = waited < self.repository.stall_timeout * TIMEOUTS_BEFORE_AVERAGE;
        if is_early || self.average.bytes >= self.least_bytes(waited) {
            return None;
        }
        Some(RegistryError::Crawls {
            url: self.path.clone(),
            bytes: self.average.bytes,
            waited,
            least_bytes_per_second: self.repository.min_bytes_per_second,
        })
    }

    /// Gives the present host up. Returns `error` if there is no other.
    fn bar(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        self.barred.insert(self.host);
        if self.barred.len() >= self.repository.endpoints.len() {
            return Err(error);
        }
        tracing::info!(%error, "the download goes on at the next host");
        self.fruitless_tries = 0;
        self.average = Pace::default();
        Ok(())
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
        self.senders.insert(self.host);
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
        let endpoints = self.repository.endpoints.iter().enumerate();
        for (host, endpoint) in endpoints.filter(|(host, _)| !self.barred.contains(host)) {
            let answer = endpoint
                .request(Method::GET, &self.repository.name, &self.path, &headers)
                .await;
            match answer {
                Ok(response) => {
                    let continues = response.status() == StatusCode::PARTIAL_CONTENT;
                    self.skip_bytes = if continues { 0 } else { self.received_bytes };
                    if self.host != host {
                        self.average = Pace::default();
                    }
                    self.host = host;
                    return Ok(response);
                }
                Err(error) => failures.push(error),
            }
        }
        Err(self.repository.no_answer(failures))
    }

    /// Whether a connection is so slow that it counts as silent.
    fn crawls(&mut self, chunk: &Bytes, waited: Duration) -> bool {
        self.pace.bytes += chunk.len() as u64;
        self.pace.waited += waited;
        if self.pace.waited < self.repository.stall_timeout {
            return false;
        }
        let pace = std::mem::take(&mut self.pace);
        pace.bytes < self.least_bytes(pace.waited)
    }

    /// The fewest bytes that a host must have sent in `waited`.
    fn least_bytes(&self, waited: Duration) -> u64 {
        let least = u128::from(self.repository.min_bytes_per_second) * waited.as_millis() / 1000;
        u64::try_from(least).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_slow_on_average_is_given_up_however_its_connections_end() {
        let repository = Repository {
            name: "app".to_owned(),
            endpoints: Vec::new(),
            stall_timeout: Duration::from_secs(10),
            min_bytes_per_second: 1000,
        };
        let mut stream = repository.blob(&Digest::of(b""), 1 << 20, &Barred::new());
        for (seconds, bytes, is_hopeless) in [
            (39, 0, false),
            (40, 40_000, false),
            (40, 39_999, true),
            (4000, 3_999_999, true),
        ] {
            stream.average = Pace {
                bytes,
                waited: Duration::from_secs(seconds),
            };
            let error = stream.hopeless();
            let is_slow = matches!(error, Some(RegistryError::Crawls { .. }));
            assert_eq!(is_slow, is_hopeless, "{bytes} in {seconds} s");
        }
        // There is no other host.
        let error = stream.hopeless().unwrap();
        stream.bar(error).unwrap_err();
    }
}
