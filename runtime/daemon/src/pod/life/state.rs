// SPDX-License-Identifier: Apache-2.0
//! The states of a pod and a container, and which event leads from one to the next.
//!
//! Pure: no I/O, no clock, no lock. The pod's owner applies the moves one at a time, and stores each (in its ledger).
//!
//! ```text
//! pod:        Creating ──Booted──> Ready ──StopRequested──> Stopping ──Stopped──> NotReady ──> (removed)
//!                 └────────────────┴───────── Lost ────────────┴──────────────────^
//!
//! container:  Created ──Started──> Running ──Ended──> Exited ──> (removed)
//!                 └─────────── Ended ─────────────────^
//! ```

use bulkhead_guest::exit::{Exit, ExitReason};
use serde::{Deserialize, Serialize};

/// How late the daemon may hear of something without the clock having been set.
const LATE_NANOSECONDS: u64 = 2_000_000_000;

/// The state of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodState {
    /// It is booting, and clients do not see it yet.
    Creating,
    /// Its VM runs, and its agent has applied the configuration.
    Ready,
    /// A stop has begun.
    Stopping,
    /// Its VM is gone.
    NotReady { cause: String },
}

#[derive(Clone, Debug)]
pub enum PodEvent {
    Booted,
    StopRequested,
    Stopped,
    /// The VM ended unasked.
    Lost {
        cause: String,
    },
}

/// The state of a container. Only an exited container has an exit code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    Created,
    Running { pid: u32, started_at: i64 },
    Exited(Exit),
}

