// SPDX-License-Identifier: Apache-2.0
//! Events about pods and containers. A listener gets all of them, from the moment it listens, in order and without
//! gaps.
//!
//! Each listener has its own queue, so that a burst of events waits there until the listener has read it. The queue is
//! bounded by memory, not by the number of events. A listener that does not read is cut off when [`LIMIT_BYTES`] wait
//! for it: it still gets what is in its queue, without a gap, and then [`CutOff`]. Then it has to list pods and
//! containers, and listen again. [`Notices::tell`] never waits for a listener.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::life::record::ContainerRecord;
use super::view::View;

/// How many bytes may wait for one listener, as [`weight`] estimates them.
const LIMIT_BYTES: usize = 64 << 20;
const MAX_LISTENERS: usize = 64;
/// The size of a record without its strings, with the allocator's overhead.
const RECORD_BYTES: usize = 1024;

/// An event about a container or a pod. For a pod, `container_id` is the pod's own id.
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

/// Why another listener was refused.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_LISTENERS} clients already listen to events: end one of them first")]
pub struct TooManyListeners;

/// All listeners.
#[derive(Debug, Default)]
pub struct Notices(Mutex<Vec<Teller>>);

#[derive(Debug)]
struct Teller {
    sender: mpsc::UnboundedSender<Notice>,
    waiting: Arc<Mutex<usize>>,
}

/// One listener. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Listener {
    receiver: mpsc::UnboundedReceiver<Notice>,
    /// Bytes that wait in the queue.
    waiting: Arc<Mutex<usize>>,
}

/// The listener did not read its events.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{LIMIT_BYTES} bytes of events waited and were not read: list pods and containers, then listen again"
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

    /// Sends an event to all listeners. A listener whose queue is full is removed, so it gets no more events.
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
    /// Waits for the next notice. After [`CutOff`] no more come.
    pub async fn next(&mut self) -> Result<Notice, CutOff> {
        let notice = self.receiver.recv().await.ok_or(CutOff)?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        *waiting = waiting.saturating_sub(weight(&notice.view));
        Ok(notice)
    }
}

/// About how many bytes a view takes. Only fields that a pod's author can make large are counted.
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
