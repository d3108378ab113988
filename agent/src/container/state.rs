// SPDX-License-Identifier: Apache-2.0
//! The life of a container as a state machine. Pure: no I/O, no clock, no lock.
//!
//! ```text
//! Created ──started──> Running ──exited──> Exited
//!     └────────────failed to start───────────^
//!
//! Running ──restored──> Restored ──started──> Running
//!                           └──exited──> Exited
//! ```
//!
//! `Restored` is after a checkpoint, in the VM that continues from it: the container has its process, which is frozen. To
//! the host it is created, until the host starts it.
//!
//! Times are of a clock that nobody sets. What the wall clock showed then is worked out when it is told.

use std::time::Instant;

/// Why a restored container could not be started.
const ENDED_FROZEN: &str = "the restored process was killed before it was started";

/// The state of a container. Only `Exited` has an exit code, and it always has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Created,
    Running { pid: i32, started_at: Instant },
    Restored { pid: i32 },
    Exited(Ended),
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// `None` if it never ran.
    pub started_at: Option<Instant>,
    pub finished_at: Instant,
    pub exit_code: i32,
    pub oom_killed: bool,
    /// Why it never ran.
    pub start_error: Option<String>,
}

#[derive(Clone, Debug)]
pub enum Event {
    Started {
        pid: i32,
        at: Instant,
    },
    FailedToStart {
        at: Instant,
        exit_code: i32,
        oom_killed: bool,
        message: String,
    },
    Exited {
        at: Instant,
        exit_code: i32,
        oom_killed: bool,
    },
    Restored,
}

/// An event or a request that is not possible in the present state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("container is {state}: {event} is not possible")]
pub struct IllegalMove {
    state: &'static str,
    event: &'static str,
}

impl State {
    /// The state after an event. An error if the event is not possible in this state.
    pub fn after(&self, event: Event) -> Result<Self, IllegalMove> {
        match (self, event) {
            (Self::Created, Event::Started { pid, at }) => Ok(Self::Running {
                pid,
                started_at: at,
            }),
            (Self::Restored { pid: frozen }, Event::Started { pid, at }) if *frozen == pid => {
                Ok(Self::Running {
                    pid,
                    started_at: at,
                })
            }
            (Self::Running { pid, .. }, Event::Restored) => Ok(Self::Restored { pid: *pid }),
            (
                Self::Created,
                Event::FailedToStart {
                    at,
                    exit_code,
                    oom_killed,
                    message,
                },
            ) => Ok(Self::Exited(Ended {
                started_at: None,
                finished_at: at,
                exit_code,
                oom_killed,
                start_error: Some(message),
            })),
            (
                Self::Running { started_at, .. },
                Event::Exited {
                    at,
                    exit_code,
                    oom_killed,
                },
            ) => Ok(Self::Exited(Ended {
                started_at: Some(*started_at),
                finished_at: at,
                exit_code,
                oom_killed,
                start_error: None,
            })),
            (
                Self::Restored { .. },
                Event::Exited {
                    at,
                    exit_code,
                    oom_killed,
                },
            ) => Ok(Self::Exited(Ended {
                started_at: None,
                finished_at: at,
                exit_code,
                oom_killed,
                start_error: Some(ENDED_FROZEN.to_owned()),
            })),
            (state, event) => Err(state.refuses(event.name())),
        }
    }

    /// The error for an event or a request that is not possible in this state.
    pub fn refuses(&self, event: &'static str) -> IllegalMove {
        IllegalMove {
            state: self.name(),
            event,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Restored { .. } => "created (restored)",
            Self::Running { .. } => "running",
            Self::Exited(_) => "exited",
        }
    }
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "start",
            Self::FailedToStart { .. } => "failed start",
            Self::Exited { .. } => "exit",
            Self::Restored => "restore",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Event, State};
    use std::time::Instant;

    #[test]
    fn only_the_moves_of_the_diagram_are_possible() {
        let at = Instant::now();
        let started = || Event::Started { pid: 7, at };
        let exited = || Event::Exited {
            at,
            exit_code: 3,
            oom_killed: false,
        };
        let failed = || Event::FailedToStart {
            at,
            exit_code: 127,
            oom_killed: false,
            message: "x".into(),
        };
        let running = State::Created.after(started()).unwrap();
        let restored = running.after(Event::Restored).unwrap();
        let ended = running.after(exited()).unwrap();
        let other = Event::Started { pid: 8, at };
        let table = [
            (&State::Created, started(), Some("running")),
            (&State::Created, failed(), Some("exited")),
            (&State::Created, exited(), None),
            (&running, exited(), Some("exited")),
            (&running, started(), None),
            (&running, failed(), None),
            (&ended, started(), None),
            (&ended, exited(), None),
            (&ended, failed(), None),
            (&running, Event::Restored, Some("created (restored)")),
            (&restored, started(), Some("running")),
            (&restored, other, None),
            (&restored, exited(), Some("exited")),
            (&restored, failed(), None),
            (&restored, Event::Restored, None),
            (&State::Created, Event::Restored, None),
            (&ended, Event::Restored, None),
        ];
        for (state, event, expected) in table {
            let name = format!("{} {}", state.name(), event.name());
            assert_eq!(
                state.after(event).ok().as_ref().map(State::name),
                expected,
                "{name}"
            );
        }
    }
    #[test]
    fn a_restored_container_runs_since_its_start_and_never_ran_if_it_ended_before() {
        let begin = Instant::now();
        let running = State::Running {
            pid: 7,
            started_at: begin,
        };
        let restored = running.after(Event::Restored).unwrap();
        assert_eq!(restored, State::Restored { pid: 7 });
        let at = begin + std::time::Duration::from_secs(60);
        let again = restored.after(Event::Started { pid: 7, at }).unwrap();
        assert_eq!(
            again,
            State::Running {
                pid: 7,
                started_at: at
            }
        );
        let killed = Event::Exited {
            at,
            exit_code: 137,
            oom_killed: true,
        };
        let State::Exited(ended) = restored.after(killed).unwrap() else {
            panic!("not ended");
        };
        assert_eq!((ended.started_at, ended.exit_code), (None, 137));
        assert!(ended.start_error.is_some());
    }
}