#[derive(Clone, Debug)]
pub enum ContainerEvent {
    Started { pid: u32, at: i64 },
    Ended(Exit),
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
            // A pod that is not ready stays so, with the cause that was recorded first.
            (Self::NotReady { .. }, PodEvent::StopRequested | PodEvent::Lost { .. }) => {
                Ok(self.clone())
            }
            (Self::NotReady { .. }, PodEvent::Booted | PodEvent::Stopped)
            | (Self::Ready, PodEvent::Booted | PodEvent::Stopped)
            | (Self::Stopping, PodEvent::Booted)
            | (Self::Creating, PodEvent::Stopped) => Err(self.refuse(event.name())),
        }
    }

    /// The error for an `event` that is not possible in this state.
    pub fn refuse(&self, event: &'static str) -> IllegalMove {
        IllegalMove {
            subject: "pod",
            state: self.name(),
            event,
        }
    }

    fn name(&self) -> &'static str {
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
            // Both the answer to a start and the guest's news report it.
            (Self::Running { .. }, ContainerEvent::Started { .. }) => Ok(self.clone()),
            (Self::Running { .. }, ContainerEvent::Ended(exit))
                if exit.reason == ExitReason::StartError =>
            {
                Err(self.refuse(event.name()))
            }
            (Self::Created | Self::Running { .. }, ContainerEvent::Ended(exit)) => {
                let started_at = match self {
                    Self::Running { started_at, .. } if !was_set(*started_at, exit) => *started_at,
                    // The daemon did not hear of the start, or the clock is another than it was at the start.
                    _ => exit.started_at,
                };
                Ok(Self::Exited(Exit {
                    started_at,
                    finished_at: exit.finished_at.max(started_at),
                    ..exit.clone()
                }))
            }
            // The exit that was recorded first stays.
            (Self::Exited(_), ContainerEvent::Ended(_)) => Ok(self.clone()),
            (Self::Exited(_), ContainerEvent::Started { .. }) => Err(self.refuse(event.name())),
        }
    }

    /// The error for an `event` that is not possible in this state.
    pub fn refuse(&self, event: &'static str) -> IllegalMove {
        IllegalMove {
            subject: "container",
            state: self.name(),
            event,
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
}

/// Whether the host's clock was set while a container ran, which started at `started_at` by the clock as it was. The
/// exit has both times by the clock as it is now, if the guest told the start.
fn was_set(started_at: i64, exit: &Exit) -> bool {
    exit.started_at > 0 && exit.started_at.abs_diff(started_at) > LATE_NANOSECONDS
}

impl ContainerEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "start",
            Self::Ended(exit) => match exit.reason {
                ExitReason::StartError => "a failed start",
                ExitReason::SandboxLost => "loss of the VM",
                ExitReason::Completed | ExitReason::Error | ExitReason::OomKilled => "exit",
            },
        }
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

    fn ended(reason: ExitReason, at: i64) -> ContainerEvent {
        ContainerEvent::Ended(Exit {
            code: 3,
            reason,
            message: String::new(),
            started_at: 2,
            finished_at: at,
        })
    }

    fn exit(state: &ContainerState) -> &Exit {
        match state {
            ContainerState::Exited(exit) => exit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_container_moves_only_along_the_diagram() {
        use ExitReason::{Error, SandboxLost, StartError};
        let started = || ContainerEvent::Started { pid: 1, at: 5 };
        let created = ContainerState::Created;
        let running = created.after(&started()).unwrap();
        let exited = running.after(&ended(Error, 9)).unwrap();
        let table = [
            (&created, started(), Some("running")),
            (&created, ended(StartError, 9), Some("exited")),
            (&created, ended(Error, 9), Some("exited")),
            (&created, ended(SandboxLost, 9), Some("exited")),
            (&running, started(), Some("running")),
            (&running, ended(StartError, 9), None),
            (&running, ended(Error, 9), Some("exited")),
            (&running, ended(SandboxLost, 9), Some("exited")),
            (&exited, started(), None),
            (&exited, ended(StartError, 9), Some("exited")),
            (&exited, ended(Error, 9), Some("exited")),
            (&exited, ended(SandboxLost, 9), Some("exited")),
        ];
        for (from, event, to) in table {
            let after = from.after(&event).ok();
            assert_eq!(
                after.as_ref().map(ContainerState::name),
                to,
                "{from:?} {event:?}"
            );
            if from.is_exited() && to.is_some() {
                assert_eq!(
                    after.as_ref(),
                    Some(from),
                    "the exit that was recorded first stays"
                );
            }
        }
        assert_eq!((exit(&exited).code, exit(&exited).started_at), (3, 5));
    }

    #[test]
    fn an_exit_is_never_before_its_start_whatever_the_guests_clock_says() {
        let running = ContainerState::Running {
            pid: 1,
            started_at: 50,
        };
        let exited = running.after(&ended(ExitReason::Error, 9)).unwrap();
        assert_eq!(exit(&exited).finished_at, 50);
    }

    #[test]
    fn if_the_clock_was_set_meanwhile_the_exit_has_both_times_by_the_clock_as_it_is() {
        const HOUR: i64 = 3_600_000_000_000;
        const SECOND: i64 = 1_000_000_000;
        // It ran for five seconds. The last: no more than the time that news may take.
        let table = [
            (10 * HOUR, 9 * HOUR, 9 * HOUR),
            (9 * HOUR, 10 * HOUR, 10 * HOUR),
            (9 * HOUR, 9 * HOUR + SECOND, 9 * HOUR),
        ];
        for (recorded, told, expected) in table {
            let running = ContainerState::Running {
                pid: 1,
                started_at: recorded,
            };
            let finished_at = told + 5 * SECOND;
            let ended = ContainerEvent::Ended(Exit {
                started_at: told,
                ..Exit::lost("x", finished_at)
            });
            let exited = running.after(&ended).unwrap();
            let times = (exit(&exited).started_at, exit(&exited).finished_at);
            assert_eq!(times, (expected, finished_at), "{recorded} {told}");
        }
    }

    #[test]
    fn a_start_that_only_the_guest_saw_is_told_with_the_exit() {
        let missed = ContainerState::Created.after(&ended(ExitReason::Error, 9));
        assert_eq!(exit(&missed.unwrap()).started_at, 2);
    }
}
