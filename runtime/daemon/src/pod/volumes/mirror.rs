// SPDX-License-Identifier: Apache-2.0
//! The task that keeps a volume of the guest a copy of a host directory.
//!
//! It sends the whole state of the directory at first, and again after each change. All changes that happen while a
//! state is sent lead to one more state. Only a batch of records is in memory at a time. After an error the task tries
//! again, and the guest keeps the last complete state meanwhile. The creation of a container waits for a state that is
//! not older than the creation, or fails with the error.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_guest::connect::{self, ConnectError};
use bulkhead_guest::protocol::{MirrorAnswer, MirrorRecord, mirror_record::Record};
use bulkhead_guest::remarks::Remarks;
use bulkhead_host::Guest;
use bulkhead_text::chain;
use tokio::io::{AsyncWriteExt, BufStream};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::walk::{Walk, WalkError};
use super::watcher::{Watch, Watcher};
use crate::pod::life::record::MirrorSource;

/// Changes come in bursts: how long to wait for more after the first one.
const BURST: Duration = Duration::from_millis(20);
/// The pause before another attempt after an error, and between states if the directory cannot be watched.
const RETRY: Duration = Duration::from_secs(3);
/// How often to start reading again if the state changes while it is read, before that is an error.
const ATTEMPTS: usize = 100;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(5);
/// How long the guest may take to write a batch, and to answer a commit.
const GUEST_LIMIT: Duration = Duration::from_secs(60);
const ANSWER_BYTES: u32 = 4 << 10;

#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error(transparent)]
    Walk(#[from] WalkError),
    #[error("connect to the guest")]
    Connect(#[from] ConnectError),
    #[error("send its content to the guest")]
    Send(#[source] io::Error),
    #[error("the guest: {0}")]
    Guest(String),
    #[error("the guest has not taken it within {GUEST_LIMIT:?}")]
    Slow,
    #[error("the mirror has ended")]
    Ended,
}

type Synced = oneshot::Sender<Result<(), Arc<MirrorError>>>;

/// A running mirror. Dropping it ends its task.
#[derive(Debug)]
pub struct Mirror {
    requests: mpsc::UnboundedSender<Synced>,
    abort: AbortHandle,
}

impl Mirror {
    /// Starts to mirror `source` into the guest's `volume`.
    pub fn start(guest: &Guest, volume: String, source: MirrorSource, watcher: Watcher) -> Self {
        let (requests, inbox) = mpsc::unbounded_channel();
        let task = Task {
            vsock: guest.files.vsock(),
            remarks: guest.remarks.clone(),
            volume,
            source,
            connection: None,
        };
        let running = tokio::spawn(task.run(watcher, inbox));
        Self {
            requests,
            abort: running.abort_handle(),
        }
    }

    /// Waits until the guest has a state that is not older than this call.
    pub async fn synced(&self) -> Result<(), Arc<MirrorError>> {
        let (answer, synced) = oneshot::channel();
        let ended = |_| Arc::new(MirrorError::Ended);
        self.requests
            .send(answer)
            .map_err(|_| Arc::new(MirrorError::Ended))?;
        synced.await.map_err(ended)?
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

struct Task {
    /// The VMM's socket.
    vsock: PathBuf,
    remarks: Remarks,
    volume: String,
    source: MirrorSource,
    connection: Option<BufStream<UnixStream>>,
}

impl Task {
    async fn run(mut self, watcher: Watcher, mut inbox: mpsc::UnboundedReceiver<Synced>) {
        let mut waiting: Vec<Synced> = Vec::new();
        let mut was_well = true;
        loop {
            // The watch must begin before the read, so that no change is missed.
            let watch = watcher.watch(&self.source.path);
            while let Ok(one) = inbox.try_recv() {
                waiting.push(one);
            }
            let result = self.send_state().await.map_err(Arc::new);
            let is_well = result.is_ok();
            if let Err(error) = &result {
                self.connection = None;
                if was_well {
                    self.remarks.warn(format_args!(
                        "the guest keeps the last state of the volume {}, a copy of {}: {}",
                        self.volume,
                        self.source.path.display(),
                        chain(error)
                    ));
                }
            }
            was_well = is_well;
            for one in waiting.drain(..) {
                // The caller may have gone away.
                let _ = one.send(result.clone());
            }
            tokio::select! {
                () = changed(watch, is_well) => sleep(BURST).await,
                one = inbox.recv() => match one {
                    Some(one) => waiting.push(one),
                    None => return,
                },
            }
        }
    }

    /// Sends one whole state and waits until containers see it.
    async fn send_state(&mut self) -> Result<(), MirrorError> {
        if self.connection.is_none() {
            let stream = connect::open_mirror(&self.vsock, &self.volume).await?;
            self.connection = Some(BufStream::new(stream));
        }
        let Some(stream) = &mut self.connection else {
            return Err(MirrorError::Ended);
        };
        for _ in 0..ATTEMPTS {
            match send_walk(stream, self.source.path.clone()).await {
                Err(MirrorError::Walk(WalkError::Changed(_))) => {}
                sent => {
                    sent?;
                    return commit(stream).await;
                }
            }
            send(stream, vec![Record::Restart(true)]).await?;
            sleep(ATTEMPT_PAUSE).await;
        }
        Err(WalkError::Changed(self.source.path.clone()).into())
    }
}

async fn changed(watch: io::Result<Watch>, is_well: bool) {
    match watch {
        Ok(watch) if is_well => watch.changed().await,
        Ok(watch) => {
            // The next attempt may succeed even if the directory does not change.
            let _ = timeout(RETRY, watch.changed()).await;
        }
        Err(_) => sleep(RETRY).await,
    }
}

async fn send_walk(stream: &mut BufStream<UnixStream>, root: PathBuf) -> Result<(), MirrorError> {
    let mut walk = blocking(move || Walk::begin(&root)).await??;
    loop {
        let (kept, batch) = blocking(move || {
            let batch = walk.next_batch();
            (walk, batch)
        })
        .await?;
        walk = kept;
        let batch = batch?;
        if batch.is_empty() {
            return Ok(());
        }
        send(stream, batch).await?;
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, MirrorError> {
    spawn_blocking(work).await.map_err(|_| MirrorError::Ended)
}

async fn send(stream: &mut BufStream<UnixStream>, records: Vec<Record>) -> Result<(), MirrorError> {
    let sending = async {
        for record in records {
            let record = Some(record);
            connect::write_message(stream, &MirrorRecord { record }).await?;
        }
        Ok(())
    };
    let sent = timeout(GUEST_LIMIT, sending).await;
    sent.map_err(|_| MirrorError::Slow)?
        .map_err(MirrorError::Send)
}

async fn commit(stream: &mut BufStream<UnixStream>) -> Result<(), MirrorError> {
    send(stream, vec![Record::Commit(true)]).await?;
    let answering = async {
        stream.flush().await?;
        connect::read_message::<MirrorAnswer>(stream, ANSWER_BYTES).await
    };
    let answer = timeout(GUEST_LIMIT, answering).await;
    let answer = answer
        .map_err(|_| MirrorError::Slow)?
        .map_err(MirrorError::Send)?;
    if answer.error.is_empty() {
        return Ok(());
    }
    Err(MirrorError::Guest(bulkhead_guest::text::bounded(
        &answer.error,
    )))
}
