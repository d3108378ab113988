// SPDX-License-Identifier: Apache-2.0
//! The layers of one pull, all at the same time: those that the store has are asked for at the registry, the others are
//! downloaded and converted.

use std::io::{self, Read};
use std::sync::Arc;

use bulkhead_faults::{self as faults, Step};
use bulkhead_records::Sum;
use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};

use super::{Pull, PullError};
use crate::contents::{Needed, Source, StoreError};
use crate::digest::Digest;
use crate::layer::{self, LayerError, Limits, Promise};
use crate::registry::{Barred, BlobStream, RegistryError};

/// How many chunks of a download (about 16 KiB each) may wait for the thread that converts them.
const CHUNKS_WAITING: usize = 16;

/// Ends the conversions of a pull when it is dropped.
struct GiveUp(Arc<Limits>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// A layer of the image, and what is known of it.
struct Wanted {
    promise: Promise,
    /// Its name in the store.
    layer: Digest,
    source: Source,
    needed: Arc<Needed>,
}

impl Pull {
    /// Gets all layers. The first failure aborts the others. Each task holds the claim, so a layer that an aborted task
    /// has just finished is removed when the last task has ended.
    pub(super) async fn layers(
        self: &Arc<Self>,
        layers: Vec<Promise>,
        needed: &Arc<Needed>,
    ) -> Result<(), PullError> {
        let files = &self.contents.files;
        let missing = layers.iter().filter(|layer| !files.has(&layer.layer()));
        let missing_bytes = missing.fold(0u64, |sum, layer| sum.saturating_add(layer.bytes));
        let room = self.limits.expect(missing_bytes);
        room.map_err(|e| self.excess(e))?;
        let _give_up = GiveUp(Arc::clone(&self.limits));
        let mut tasks = JoinSet::new();
        for promise in layers {
            self.progress.expect(promise.bytes);
            let wanted = Wanted {
                source: Source {
                    host: self.host.clone(),
                    blob: promise.digest.clone(),
                },
                layer: promise.layer(),
                promise,
                needed: Arc::clone(needed),
            };
            let pull = Arc::clone(self);
            tasks.spawn(async move { pull.layer(&wanted).await });
        }
        while let Some(result) = tasks.join_next().await {
            result.map_err(|_| self.task_failed())??;
        }
        Ok(())
    }

    /// Gets a layer, unless another pull is getting it from the same place. A pull from elsewhere is not waited for:
    /// it may be slow, and what it gets is perhaps not what it says.
    async fn layer(&self, wanted: &Wanted) -> Result<(), PullError> {
        let Wanted { promise, layer, .. } = wanted;
        let maker = self.contents.maker(&wanted.source, layer);
        let _making = maker.lock().await;
        let Some(_turn) = self.turns.next().await else {
            return Err(self.task_failed());
        };
        let is_there = self.contents.has_intact(layer).await?;
        if !is_there || !self.contents.sources.has(layer, &wanted.source) {
            return self.fetch(wanted, is_there).await;
        }
        // The registry decides who may have the layer, not the store.
        let known = self.repository.has_blob(&promise.digest).await;
        known.map_err(|e| self.registry(e))?;
        self.progress.receive(promise.bytes);
        self.count_known(layer)
    }

    fn count_known(&self, layer: &Digest) -> Result<(), PullError> {
        let bytes = self.contents.files.size(layer)?;
        self.limits.count_known(bytes).map_err(|e| self.excess(e))
    }

    /// Downloads a layer. If a host sends other bytes than were promised, the next one is asked.
    async fn fetch(&self, wanted: &Wanted, is_there: bool) -> Result<(), PullError> {
        let mut barred = Barred::new();
        loop {
            let Promise { digest, bytes, .. } = &wanted.promise;
            let mut blob = self.repository.blob(digest, *bytes, &barred);
            let error = match self.transfer(wanted, &mut blob, is_there).await {
                Err(error) if error.is_of_bytes() => error,
                result => return result,
            };
            let Some(next) = blob.bar_senders() else {
                return Err(error);
            };
            tracing::warn!(layer = %digest, %error, "a mirror sent wrong bytes, the next host is asked");
            self.progress.take_back(blob.received_bytes());
            barred = next;
        }
    }

    /// Downloads a layer once and verifies it. One that is in the store is not written again.
    async fn transfer(
        &self,
        wanted: &Wanted,
        blob: &mut BlobStream<'_>,
        is_there: bool,
    ) -> Result<(), PullError> {
        let failed = |source| PullError::Layer {
            reference: self.reference.clone(),
            digest: wanted.promise.digest.clone(),
            source,
        };
        let partial = match is_there {
            true => None,
            false => Some(self.contents.files.create()?),
        };
        let file = partial.as_ref().map(|partial| partial.file()).transpose();
        let file = file.map_err(|e| failed(LayerError::Write(e)))?;
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
        let (promise, limits) = (wanted.promise.clone(), Arc::clone(&self.limits));
        let conversion = spawn_blocking(move || {
            let compressed = ChunkReader::new(receiver);
            let Some(file) = file else {
                layer::verify(compressed, &promise, &limits)?;
                return Ok(None);
            };
            let made = file.try_clone().map_err(LayerError::Write)?;
            layer::convert(compressed, file, &promise, &limits)?;
            Sum::of(&made).map(Some).map_err(LayerError::Write)
        });
        faults::before(Step::ConvertLayer)?;
        // A failed download ends the conversion's input, so that fails, too. The download's error is the real cause.
        let downloaded = self.forward(blob, sender).await;
        let converted = conversion.await.map_err(|_| self.task_failed())?;
        downloaded.map_err(|e| self.registry(e))?;
        let sum = converted.map_err(failed)?;
        faults::after(Step::ConvertLayer)?;
        let contents = Arc::clone(&self.contents);
        let (layer, source) = (wanted.layer.clone(), wanted.source.clone());
        let needed = Arc::clone(&wanted.needed);
        let kept = spawn_blocking(move || -> Result<(), StoreError> {
            let _needed = needed;
            if let Some((partial, sum)) = partial.zip(sum) {
                contents.keep(partial, &layer, &sum)?;
            }
            contents.sources.add(&layer, &source)
        });
        Ok(kept.await.map_err(|_| self.task_failed())??)
    }

    /// Passes a download on until it ends or the receiver is dropped. At its end it sends an empty chunk.
    async fn forward(
        &self,
        blob: &mut BlobStream<'_>,
        sender: mpsc::Sender<Bytes>,
    ) -> Result<(), RegistryError> {
        loop {
            let chunk = blob.next().await?.unwrap_or_default();
            let is_end = chunk.is_empty();
            self.progress.receive(chunk.len() as u64);
            // A receiver that is gone has failed. Its own result says why.
            if sender.send(chunk).await.is_err() || is_end {
                return Ok(());
            }
        }
    }
}

/// Lets blocking code read a download. One that ends without its empty chunk was given up: that is an error and not the
/// end of the layer.
struct ChunkReader {
    chunks: mpsc::Receiver<Bytes>,
    current: Bytes,
    is_complete: bool,
}

impl ChunkReader {
    fn new(chunks: mpsc::Receiver<Bytes>) -> Self {
        Self {
            chunks,
            current: Bytes::new(),
            is_complete: false,
        }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() && !self.is_complete {
            let chunk = self.chunks.blocking_recv();
            self.current = chunk.ok_or(io::ErrorKind::ConnectionAborted)?;
            self.is_complete = self.current.is_empty();
        }
        let count = self.current.len().min(buffer.len());
        self.current
            .copy_to_slice(buffer.get_mut(..count).unwrap_or_default());
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_that_is_given_up_is_no_complete_layer() {
        let read = |chunks: &[&'static [u8]]| {
            let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
            for chunk in chunks {
                sender.try_send(Bytes::from_static(chunk)).unwrap();
            }
            drop(sender);
            let mut all = Vec::new();
            let result = ChunkReader::new(receiver).read_to_end(&mut all);
            result.map(|_| all)
        };
        assert_eq!(read(&[b"ab", b"c", b""]).unwrap(), b"abc");
        read(&[b"ab"]).unwrap_err();
        read(&[]).unwrap_err();
    }
}
