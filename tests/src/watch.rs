// SPDX-License-Identifier: Apache-2.0
//! A watch over a daemon while somebody does his worst: how long other clients wait, how much memory and how many
//! descriptors the daemon takes.

use std::fmt;
use std::time::{Duration, Instant};

use bulkhead_proto::cri::VersionRequest;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::daemon::{Daemon, DaemonProcess};

/// The pause between two calls of a client.
const PAUSE: Duration = Duration::from_millis(20);
/// The pause between two commands in the neighbour's container. Each costs the emulated host's only CPU a tenth of a
/// second.
const EXEC_PAUSE: Duration = Duration::from_millis(500);

/// What must hold while others do their worst. The emulated host has one CPU, which attackers and daemon share.
const LONGEST_ANSWER: Duration = Duration::from_secs(5);
const LONGEST_EXEC: Duration = Duration::from_secs(20);
const MOST_MEMORY_BYTES: u64 = 400 << 20;
const MOST_DESCRIPTORS: usize = 200;

/// A running watch.
#[derive(Debug)]
pub struct Watch {
    end: watch::Sender<bool>,
    versions: JoinHandle<Seen>,
    execs: Option<JoinHandle<Times>>,
}

impl Watch {
    /// Begins to watch. With a `neighbour`, commands in this container are measured too.
    pub async fn over(daemon: &Daemon, neighbour: Option<&str>) -> Self {
        let (end, ended) = watch::channel(false);
        let execs = match neighbour {
            Some(id) => {
                let execs = execs(daemon.client().await, id.to_owned(), ended.clone());
                Some(tokio::spawn(execs))
            }
            None => None,
        };
        let versions = versions(daemon.client().await, daemon.process(), ended);
        Self {
            end,
            versions: tokio::spawn(versions),
            execs,
        }
    }

    /// Ends the watch. Returns what it saw.
    pub async fn end(self) -> Seen {
        self.end.send_replace(true);
        let mut seen = self.versions.await.expect("the version every time");
        if let Some(execs) = self.execs {
            seen.execs = execs.await.expect("an answer of the neighbour every time");
        }
        seen
    }
}

/// Asks for the version again and again.
async fn versions(mut client: Client, process: DaemonProcess, end: watch::Receiver<bool>) -> Seen {
    let mut seen = Seen::default();
    while !*end.borrow() {
        let asked = Instant::now();
        let request = VersionRequest::default();
        client.runtime.version(request).await.expect("version");
        seen.versions.add(asked.elapsed());
        seen.memory_bytes = seen.memory_bytes.max(process.memory_bytes());
        seen.descriptors = seen.descriptors.max(process.descriptors());
        tokio::time::sleep(PAUSE).await;
    }
    seen
}

/// Runs a command in a container again and again.
async fn execs(mut client: Client, id: String, end: watch::Receiver<bool>) -> Times {
    let mut times = Times::default();
    while !*end.borrow() {
        let asked = Instant::now();
        let answer = client.exec(&id, &["true"], 0).await.expect("exec");
        assert_eq!(answer.exit_code, 0);
        times.add(asked.elapsed());
        tokio::time::sleep(EXEC_PAUSE).await;
    }
    times
}

/// How long calls took.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    fn add(&mut self, time: Duration) {
        self.0.push(time);
        self.0.sort();
    }

    /// The time within which so many per cent of the calls were answered; 100 is the longest.
    pub fn at(&self, percent: usize) -> Duration {
        let last = self.0.len().saturating_sub(1);
        self.0
            .get(last * percent / 100)
            .copied()
            .unwrap_or_default()
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, longest] = [50, 99, 100].map(|percent| self.at(percent).as_secs_f64() * 1e3);
        let calls = self.0.len();
        write!(
            f,
            "{calls:4} calls: p50 {p50:6.1} ms, p99 {p99:6.1} ms, longest {longest:6.1} ms"
        )
    }
}

/// What a watch has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub versions: Times,
    pub execs: Times,
    pub memory_bytes: u64,
    pub descriptors: usize,
}

impl Seen {
    /// Whether nobody had to wait too long and the daemon stayed within its bounds.
    pub fn is_bounded(&self) -> bool {
        self.versions.at(100) < LONGEST_ANSWER
            && self.execs.at(100) < LONGEST_EXEC
            && self.memory_bytes < MOST_MEMORY_BYTES
            && self.descriptors < MOST_DESCRIPTORS
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            versions,
            execs,
            memory_bytes,
            descriptors,
        } = self;
        let memory = memory_bytes >> 20;
        write!(
            f,
            "version {versions}; {memory} MiB, {descriptors} descriptors"
        )?;
        if execs.0.is_empty() {
            return Ok(());
        }
        write!(f, "; exec {execs}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_by_their_share() {
        let mut times = Times::default();
        for milliseconds in (1..=200).rev() {
            times.add(Duration::from_millis(milliseconds));
        }
        let at = |percent| times.at(percent).as_millis();
        assert_eq!((at(50), at(99), at(100)), (100, 198, 200));
        assert_eq!(Times::default().at(100), Duration::ZERO);
    }
}
