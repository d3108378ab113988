// SPDX-License-Identifier: Apache-2.0
//! Receives news from the agent: the state of every container, at first and whenever it changes.
//!
//! There is one task for each guest. When the stream breaks, it is opened again, until the VMM has ended. The agent
//! then sends all states again, so nothing is missed.

use std::time::Duration;

use bulkhead_proto::agent::watch_event::Event;
use bulkhead_text::chain;
use tokio::sync::mpsc;

use crate::agent::{Agent, AgentError};
use crate::news::{Clock, News};
use crate::text::bounded;

/// The pause between attempts to open the stream again.
const RETRY: Duration = Duration::from_millis(500);

/// Receives news of a guest and sends it to `news`, until the VMM has `ended` or the receiver was dropped. `clock` is
/// used to check the guest's times.
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

/// Reads one stream of news until it ends.
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
            tracing::warn!("the guest sent news that is not valid; ignored");
            continue;
        };
        if news.send(checked).await.is_err() {
            return Ok(());
        }
    }
}
