// SPDX-License-Identifier: Apache-2.0
//! News from the agent: the state of every container, now and whenever it changes.
//!
//! One task per guest. The stream is opened again when it breaks, until the VMM has ended; the agent then tells
//! all states anew, so nothing is missed.

use std::time::Duration;

use bulkhead_proto::agent::{self as protocol, container_status::State, watch_event::Event};
use bulkhead_text::chain;
use tokio::sync::mpsc;

use crate::agent::{Agent, AgentError, bounded};
use crate::user::ProcessUser;

/// Between attempts to open the stream again.
const RETRY: Duration = Duration::from_millis(500);
/// A container id that is ours has 64 hex digits.
const ID_BYTES: usize = 64;

/// A checked piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing runs yet; the daemon knows.
    Created,
    Running {
        id: String,
        pid: u32,
        started_at: i64,
        user: Option<ProcessUser>,
    },
    Exited {
        id: String,
        code: i32,
        oom_killed: bool,
        start_failed: bool,
        message: String,
        started_at: i64,
        finished_at: i64,
        user: Option<ProcessUser>,
    },
    /// All states of before have been told.
    CaughtUp,
}

/// What is the time, in nanoseconds since 1970.
pub type Clock = fn() -> i64;

/// Sends news of the guest behind `agent` until the VMM has `ended` or nobody listens. By the daemon's `clock` nothing
/// that the guest tells has happened in the future.
pub async fn watch(
    agent: Agent,
    ended: impl Future<Output = ()>,
    clock: Clock,
    news: mpsc::Sender<News>,
) {
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut ended => return,
            () = news.closed() => return,
            result = pump(&agent, clock, &news) => {
                if let Err(error) = result {
                    tracing::debug!("watch: {}", chain(&error));
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn pump(agent: &Agent, clock: Clock, news: &mpsc::Sender<News>) -> Result<(), AgentError> {
    let mut stream = agent.watch().await?;
    loop {
        let message = stream.message().await.map_err(|status| AgentError::Lost {
            call: "Watch",
            message: bounded(status.message()),
        })?;
        let Some(event) = message.and_then(|message| message.event) else {
            return Ok(());
        };
        let Some(checked) = check(event, clock()) else {
            tracing::warn!("the guest sent news that makes no sense; ignored");
            continue;
        };
        if news.send(checked).await.is_err() {
            return Ok(());
        }
    }
}

/// Checks what the guest said by `now`. `None`: it makes no sense, or is no news.
fn check(event: Event, now: i64) -> Option<News> {
    let status: protocol::ContainerStatus = match event {
        Event::CaughtUp(_) => return Some(News::CaughtUp),
        Event::Container(status) => status,
    };
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if status.id.len() != ID_BYTES || !status.id.bytes().all(hex) {
        return None;
    }
    let user = status.identity.map(ProcessUser::from);
    let past = |time: i64| time.clamp(0, now);
    match State::try_from(status.state).ok()? {
        State::Created => Some(News::Created),
        State::Running => Some(News::Running {
            started_at: past(status.started_at_unix_nanoseconds),
            pid: status.pid,
            id: status.id,
            user,
        }),
        State::Exited => Some(News::Exited {
            code: Some(status.exit_code).filter(|code| (0..=255).contains(code))?,
            oom_killed: status.oom_killed,
            start_failed: status.reason == protocol::START_ERROR,
            message: bounded(&status.message),
            started_at: past(status.started_at_unix_nanoseconds),
            finished_at: past(status.finished_at_unix_nanoseconds),
            id: status.id,
            user,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000_000_000;

    fn status(change: impl FnOnce(&mut protocol::ContainerStatus)) -> Option<News> {
        let mut status = protocol::ContainerStatus {
            id: "ab".repeat(32),
            state: State::Exited.into(),
            exit_code: 3,
            finished_at_unix_nanoseconds: i64::MAX,
            started_at_unix_nanoseconds: -5,
            ..Default::default()
        };
        change(&mut status);
        check(Event::Container(status), NOW)
    }

    #[test]
    fn news_that_makes_no_sense_is_dropped() {
        assert_eq!(status(|s| s.id = "../../etc".into()), None);
        assert_eq!(status(|s| s.id = "AB".repeat(32)), None);
        assert_eq!(status(|s| s.exit_code = 256), None);
        assert_eq!(status(|s| s.exit_code = -1), None);
        assert_eq!(status(|s| s.state = 77), None);
    }

    #[test]
    fn times_of_the_guest_are_kept_in_the_past() {
        let Some(News::Exited {
            started_at,
            finished_at,
            ..
        }) = status(|_| ())
        else {
            panic!("must be an exit");
        };
        assert_eq!((started_at, finished_at), (0, NOW));
    }
}
