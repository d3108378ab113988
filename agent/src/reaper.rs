// SPDX-License-Identifier: Apache-2.0
//! The only code that waits for child processes. PID 1 inherits every orphan of the guest, so one owner collects
//! all exits and passes each to the code that registered for that process.
//!
//! Everything runs on the agent's one thread. So a child cannot be collected between its creation and
//! [`Reaper::register`], as long as there is no await in between.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit status, or 128 + the number of the signal that killed it.
    pub code: i32,
    /// By a clock that nobody sets, unlike the wall clock.
    pub at: Instant,
}

/// Who waits for which process. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>,
}

impl Reaper {
    /// Registers for a process's exit. Call it directly after the process was created, before any await.
    pub fn register(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(pid, sender);
        receiver
    }

    /// Collects child processes as long as the agent lives.
    pub async fn run(self) -> std::io::Result<()> {
        let mut child_exits = signal(SignalKind::child())?;
        loop {
            self.collect();
            child_exits.recv().await;
        }
    }

    fn collect(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(code) = exit_code(status) else {
                continue;
            };
            let waiting = self.lock().remove(&pid.as_raw_nonzero().get());
            if let Some(sender) = waiting {
                let _ = sender.send(Exit {
                    code,
                    at: Instant::now(),
                });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Exit>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exit_code(status: WaitStatus) -> Option<i32> {
    status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}
