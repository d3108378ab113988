// SPDX-License-Identifier: Apache-2.0
//! What states a pod and a container have, and which event leads from one to the next.
//!
//! Pure: no I/O, no clock, no lock, no import of a neighbour. The pod's owner applies these moves, one at a
//! time, each written to disk before it is true in memory.
//!
//! ```text
//! pod:        Creating ──Booted──> Ready ──StopRequested──> Stopping ──Stopped──> NotReady ──> (removed)
//!                 └────────────────┴───────── Lost ────────────┴──────────────────^
//!
//! container:  Created ──Started──> Running ──Died──> Exited ──> (removed)
//!                 └──── StartFailed, Died ───────────^
//! ```

use serde::{Deserialize, Serialize};

/// The exit code of a container that was killed, or whose pod is gone: 128 + SIGKILL.
pub const KILLED_EXIT_CODE: i32 = 137;

/// Where a pod is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodState {
    /// Host resources are being taken; the pod is not shown yet.
    Creating,
    /// Its VM lives and its agent has taken the configuration.
    Ready,
    /// It is being taken down.
    Stopping,
    /// Its VM is gone.
    NotReady { cause: String },
}

#[derive(Clone, Debug)]
pub enum PodEvent {
    Booted,
    StopRequested,
    Stopped,
    /// The VM ended without being asked.
    Lost {
        cause: String,
    },
}

/// Where a container is in its life. No exit code without an exit, no exit without a code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    Created,
    Running { pid: u32, started_at: i64 },
    Exited(Exit),
}

/// How a container ended. Times are nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    pub reason: ExitReason,
    pub message: String,
    /// 0: it never ran.
    pub started_at: i64,
    pub finished_at: i64,
}

/// The word that CRI shows for an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    Completed,
    Error,
    OomKilled,
    StartError,
    /// The pod's VM ended under it.
    SandboxLost,
}

#[derive(Clone, Debug)]
pub enum ContainerEvent {
    Started {
        pid: u32,
        at: i64,
    },
    StartFailed {
        code: i32,
        message: String,
        at: i64,
    },
    Died {
        code: i32,
        oom_killed: bool,
        message: String,
        at: i64,
    },
    Lost {
        cause: String,
        at: i64,
    },
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{subject} is {state}: {event} is not possible")]
pub struct IllegalMove {
    pub subject: &'static str,
    pub state: &'static str,
    pub event: &'static str,
}

impl PodState {
    /// Returns the state after `event`.
    pub fn after(&self, event: &PodEvent) -> Result<Self, IllegalMove> {
        match (self, event) {
            (Self::Creating, PodEvent::Booted) => Ok(Self::Ready),
            (Self::Creating | Self::Ready | Self::Stopping, PodEvent::StopRequested) => {
                Ok(Self::Stopping)
            }
            (Self::Stopping, PodEvent::Stopped) => Ok(Self::NotReady {
                cause: "the pod was stopped".to_owned(),
            }),
            (Self::Creating | Self::Ready | Self::Stopping, PodEvent::Lost { cause }) => {
                Ok(Self::NotReady {
                    cause: cause.clone(),
                })
            }
            // A stopped pod stays as it is, and the first cause stands.
            (Self::NotReady { .. }, PodEvent::StopRequested | PodEvent::Lost { .. }) => {
                Ok(self.clone())
            }
            (Self::NotReady { .. }, PodEvent::Booted | PodEvent::Stopped)
            | (Self::Ready, PodEvent::Booted | PodEvent::Stopped)
            | (Self::Stopping, PodEvent::Booted)
            | (Self::Creating, PodEvent::Stopped) => Err(IllegalMove {
                subject: "pod",
                state: self.name(),
                event: event.name(),
            }),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::NotReady { .. } => "not ready",
        }
    }
}

impl PodEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Booted => "boot",
            Self::StopRequested => "stop",
            Self::Stopped => "the end of a stop",
            Self::Lost { .. } => "loss of the VM",
        }
    }
}

impl ContainerState {
    /// Returns the state after `event`.
    pub fn after(&self, event: &ContainerEvent) -> Result<Self, IllegalMove> {
        match (self, event) {
            (Self::Created, ContainerEvent::Started { pid, at }) => Ok(Self::Running {
                pid: *pid,
                started_at: *at,
            }),
            // The answer to a start and the watch both tell of it.
            (Self::Running { .. }, ContainerEvent::Started { .. }) => Ok(self.clone()),
            (Self::Created, ContainerEvent::StartFailed { code, message, at }) => {
                Ok(Self::Exited(Exit {
                    code: *code,
                    reason: ExitReason::StartError,
                    message: message.clone(),
                    started_at: 0,
                    finished_at: *at,
                }))
            }
            (
                Self::Created | Self::Running { .. },
                ContainerEvent::Died {
                    code,
                    oom_killed,
                    message,
                    at,
                },
            ) => Ok(Self::Exited(Exit {
                code: *code,
                reason: reason(*code, *oom_killed),
                message: message.clone(),
                started_at: self.started_at(),
                finished_at: (*at).max(self.started_at()),
            })),
            (Self::Created | Self::Running { .. }, ContainerEvent::Lost { cause, at }) => {
                Ok(Self::Exited(Exit {
                    code: KILLED_EXIT_CODE,
                    reason: ExitReason::SandboxLost,
                    message: cause.clone(),
                    started_at: self.started_at(),
                    finished_at: (*at).max(self.started_at()),
                }))
            }
            // The first word on an exit stands.
            (
                Self::Exited(_),
                ContainerEvent::Died { .. }
                | ContainerEvent::Lost { .. }
                | ContainerEvent::StartFailed { .. },
            ) => Ok(self.clone()),
            (Self::Exited(_), ContainerEvent::Started { .. })
            | (Self::Running { .. }, ContainerEvent::StartFailed { .. }) => Err(IllegalMove {
                subject: "container",
                state: self.name(),
                event: event.name(),
            }),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running { .. } => "running",
            Self::Exited(_) => "exited",
        }
    }

    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running { .. })
    }

    pub fn is_exited(&self) -> bool {
        matches!(self, Self::Exited(_))
    }

    fn started_at(&self) -> i64 {
        match self {
            Self::Created => 0,
            Self::Running { started_at, .. } => *started_at,
            Self::Exited(exit) => exit.started_at,
        }
    }
}

