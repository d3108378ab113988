// SPDX-License-Identifier: Apache-2.0
//! Which pulls and downloads run at the same time.
//!
//! There are places per pull and per host, and none that all hosts share: three slow layers would otherwise keep
//! everybody from pulling. What all pulls together may take is bounded by their number.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The most pulls at the same time. A pull has a few threads of those that may block, of which tokio has 512; the calls
/// about pods need some, too. kubelet pulls one image at a time unless it is told otherwise.
pub const MAX_PULLS: usize = 64;

/// The places of all hosts and pulls.
#[derive(Debug)]
pub struct Turns {
    per_host: usize,
    per_pull: usize,
    hosts: Mutex<HashMap<String, Weak<Semaphore>>>,
    pulls: Arc<Semaphore>,
}

/// The places of one pull.
#[derive(Debug)]
pub struct PullTurns {
    host: Arc<Semaphore>,
    pull: Arc<Semaphore>,
    _pull: OwnedSemaphorePermit,
}

/// A place for one download, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    _pull: OwnedSemaphorePermit,
    _host: OwnedSemaphorePermit,
}

impl Turns {
    pub fn new(per_host: usize, per_pull: usize) -> Self {
        Self {
            per_host: per_host.max(1),
            per_pull: per_pull.max(1),
            hosts: Mutex::default(),
            pulls: Arc::new(Semaphore::new(MAX_PULLS)),
        }
    }

    /// The places of a pull from `host`. `None` if too many pulls are running.
    pub fn pull(&self, host: &str) -> Option<PullTurns> {
        let pull = Arc::clone(&self.pulls).try_acquire_owned().ok()?;
        Some(PullTurns {
            host: self.host(host),
            pull: Arc::new(Semaphore::new(self.per_pull)),
            _pull: pull,
        })
    }

    fn host(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|_, places| places.strong_count() > 0);
        if let Some(places) = hosts.get(host).and_then(Weak::upgrade) {
            return places;
        }
        let places = Arc::new(Semaphore::new(self.per_host));
        hosts.insert(host.to_owned(), Arc::downgrade(&places));
        places
    }
}

impl PullTurns {
    /// Waits for a place of the pull, then for one of the host. `None` never happens: no semaphore is closed.
    pub async fn next(&self) -> Option<Turn> {
        let pull = Arc::clone(&self.pull).acquire_owned().await.ok()?;
        let host = Arc::clone(&self.host).acquire_owned().await.ok()?;
        Some(Turn {
            _pull: pull,
            _host: host,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn is_free(pull: &PullTurns) -> bool {
        let moment = Duration::from_millis(10);
        let turn = tokio::time::timeout(moment, pull.next()).await;
        turn.is_ok()
    }

    #[tokio::test]
    async fn a_slow_host_takes_no_places_of_others() {
        let turns = Turns::new(3, 2);
        let slow: Vec<_> = (0..2).map(|_| turns.pull("slow").unwrap()).collect();
        let mut held = Vec::new();
        for pull in [&slow[0], &slow[0], &slow[1]] {
            held.push(pull.next().await);
        }
        assert!(!is_free(&slow[0]).await, "a third one of one pull");
        assert!(!is_free(&slow[1]).await, "a fourth one of one host");
        assert!(is_free(&turns.pull("other").unwrap()).await);
        held.clear();
        assert!(is_free(&slow[1]).await);
    }

    #[tokio::test]
    async fn pulls_beyond_the_most_are_refused_until_one_ends() {
        let turns = Turns::new(1, 1);
        let mut running: Vec<_> = (0..MAX_PULLS).map(|_| turns.pull("a")).collect();
        assert!(running.iter().all(Option::is_some));
        assert!(turns.pull("b").is_none());
        running.pop();
        assert!(turns.pull("b").is_some());
        drop(running);
        assert!(turns.host("c").available_permits() == 1);
        assert_eq!(turns.hosts.lock().unwrap().len(), 1);
    }
}
