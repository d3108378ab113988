// SPDX-License-Identifier: Apache-2.0
//! The pods and containers of one delegate, as they are known here: what it listed last, and what was done since.
//!
//! The roll is pure data. [`super::inventory`] keeps it up to date.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use bulkhead_proto::cri;
use tokio::time::{Duration, Instant};

use super::kept::OfSocket;
use crate::cri::Found;

/// How long a change is remembered: longer than any list takes.
const REMEMBERED: Duration = Duration::from_secs(60);
/// The shortest prefix of an id that is accepted instead of the whole id, as for Bulkhead's own.
const ID_PREFIX: usize = 4;
/// How many pods, and how many containers, are kept.
const MOST: usize = 10_000;

/// What a delegate has.
#[derive(Debug, Default)]
pub struct Roll {
    pods: BTreeMap<String, cri::PodSandbox>,
    containers: BTreeMap<String, cri::Container>,
    /// The handlers that kubelet sent, by the pod's id.
    handlers: HashMap<String, String>,
    /// What was done in the last minute. A list that began earlier may not have it.
    changes: Vec<(Instant, Change)>,
}

/// What a delegate was asked to do, and did.
#[derive(Clone, Debug)]
pub enum Change {
    /// With the handler that kubelet sent.
    Ran(cri::PodSandbox, String),
    PodStopped(String),
    PodRemoved(String),
    Created(cri::Container),
    Started(String),
    Stopped(String),
    Removed(String),
}

/// What is kept on disk.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Saved {
    /// The delegate's socket.
    #[prost(string, tag = "1")]
    pub socket: String,
    #[prost(message, repeated, tag = "2")]
    pub pods: Vec<cri::PodSandbox>,
    #[prost(message, repeated, tag = "3")]
    pub containers: Vec<cri::Container>,
    #[prost(map = "string, string", tag = "4")]
    pub handlers: HashMap<String, String>,
}

impl OfSocket for Saved {
    fn socket(&self) -> &str {
        &self.socket
    }
}

impl Roll {
    pub fn pods(&self) -> impl Iterator<Item = &cri::PodSandbox> {
        self.pods.values()
    }

    pub fn containers(&self) -> impl Iterator<Item = &cri::Container> {
        self.containers.values()
    }

    /// The handler that kubelet sent for a pod, if it came through here.
    pub fn handler(&self, pod: &str) -> Option<&str> {
        self.handlers.get(pod).map(String::as_str)
    }

    pub fn find_pod(&self, id: &str) -> Found {
        find(&self.pods, id)
    }

    pub fn find_container(&self, id: &str) -> Found {
        find(&self.containers, id)
    }

    /// Takes over a list that began at `began`. Returns whether anything is different now.
    pub fn list_pods(&mut self, began: Instant, pods: Vec<cri::PodSandbox>) -> bool {
        let listed = by_id(pods, |pod| &pod.id);
        let before = std::mem::replace(&mut self.pods, listed);
        self.repeat_changes(began);
        let pods = &self.pods;
        self.handlers.retain(|id, _| pods.contains_key(id));
        before != self.pods
    }

    /// The same for containers.
    pub fn list_containers(&mut self, began: Instant, containers: Vec<cri::Container>) -> bool {
        let listed = by_id(containers, |container| &container.id);
        let before = std::mem::replace(&mut self.containers, listed);
        self.repeat_changes(began);
        before != self.containers
    }

    /// Notes what has just been done.
    pub fn note(&mut self, change: Change) {
        self.apply(&change);
        self.changes.push((Instant::now(), change));
    }

    fn repeat_changes(&mut self, began: Instant) {
        let mut changes = std::mem::take(&mut self.changes);
        for (_, change) in changes.iter().filter(|(at, _)| *at >= began) {
            self.apply(change);
        }
        changes.retain(|(at, _)| at.elapsed() < REMEMBERED);
        self.changes = changes;
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Ran(pod, sent) => {
                self.pods.entry(pod.id.clone()).or_insert(pod.clone());
                self.handlers.insert(pod.id.clone(), sent.clone());
            }
            Change::PodStopped(id) => {
                if let Some(pod) = self.pods.get_mut(id) {
                    pod.state = cri::PodSandboxState::SandboxNotready.into();
                }
                let of_pod = |one: &&mut cri::Container| one.pod_sandbox_id == *id;
                for container in self.containers.values_mut().filter(of_pod) {
                    container.state = cri::ContainerState::ContainerExited.into();
                }
            }
            Change::PodRemoved(id) => {
                self.pods.remove(id);
                self.handlers.remove(id);
                self.containers.retain(|_, one| one.pod_sandbox_id != *id);
            }
            Change::Created(container) => {
                let id = container.id.clone();
                self.containers.entry(id).or_insert(container.clone());
            }
            Change::Started(id) => {
                // It may have ended since.
                if let Some(one) = self.containers.get_mut(id)
                    && one.state() == cri::ContainerState::ContainerCreated
                {
                    one.state = cri::ContainerState::ContainerRunning.into();
                }
            }
            Change::Stopped(id) => {
                if let Some(one) = self.containers.get_mut(id) {
                    one.state = cri::ContainerState::ContainerExited.into();
                }
            }
            Change::Removed(id) => {
                self.containers.remove(id);
            }
        }
    }

    pub fn save(&self, socket: String) -> Saved {
        Saved {
            socket,
            pods: self.pods.values().cloned().collect(),
            containers: self.containers.values().cloned().collect(),
            handlers: self.handlers.clone(),
        }
    }

    pub fn restore(saved: Saved) -> Self {
        Self {
            pods: by_id(saved.pods, |pod| &pod.id),
            containers: by_id(saved.containers, |container| &container.id),
            handlers: saved.handlers,
            changes: Vec::new(),
        }
    }
}

