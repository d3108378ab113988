// SPDX-License-Identifier: Apache-2.0
//! Watches a VM that starts, until its agent is ready: whether it still runs, and whether it is within its time limits. How
//! it ended, and what its console says, becomes the error.

use std::time::Duration;

use bulkhead_faults::{self as faults, Step};
use tokio::time::Instant;

use super::LaunchError;
use crate::files::Files;
use crate::guest::Guest;
use crate::patience::{Clock, Limits, Verdict, judge};
use crate::process::VmmProcess;

/// A VMM whose connection was closed ends within this time, if that is why.
const END_TOGETHER: Duration = Duration::from_secs(1);
/// How long an attempt to reach the agent of a guest that goes on may take: as long as a boot, whose limit ends it.
const HEARTBEAT: Duration = Duration::from_secs(60);
/// Between two attempts to reach it.
const NOT_YET: Duration = Duration::from_millis(20);

/// Watches a boot: whether its VM still runs, and whether it is within its time limits.
pub struct Watch<'a> {
    process: &'a VmmProcess,
    files: &'a Files,
    pub clock: Clock,
    limits: Limits,
}

impl<'a> Watch<'a> {
    /// `own` is how long the VM may take apart from waiting for a CPU.
    pub fn new(process: &'a VmmProcess, files: &'a Files, own: Duration, until: Instant) -> Self {
        Self {
            process,
            files,
            clock: Clock::of_new(process.identity().pid),
            limits: Limits { own, until },
        }
    }

    pub async fn step<T>(
        &self,
        stage: &'static str,
        step: impl Future<Output = T>,
    ) -> Result<T, LaunchError> {
        tokio::pin!(step);
        loop {
            let again = self.look(stage)?;
            tokio::select! {
                // `biased`, because the VMM's exit report tells more than the connection that broke with it.
                biased;
                () = self.process.ended() => return Err(ended(self.files, stage)),
                done = &mut step => return Ok(done),
                () = tokio::time::sleep_until(again) => {}
            }
        }
    }

    /// Waits until the agent of a guest that goes on answers.
    pub async fn answered(&self, guest: Guest, stage: &'static str) -> Result<Guest, LaunchError> {
        faults::before(Step::HearAgent)?;
        let answered = async {
            while !guest.agent.answers_within(HEARTBEAT).await {
                tokio::time::sleep(NOT_YET).await;
            }
        };
        self.step(stage, answered).await?;
        faults::after(Step::HearAgent)?;
        tracing::info!(elapsed = ?self.clock.since.elapsed(), "guest goes on");
        Ok(guest)
    }

    /// What went wrong on a connection. That of a VMM that ends is closed a moment before it has ended.
    pub async fn ended_or(&self, error: LaunchError, stage: &'static str) -> LaunchError {
        end_or(self.process, self.files, stage, || error).await
    }

    /// Checks the time limits. Returns when to check again.
    fn look(&self, stage: &'static str) -> Result<Instant, LaunchError> {
        let spent = self.clock.spent();
        let Limits { own, until } = self.limits;
        let all = until.saturating_duration_since(self.clock.since);
        let limit = match judge(&spent, own, all) {
            Verdict::GoOn(passed) => return Ok(self.clock.since + passed),
            Verdict::Slow => format!("its limit is {own:?} without waiting for a CPU"),
            Verdict::Late => "its caller does not wait any longer".to_owned(),
        };
        Err(LaunchError::Timeout {
            stage,
            spent,
            limit,
            console: console(self.files),
        })
    }
}

/// How a guest was lost that has answered before, as `error` says: how its VM ended, or that it runs on; and what the console
/// says.
pub async fn lost(guest: &Guest, stage: &'static str, error: String) -> LaunchError {
    let runs_on = || LaunchError::Ended {
        stage,
        obituary: format!("{error}; its VMM runs on and is killed"),
        console: console(&guest.files),
    };
    end_or(&guest.process, &guest.files, stage, runs_on).await
}

/// How the VM ended, or what else it is if it runs on.
async fn end_or(
    process: &VmmProcess,
    files: &Files,
    stage: &'static str,
    otherwise: impl FnOnce() -> LaunchError,
) -> LaunchError {
    match tokio::time::timeout(END_TOGETHER, process.ended()).await {
        Ok(()) => ended(files, stage),
        Err(_) => otherwise(),
    }
}

fn ended(files: &Files, stage: &'static str) -> LaunchError {
    LaunchError::Ended {
        stage,
        obituary: files.obituary(),
        console: console(files),
    }
}

fn console(files: &Files) -> String {
    match files.console_tail() {
        tail if tail.is_empty() => "; the guest's console is empty".to_owned(),
        tail => format!("; the guest's console ends with:\n{tail}"),
    }
}
