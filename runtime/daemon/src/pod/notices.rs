// SPDX-License-Identifier: Apache-2.0
//! What listeners hear of pods and containers: everything from the moment they listen, in order, without gaps.
//!
//! Each listener has a queue of its own, as long as it must be: a burst of events waits there until the listener has
//! read it. A queue is bounded by memory, not by number: a listener that does not read is cut off when what waits
//! for it weighs [`LIMIT_BYTES`], hears so after what it has missed nothing of, and lists anew. Telling never waits.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::life::record::ContainerRecord;
use super::view::View;

/// What may wait for one listener, as [`weight`] estimates it.
const LIMIT_BYTES: usize = 64 << 20;
const MAX_LISTENERS: usize = 64;
/// A record without its strings, and what the allocator adds.
const RECORD_BYTES: usize = 1024;

/// A change of a container, or of a pod as its own container, that listeners hear of.
#[derive(Clone, Debug)]
pub struct Notice {
    pub kind: NoticeKind,
    pub container_id: String,
    pub at: i64,
    pub view: Arc<View>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticeKind {
    Created,
    Started,
    Stopped,
    Deleted,
}

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_LISTENERS} clients listen to events already: end one of them first")]
pub struct TooManyListeners;

/// All who listen.
#[derive(Debug, Default)]
pub struct Notices(Mutex<Vec<Teller>>);

#[derive(Debug)]
struct Teller {
    sender: mpsc::UnboundedSender<Notice>,
    waiting: Arc<Mutex<usize>>,
}

/// One who listens. Dropped, it does not any more.
#[derive(Debug)]
pub struct Listener {
    receiver: mpsc::UnboundedReceiver<Notice>,
    /// Bytes that wait in the queue.
    waiting: Arc<Mutex<usize>>,
}

/// The listener did not read what it was told.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "events were not read until {LIMIT_BYTES} bytes of them waited: list pods and containers, and listen anew"
)]
pub struct CutOff;

impl Notices {
    pub fn listen(&self) -> Result<Listener, TooManyListeners> {
        let mut tellers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tellers.retain(|teller| !teller.sender.is_closed());
        if tellers.len() >= MAX_LISTENERS {
            return Err(TooManyListeners);
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        let waiting = Arc::new(Mutex::new(0));
        tellers.push(Teller {
            sender,
            waiting: Arc::clone(&waiting),
        });
        Ok(Listener { receiver, waiting })
    }

    /// Tells everyone. Those whose queue is too heavy hear no more after this.
    pub fn tell(&self, notice: &Notice) {
        let mut tellers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tellers.is_empty() {
            return;
        }
        let weight = weight(&notice.view);
        tellers.retain(|teller| {
            let mut waiting = teller
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if *waiting + weight > LIMIT_BYTES {
                return false;
            }
            *waiting += weight;
            teller.sender.send(notice.clone()).is_ok()
        });
    }
}

impl Listener {
    /// The next notice, waited for. After [`CutOff`] there is nothing more.
    pub async fn next(&mut self) -> Result<Notice, CutOff> {
        let notice = self.receiver.recv().await.ok_or(CutOff)?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        *waiting = waiting.saturating_sub(weight(&notice.view));
        Ok(notice)
    }
}

/// Bytes that a view takes, about: what a pod's author can make large is counted.
fn weight(view: &View) -> usize {
    let spec = &view.pod.spec;
    let pairs = spec
        .labels
        .iter()
        .chain(&spec.annotations)
        .chain(&spec.sysctls);
    let pod: usize = pairs.map(|(name, value)| name.len() + value.len()).sum();
    let containers: usize = view.containers.values().map(container_weight).sum();
    RECORD_BYTES + pod + containers
}

fn container_weight(container: &ContainerRecord) -> usize {
    let spec = &container.spec;
    let pairs = spec.labels.iter().chain(&spec.annotations);
    let pairs: usize = pairs.map(|(name, value)| name.len() + value.len()).sum();
    let variables = spec.environment.iter();
    let variables: usize = variables
        .map(|(name, value)| name.len() + value.len())
        .sum();
    let words = spec.command.iter().chain(&spec.args);
    let words: usize = words.map(String::len).sum();
    let profile = match &spec.security.seccomp {
        super::life::spec::Seccomp::Profile(text) => text.len(),
        _ => 0,
    };
    RECORD_BYTES + pairs + variables + words + profile
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::pod::fixtures;
    use crate::pod::life::record::PodRecord;

    fn view(annotation_bytes: usize) -> Arc<View> {
        let mut spec = fixtures::pod_spec();
        spec.annotations
            .insert("large".into(), "x".repeat(annotation_bytes));
        Arc::new(View {
            pod: PodRecord {
                spec,
                ..fixtures::pod_record()
            },
            containers: BTreeMap::new(),
            guest: None,
        })
    }

    fn notice(number: i64, view: &Arc<View>) -> Notice {
        Notice {
            kind: NoticeKind::Created,
            container_id: String::new(),
            at: number,
            view: Arc::clone(view),
        }
    }

    #[tokio::test]
    async fn a_slow_listener_misses_nothing_of_a_burst_and_another_does_not_wait_for_it() {
        let notices = Notices::default();
        let mut slow = notices.listen().unwrap();
        let mut fast = notices.listen().unwrap();
        let view = view(100);
        for number in 0..5000 {
            notices.tell(&notice(number, &view));
            assert_eq!(fast.next().await.unwrap().at, number);
        }
        for number in 0..5000 {
            assert_eq!(slow.next().await.unwrap().at, number);
        }
        assert_eq!(*slow.waiting.lock().unwrap(), 0);
    }

    #[tokio::test]
    async fn a_listener_that_never_reads_is_cut_off_and_told_after_the_rest() {
        let notices = Notices::default();
        let mut listener = notices.listen().unwrap();
        let view = view(1 << 20);
        for number in 0..100 {
            notices.tell(&notice(number, &view));
        }
        let mut heard = 0;
        while let Ok(notice) = listener.next().await {
            assert_eq!(notice.at, heard);
            heard += 1;
        }
        assert!((60..64).contains(&heard), "{heard}");
        assert_eq!(listener.next().await.unwrap_err(), CutOff);
    }

    #[test]
    fn listeners_are_bounded_and_those_who_left_do_not_count() {
        let notices = Notices::default();
        let listeners: Vec<_> = (0..MAX_LISTENERS)
            .map(|_| notices.listen().unwrap())
            .collect();
        assert!(notices.listen().is_err());
        drop(listeners);
        assert!(notices.listen().is_ok());
    }
}