impl ContainerEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "start",
            Self::StartFailed { .. } => "a failed start",
            Self::Died { .. } => "exit",
            Self::Lost { .. } => "loss of the VM",
        }
    }
}

impl ExitReason {
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

fn reason(code: i32, oom_killed: bool) -> ExitReason {
    match (code, oom_killed) {
        (_, true) => ExitReason::OomKilled,
        (0, false) => ExitReason::Completed,
        (_, false) => ExitReason::Error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> PodEvent {
        PodEvent::Lost { cause: "x".into() }
    }

    #[test]
    fn a_pod_moves_only_along_the_diagram() {
        use PodEvent::{Booted, StopRequested, Stopped};
        let down = PodState::NotReady { cause: "x".into() };
        let stopped = PodState::NotReady {
            cause: "the pod was stopped".into(),
        };
        let table = [
            (PodState::Creating, Booted, Some(PodState::Ready)),
            (PodState::Creating, StopRequested, Some(PodState::Stopping)),
            (PodState::Creating, Stopped, None),
            (PodState::Creating, lost(), Some(down.clone())),
            (PodState::Ready, Booted, None),
            (PodState::Ready, StopRequested, Some(PodState::Stopping)),
            (PodState::Ready, Stopped, None),
            (PodState::Ready, lost(), Some(down.clone())),
            (PodState::Stopping, Booted, None),
            (PodState::Stopping, StopRequested, Some(PodState::Stopping)),
            (PodState::Stopping, Stopped, Some(stopped.clone())),
            (PodState::Stopping, lost(), Some(down.clone())),
            (down.clone(), Booted, None),
            (down.clone(), StopRequested, Some(down.clone())),
            (down.clone(), Stopped, None),
            (stopped.clone(), lost(), Some(stopped)),
        ];
        for (from, event, to) in table {
            let case = format!("{from:?} {event:?}");
            assert_eq!(from.after(&event).ok(), to, "{case}");
        }
    }

    fn died(code: i32, oom_killed: bool) -> ContainerEvent {
        ContainerEvent::Died {
            code,
            oom_killed,
            message: String::new(),
            at: 9,
        }
    }

    #[test]
    fn an_exit_has_the_reason_that_kubernetes_shows() {
        let running = ContainerState::Running {
            pid: 1,
            started_at: 5,
        };
        for (code, oom, expected) in [
            (0, false, "Completed"),
            (3, false, "Error"),
            (137, false, "Error"),
            (137, true, "OOMKilled"),
            (0, true, "OOMKilled"),
        ] {
            let ContainerState::Exited(exit) = running.after(&died(code, oom)).unwrap() else {
                panic!("must be exited");
            };
            assert_eq!(
                (
                    exit.code,
                    exit.reason.word(),
                    exit.started_at,
                    exit.finished_at
                ),
                (code, expected, 5, 9)
            );
        }
    }

    #[test]
    fn a_container_moves_only_along_the_diagram() {
        let started = || ContainerEvent::Started { pid: 1, at: 5 };
        let failed = || ContainerEvent::StartFailed {
            code: 127,
            message: "no".into(),
            at: 6,
        };
        let gone = || ContainerEvent::Lost {
            cause: "vm".into(),
            at: 7,
        };
        let created = ContainerState::Created;
        let running = created.after(&started()).unwrap();
        let exited = running.after(&died(1, false)).unwrap();
        let table = [
            (&created, started(), Some("running")),
            (&created, failed(), Some("exited")),
            (&created, died(0, false), Some("exited")),
            (&created, gone(), Some("exited")),
            (&running, started(), Some("running")),
            (&running, failed(), None),
            (&running, died(0, false), Some("exited")),
            (&running, gone(), Some("exited")),
            (&exited, started(), None),
            (&exited, failed(), Some("exited")),
            (&exited, died(0, false), Some("exited")),
            (&exited, gone(), Some("exited")),
        ];
        for (from, event, to) in table {
            let after = from.after(&event).ok();
            assert_eq!(
                after.as_ref().map(ContainerState::name),
                to,
                "{from:?} {event:?}"
            );
            if from.is_exited() && to.is_some() {
                assert_eq!(after.as_ref(), Some(from), "the first word stands");
            }
        }
        let ContainerState::Exited(exit) = running.after(&gone()).unwrap() else {
            panic!("must be exited");
        };
        assert_eq!((exit.code, exit.message.as_str()), (KILLED_EXIT_CODE, "vm"));
    }

    #[test]
    fn an_exit_is_never_before_its_start_whatever_the_guests_clock_says() {
        let running = ContainerState::Running {
            pid: 1,
            started_at: 50,
        };
        let ContainerState::Exited(exit) = running.after(&died(0, false)).unwrap() else {
            panic!("must be exited");
        };
        assert_eq!(exit.finished_at, 50);
    }
}
