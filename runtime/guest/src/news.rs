// SPDX-License-Identifier: Apache-2.0
//! Checks what a guest reports about one of its containers: news from the watch, and the answer to a start.

use bulkhead_proto::agent::{self as protocol, START_ERROR, container_status::State};

use crate::exit::{Exit, ExitReason};
use crate::text::bounded;
use crate::user::ProcessUser;

/// The length of a container's id, which is 64 hex digits.
const ID_BYTES: usize = 64;

/// A function that returns the time, in nanoseconds since 1970.
pub type Clock = fn() -> i64;

/// The state of a container, as the guest reported it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    pub id: String,
    /// The user that its process runs as. Known once it has started.
    pub user: Option<ProcessUser>,
    pub state: Told,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Created,
    Running { pid: u32, started_at: i64 },
    Exited(Exit),
}

impl News {
    /// Checks a guest's report. `None` if it is not valid.
    ///
    /// Its times become those of `clock`, the host's: the guest says how long ago something was, by a clock that nobody
    /// sets. So they hold whatever the guest's own clock shows, and what lies between them is what has passed. The
    /// agent of an earlier version tells times of its clock; those in the future are replaced by the time now.
    pub fn check(status: protocol::ContainerStatus, clock: Clock) -> Option<Self> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if status.id.len() != ID_BYTES || !status.id.bytes().all(hex) {
            return None;
        }
        let now = clock();
        let time = |ago: Option<u64>, told: i64| match ago {
            Some(ago) => now.saturating_sub_unsigned(ago).max(0),
            None => told.clamp(0, now),
        };
        let started_at = time(
            status.started_ago_nanoseconds,
            status.started_at_unix_nanoseconds,
        );
        let state = match State::try_from(status.state).ok()? {
            State::Created => Told::Created,
            State::Running => Told::Running {
                pid: status.pid,
                started_at,
            },
            State::Exited => {
                let code = Some(status.exit_code).filter(|code| (0..=255).contains(code))?;
                let message = bounded(&status.message);
                let finished_at = time(
                    status.finished_ago_nanoseconds,
                    status.finished_at_unix_nanoseconds,
                );
                Told::Exited(match status.reason == START_ERROR {
                    true => Exit::not_started(message, finished_at),
                    false => Exit {
                        code,
                        reason: ExitReason::of(code, status.oom_killed),
                        message,
                        started_at,
                        finished_at,
                    },
                })
            }
        };
        Some(Self {
            id: status.id,
            user: status.identity.map(ProcessUser::from),
            state,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_700_000_000_000_000_000;

    fn news(change: impl FnOnce(&mut protocol::ContainerStatus)) -> Option<News> {
        let mut status = protocol::ContainerStatus {
            id: "ab".repeat(32),
            state: State::Exited.into(),
            exit_code: 3,
            finished_at_unix_nanoseconds: i64::MAX,
            started_at_unix_nanoseconds: -5,
            ..Default::default()
        };
        change(&mut status);
        News::check(status, || NOW)
    }

    fn exit(change: impl FnOnce(&mut protocol::ContainerStatus)) -> Exit {
        match news(change).unwrap().state {
            Told::Exited(exit) => exit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn news_that_makes_no_sense_is_dropped() {
        assert_eq!(news(|s| s.id = "../../etc".into()), None);
        assert_eq!(news(|s| s.id = "AB".repeat(32)), None);
        assert_eq!(news(|s| s.exit_code = 256), None);
        assert_eq!(news(|s| s.exit_code = -1), None);
        assert_eq!(news(|s| s.state = 77), None);
    }

    #[test]
    fn times_of_the_guest_are_kept_in_the_past() {
        let exit = exit(|_| ());
        assert_eq!((exit.started_at, exit.finished_at), (0, NOW));
        let exit = self::exit(|s| s.finished_ago_nanoseconds = Some(u64::MAX));
        assert_eq!(exit.finished_at, 0);
    }

    #[test]
    fn times_are_the_hosts_whatever_the_guests_clock_shows() {
        let exit = exit(|s| {
            s.started_at_unix_nanoseconds = 77;
            s.started_ago_nanoseconds = Some(500);
            s.finished_ago_nanoseconds = Some(20);
        });
        assert_eq!((exit.started_at, exit.finished_at), (NOW - 500, NOW - 20));
    }

    #[test]
    fn a_program_that_could_not_be_executed_is_told_from_one_that_ended() {
        assert_eq!(exit(|_| ()).reason, ExitReason::Error);
        let failed = exit(|s| s.reason = START_ERROR.into());
        assert_eq!((failed.code, failed.reason), (128, ExitReason::StartError));
    }
}
