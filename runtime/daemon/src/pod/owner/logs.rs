// SPDX-License-Identifier: Apache-2.0
//! Containers' logs: a task for each brings it from the guest to its file, over as many connections as it takes.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_guest::connect;
use bulkhead_host::Guest;
use bulkhead_text::chain;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::Owner;
use crate::logs::{Followed, LogFile, Reopen, follow};
use crate::pod::errors::PodError;
use crate::pod::life::state::ContainerState;
use crate::pod::request::Answer;

/// Between attempts to open the stream again.
const RETRY: Duration = Duration::from_millis(300);
/// How long what is still on its way may take once the VM is gone.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// How long those wait for the rest of logs who want them whole. It is for processes that outlive their container's
/// first one and keep its pipes.
const REST: Duration = Duration::from_secs(2);

/// The log of a container that was started. Dropped, it ends.
#[derive(Debug)]
pub struct LogTask {
    reopen: mpsc::Sender<Reopen>,
    done: watch::Receiver<bool>,
    abort: AbortHandle,
}

impl LogTask {
    /// Follows the log of `container` behind the VMM's socket `vsock`; without a `path` it is thrown away.
    pub fn start(vsock: PathBuf, container: String, path: Option<PathBuf>) -> Self {
        let (reopen, requests) = mpsc::channel(4);
        let (finished, done) = watch::channel(false);
        let task = tokio::spawn(async move {
            bring(vsock, container, path, requests).await;
            finished.send_replace(true);
        });
        Self {
            reopen,
            done,
            abort: task.abort_handle(),
        }
    }

    /// All has been written, or never will be.
    pub fn is_done(&self) -> bool {
        *self.done.borrow() || self.abort.is_finished()
    }

    /// Waits until everything of these has been written, but not for long.
    pub fn rest_of<'a>(
        logs: impl IntoIterator<Item = &'a Self>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let logs: Vec<_> = logs.into_iter().map(|log| log.done.clone()).collect();
        let rest = async {
            for mut done in logs {
                let _ = done.wait_for(|done| *done).await;
            }
        };
        async { drop(tokio::time::timeout(REST, rest).await) }
    }

    /// Hands a request to the task; gives it back if the task has ended.
    pub fn reopen(&self, answer: Reopen) -> Result<(), Reopen> {
        self.reopen.try_send(answer).map_err(|e| e.into_inner())
    }

    /// Ends the task soon: nothing more can come.
    pub fn finish(&self) {
        let abort = self.abort.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LAST_BYTES).await;
            abort.abort();
        });
    }
}

impl Drop for LogTask {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

impl Owner {
    /// Has the log's task open its file again. The answer comes from there.
    pub(super) fn reopen_log(&mut self, id: &str, answer: Answer<()>) {
        let record = match self.ledger.container(id) {
            Ok(record) => record,
            Err(error) => return drop(answer.send(Err(error))),
        };
        let not_running = PodError::container_is(record, "reopening the log");
        let log = self.logs.get(id).filter(|_| record.state.is_running());
        let (reopen, reopened): (Reopen, _) = oneshot::channel();
        match log.map(|log| log.reopen(reopen)) {
            Some(Ok(())) => {
                tokio::spawn(async move {
                    let result = match reopened.await {
                        Ok(result) => result.map_err(PodError::from),
                        // The log came to its end meanwhile.
                        Err(_) => Ok(()),
                    };
                    let _ = answer.send(result);
                });
            }
            Some(Err(_)) | None => drop(answer.send(Err(not_running))),
        }
    }

    /// Follows the logs of containers that an earlier daemon started.
    pub(super) fn follow_logs(&mut self, guest: &Guest) {
        let started = self.ledger.containers().values();
        let started = started.filter(|one| one.state != ContainerState::Created);
        let tasks: Vec<_> = started
            .map(|one| {
                let (id, path) = (one.id.clone(), one.log_path.clone());
                (id.clone(), LogTask::start(guest.files.vsock(), id, path))
            })
            .collect();
        self.logs.extend(tasks);
    }
}

async fn bring(
    vsock: PathBuf,
    container: String,
    path: Option<PathBuf>,
    mut requests: mpsc::Receiver<Reopen>,
) {
    let mut log = LogFile::new(path);
    if let Err(error) = log.open() {
        tracing::warn!(container, "{}", chain(&error));
    }
    loop {
        match connect::open_log(&vsock, &container).await {
            Ok((stream, offset)) => match follow(stream, offset, &mut log, &mut requests).await {
                Ok(Followed::End) => return,
                Ok(Followed::Broken) => {}
                Err(error) => tracing::warn!(container, "{}", chain(&error)),
            },
            Err(error) => tracing::debug!(container, "{}", chain(&error)),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            Some(answer) = requests.recv() => { let _ = answer.send(log.open()); }
        }
    }
}
