// SPDX-License-Identifier: Apache-2.0
//! News from the agent: the state of every container, now and whenever it changes.
//!
//! One task per guest. The stream is opened again when it breaks, until the VMM has ended; the agent then tells
//! all states anew, so nothing is missed.

use std::time::Duration;

use bulkhead_proto::agent::watch_event::Event;
use bulkhead_text::chain;
use tokio::sync::mpsc;

use crate::agent::{Agent, AgentError};
use crate::news::{Clock, News};
use crate::text::bounded;

/// Between attempts to open the stream again.
const RETRY: Duration = Duration::from_millis(500);

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
        let status = match message.and_then(|message| message.event) {
            Some(Event::Container(status)) => status,
            Some(Event::CaughtUp(_)) => continue,
            None => return Ok(()),
        };
        let Some(checked) = News::check(status, clock) else {
            tracing::warn!("the guest sent news that makes no sense; ignored");
            continue;
        };
        if news.send(checked).await.is_err() {
            return Ok(());
        }
    }
}
