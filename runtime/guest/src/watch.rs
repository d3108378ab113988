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
use crate::pace::Pace;
use crate::remarks::Remarks;
use crate::text::bounded;

/// The pause between attempts to open the stream again.
const RETRY: Duration = Duration::from_millis(500);
/// How much news a guest may send in a second. A pod has some containers, and each has a few states in its life.
const NEWS_PER_SECOND: u64 = 20;
/// How much news may come at once: the states of all containers of a large pod, several times.
const NEWS_BURST: u64 = 1000;
/// After so much news without a break above the rate, a guest is cut off.
const MOST_EXCESS: u32 = 1000;
/// For how long it is cut off then.
const CUT_OFF: Duration = Duration::from_secs(30);

/// Receives news of a guest and sends it to `news`, until the VMM has `ended` or the receiver was dropped. `clock` is
/// used to check the guest's times.
pub async fn watch(
    agent: Agent,
    remarks: Remarks,
    ended: impl Future<Output = ()>,
    clock: Clock,
    news: mpsc::Sender<News>,
) {
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut ended => return,
            () = news.closed() => return,
            result = pump(&agent, &remarks, clock, &news) => {
                match result {
                    Ok(After::End) => {}
                    Ok(After::Excess) => {
                        remarks.warn(format_args!("the guest floods the daemon with news; none is taken from it for {CUT_OFF:?}"));
                        tokio::time::sleep(CUT_OFF).await;
                    }
                    Err(error) => tracing::debug!("watch: {}", chain(&error)),
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// How much came on one stream of news. Anything counts, also what says nothing.
#[derive(Debug)]
struct Flow {
    pace: Pace,
    excess: u32,
}

impl Flow {
    fn new() -> Self {
        Self {
            pace: Pace::new(NEWS_PER_SECOND, NEWS_BURST),
            excess: 0,
        }
    }

    /// Counts a message. Returns how long to wait before the next one is taken, or `None` if there was too much.
    fn take(&mut self) -> Option<Duration> {
        let pause = self.pace.take(1);
        self.excess = if pause.is_zero() { 0 } else { self.excess + 1 };
        (self.excess <= MOST_EXCESS).then_some(pause)
    }
}

/// How a stream of news ended.
enum After {
    End,
    /// There was too much of it.
    Excess,
}

/// Reads one stream of news until it ends.
async fn pump(
    agent: &Agent,
    remarks: &Remarks,
    clock: Clock,
    news: &mpsc::Sender<News>,
) -> Result<After, AgentError> {
    let mut stream = agent.watch().await?;
    let mut flow = Flow::new();
    loop {
        let message = stream.message().await.map_err(|status| AgentError::Lost {
            call: "Watch",
            message: bounded(status.message()),
        })?;
        let Some(event) = message.and_then(|message| message.event) else {
            return Ok(After::End);
        };
        let Some(pause) = flow.take() else {
            return Ok(After::Excess);
        };
        tokio::time::sleep(pause).await;
        let Event::Container(status) = event else {
            continue;
        };
        let Some(checked) = News::check(status, clock) else {
            remarks.warn("the guest sent news that is not valid; ignored");
            continue;
        };
        if news.send(checked).await.is_err() {
            return Ok(After::End);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_what_goes_on_above_the_rate_is_cut_off() {
        let mut flow = Flow::new();
        for _ in 0..NEWS_BURST {
            assert_eq!(flow.take(), Some(Duration::ZERO));
        }
        // Some are free again if this test is slow.
        let more = (0..3 * u64::from(MOST_EXCESS)).take_while(|_| flow.take().is_some());
        let more = more.count() as u64;
        let most = u64::from(MOST_EXCESS);
        assert!((most..most + NEWS_PER_SECOND).contains(&more), "{more}");
    }
}