fn by_id<T>(items: Vec<T>, id: impl Fn(&T) -> &str) -> BTreeMap<String, T> {
    let items = items.into_iter().take(MOST);
    items.map(|item| (id(&item).to_owned(), item)).collect()
}

fn find<T>(known: &BTreeMap<String, T>, id: &str) -> Found {
    let from = (Bound::Included(id), Bound::Unbounded);
    match known.range::<str, _>(from).next() {
        Some((found, _)) if found == id => Found::Whole,
        Some((found, _)) if id.len() >= ID_PREFIX && found.starts_with(id) => Found::Beginning,
        _ => Found::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str) -> cri::PodSandbox {
        cri::PodSandbox {
            id: id.into(),
            ..Default::default()
        }
    }

    fn container(id: &str, pod: &str) -> cri::Container {
        cri::Container {
            id: id.into(),
            pod_sandbox_id: pod.into(),
            ..Default::default()
        }
    }

    fn pods(roll: &Roll) -> Vec<&str> {
        roll.pods().map(|pod| pod.id.as_str()).collect()
    }

    #[test]
    fn a_list_that_began_before_a_change_does_not_undo_it() {
        let mut roll = Roll::default();
        let began = Instant::now();
        roll.note(Change::Ran(pod("new"), "sent".into()));
        roll.note(Change::PodRemoved("old".into()));
        assert!(!roll.list_pods(began, vec![pod("old")]), "nothing new");
        assert_eq!(pods(&roll), ["new"]);
        assert_eq!(roll.handler("new"), Some("sent"));
        assert!(roll.list_pods(Instant::now(), vec![pod("old")]));
        assert_eq!(pods(&roll), ["old"]);
        assert_eq!(roll.handler("new"), None);
    }

    #[test]
    fn what_was_done_is_known_before_the_next_list() {
        let mut roll = Roll::default();
        roll.list_pods(Instant::now(), vec![pod("p")]);
        roll.note(Change::Created(container("c", "p")));
        let state = |roll: &Roll| roll.containers().next().map(cri::Container::state);
        for (change, expected) in [
            (
                Change::Started("c".into()),
                cri::ContainerState::ContainerRunning,
            ),
            (
                Change::Stopped("c".into()),
                cri::ContainerState::ContainerExited,
            ),
            (
                Change::Started("c".into()),
                cri::ContainerState::ContainerExited,
            ),
        ] {
            roll.note(change);
            assert_eq!(state(&roll), Some(expected));
        }
        roll.note(Change::PodStopped("p".into()));
        let shown = roll.pods().next().unwrap();
        assert_eq!(shown.state(), cri::PodSandboxState::SandboxNotready);
        roll.note(Change::PodRemoved("p".into()));
        assert_eq!((roll.pods().count(), roll.containers().count()), (0, 0));
    }

    #[test]
    fn ids_are_found_whole_or_by_their_beginning() {
        let mut roll = Roll::default();
        roll.list_pods(Instant::now(), vec![pod("abcdef"), pod("abcd")]);
        for (id, expected) in [
            ("abcd", Found::Whole),
            ("abcde", Found::Beginning),
            ("abc", Found::No),
            ("bcde", Found::No),
            ("", Found::No),
        ] {
            assert_eq!(roll.find_pod(id), expected, "{id}");
        }
    }

    #[test]
    fn what_is_saved_is_restored() {
        let mut roll = Roll::default();
        roll.note(Change::Ran(pod("p"), "sent".into()));
        roll.note(Change::Created(container("c", "p")));
        let saved = roll.save("/c.sock".into());
        let restored = Roll::restore(saved.clone());
        assert_eq!(restored.save("/c.sock".into()), saved);
        assert_eq!(restored.handler("p"), Some("sent"));
    }
}
