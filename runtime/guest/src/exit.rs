// SPDX-License-Identifier: Apache-2.0
//! How a container ended. This type is used from the guest's message up to the daemon's store.

use serde::{Deserialize, Serialize};

/// The exit code of a container that was killed, or whose pod is gone: 128 + SIGKILL.
pub const KILLED_EXIT_CODE: i32 = 137;
/// The exit code of a container that never ran: that of containerd, whatever the cause.
pub const START_FAILED_EXIT_CODE: i32 = 128;

/// How a container ended. Times are nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    pub reason: ExitReason,
    pub message: String,
    /// 0 if it never ran, or if the time is unknown.
    pub started_at: i64,
    pub finished_at: i64,
}

/// Why a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    Completed,
    Error,
    OomKilled,
    /// Its program could not be executed.
    StartError,
    /// The pod's VM ended while it ran.
    SandboxLost,
}

impl Exit {
    /// The exit of a container that was killed with its pod.
    pub fn killed(at: i64) -> Self {
        Self {
            code: KILLED_EXIT_CODE,
            reason: ExitReason::Error,
            message: "killed with its pod".to_owned(),
            started_at: 0,
            finished_at: at,
        }
    }

    /// The exit of a container whose VM ended because of `cause`.
    pub fn lost(cause: &str, at: i64) -> Self {
        Self {
            code: KILLED_EXIT_CODE,
            reason: ExitReason::SandboxLost,
            message: cause.to_owned(),
            started_at: 0,
            finished_at: at,
        }
    }

    /// The exit of a container that never ran.
    pub fn not_started(message: String, at: i64) -> Self {
        Self {
            code: START_FAILED_EXIT_CODE,
            reason: ExitReason::StartError,
            message,
            started_at: 0,
            finished_at: at,
        }
    }
}

impl ExitReason {
    /// The reason for the exit of a process that has run.
    pub fn of(code: i32, oom_killed: bool) -> Self {
        match (code, oom_killed) {
            (_, true) => Self::OomKilled,
            (0, false) => Self::Completed,
            (_, false) => Self::Error,
        }
    }

    /// The reason as CRI shows it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::SandboxLost => "SandboxLost",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ExitReason;

    #[test]
    fn an_exit_has_the_reason_that_kubernetes_shows() {
        for (code, oom_killed, expected) in [
            (0, false, "Completed"),
            (3, false, "Error"),
            (137, false, "Error"),
            (137, true, "OOMKilled"),
            (0, true, "OOMKilled"),
        ] {
            assert_eq!(ExitReason::of(code, oom_killed).word(), expected);
        }
    }
}
