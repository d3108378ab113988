// SPDX-License-Identifier: Apache-2.0
//! The life of a container as a state machine. Pure: no I/O, no clock, no lock.
//!
//! ```text
//! Created ──started──> Running ──exited──> Exited
//!     └────────────failed to start───────────^
//! ```
//!
//! Times are of a clock that nobody sets. What the wall clock showed then is worked out when it is told.

use std::time::Instant;

/// The state of a container. Only `Exited` has an exit code, and it always has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Created,
    Running { pid: i32, started_at: Instant },
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
        let ended = running.after(exited()).unwrap();
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
}
