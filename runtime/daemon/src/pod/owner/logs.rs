// SPDX-License-Identifier: Apache-2.0
//! Container logs. A task for each container copies its output from the guest to the log file, and reconnects when the
//! connection breaks.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_guest::connect;
use bulkhead_guest::remarks::Remarks;
use bulkhead_host::Guest;
use bulkhead_text::chain;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::Owner;
use crate::logs::{Followed, LogError, LogFile, Reopen, follow};
use crate::pod::errors::PodError;
use crate::pod::life::state::ContainerState;
use crate::pod::request::Answer;

/// How many requests to open the file again may wait for a log's task.
const MOST_REOPENS: usize = 4;
/// The pause between attempts to open the stream again.
const RETRY: Duration = Duration::from_millis(300);
/// How long the last output may take to arrive after the VM has ended.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// How long [`LogTask::rest_of`] waits for the end of a log. The limit is there because a process may outlive its
/// container's first process and keep its pipes open.
const REST: Duration = Duration::from_secs(2);

/// The task that copies one container's log. Dropping this ends the task.
#[derive(Debug)]
pub struct LogTask {
    reopen: mpsc::Sender<Reopen>,
    done: watch::Receiver<bool>,
    abort: AbortHandle,
}

impl LogTask {
    /// Follows the log of `container`.
    pub fn start(guest: &Guest, container: String, log: LogFile) -> Self {
        let (reopen, requests) = mpsc::channel(MOST_REOPENS);
        let (finished, done) = watch::channel(false);
        let (vsock, remarks) = (guest.files.vsock(), guest.remarks.clone());
        let task = tokio::spawn(async move {
            bring(vsock, &remarks, container, log, requests).await;
            finished.send_replace(true);
        });
        Self {
            reopen,
            done,
            abort: task.abort_handle(),
        }
    }

    /// Whether nothing more will be written: the log is complete, or its task was ended.
    pub fn is_done(&self) -> bool {
        *self.done.borrow() || self.abort.is_finished()
    }

    /// Waits until these logs are complete, but at most [`REST`].
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

    /// Passes a request to the task.
    pub fn reopen(&self, answer: Reopen) -> Result<(), LogError> {
        pass(&self.reopen, answer)
    }

    /// Ends the task after [`LAST_BYTES`]. Call this when the VM has ended.
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
    /// Asks the log's task to open its file again. The task's result becomes the answer.
    pub(super) fn reopen_log(&mut self, id: &str, answer: Answer<()>) {
        let record = match self.ledger.container(id) {
            Ok(record) => record,
            Err(error) => return drop(answer.send(Err(error))),
        };
        let Some(log) = self.logs.get(id).filter(|_| record.state.is_running()) else {
            let not_running = PodError::container_is(record, "reopening the log");
            return drop(answer.send(Err(not_running)));
        };
        let (reopen, reopened): (Reopen, _) = oneshot::channel();
        if let Err(error) = log.reopen(reopen) {
            return drop(answer.send(Err(error.into())));
        }
        tokio::spawn(async move {
            let result = match reopened.await {
                Ok(result) => result.map_err(PodError::from),
                // The log has ended meanwhile, so there is nothing to open again.
                Err(_) => Ok(()),
            };
            let _ = answer.send(result);
        });
    }

    /// The log of a container. Without a `path` the log is discarded.
    pub(super) fn log_file(&self, path: Option<PathBuf>) -> LogFile {
        LogFile::new(path, self.shared.host.log_bytes_per_second)
    }

    /// Follows the logs of containers that an earlier daemon started.
    pub(super) fn follow_logs(&mut self, guest: &Guest) {
        let started = self.ledger.containers().values();
        let started = started.filter(|one| one.state != ContainerState::Created);
        let tasks: Vec<_> = started
            .map(|one| {
                let log = self.log_file(one.log_path.clone());
                let task = LogTask::start(guest, one.id.clone(), log);
                (one.id.clone(), task)
            })
            .collect();
        self.logs.extend(tasks);
    }
}

/// Passes a request on without waiting.
fn pass(requests: &mpsc::Sender<Reopen>, answer: Reopen) -> Result<(), LogError> {
    match requests.try_send(answer) {
        Ok(()) => Ok(()),
        Err(TrySendError::Closed(_)) => Err(LogError::Complete),
        Err(TrySendError::Full(_)) => Err(LogError::Busy(requests.max_capacity())),
    }
}

/// Copies a container's log until its end. After an error it tries again, from the last byte that was acknowledged.
async fn bring(
    vsock: PathBuf,
    remarks: &Remarks,
    container: String,
    mut log: LogFile,
    mut requests: mpsc::Receiver<Reopen>,
) {
    if let Err(error) = log.open() {
        tracing::warn!(container, "{}", chain(&error));
    }
    loop {
        match connect::open_log(&vsock, &container).await {
            Ok((stream, offset)) => match follow(stream, offset, &mut log, &mut requests).await {
                Ok(Followed::End) => return,
                Ok(Followed::Broken) => {}
                Err(error) => remarks.warn(format_args!("log of {container}: {}", chain(&error))),
            },
            Err(error) => tracing::debug!(container, "{}", chain(&error)),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            Some(answer) = requests.recv() => { let _ = answer.send(log.open()); }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_with_too_many_requests_and_one_that_is_complete_say_so() {
        let (requests, waiting) = mpsc::channel(2);
        let ask = || pass(&requests, oneshot::channel().0);
        for _ in 0..2 {
            ask().unwrap();
        }
        assert!(matches!(ask(), Err(LogError::Busy(2))));
        drop(waiting);
        assert!(matches!(ask(), Err(LogError::Complete)));
    }
}
