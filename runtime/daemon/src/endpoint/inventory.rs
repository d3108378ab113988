// SPDX-License-Identifier: Apache-2.0
//! What one delegate has, asked for anew for every list.
//!
//! While the delegate does not answer, lists have what it listed last, because kubelet takes a pod that is in no list
//! for dead. At most one list of a kind is on its way, so that calls do not pile up at a server that is stuck.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_delegate::{Delegate, DelegateError, Health, Limit};
use bulkhead_proto::cri;
use bulkhead_proto::cri::runtime_service_client::RuntimeServiceClient;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant, sleep};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::kept::Kept;
use super::roll::{Change, Roll};
use super::sides::Sides;

/// The least time between two writes of the file.
const WRITE_PAUSE: Duration = Duration::from_secs(1);

/// A delegate and what it has.
#[derive(Debug)]
pub struct Inventory {
    pub delegate: Delegate,
    roll: Mutex<Roll>,
    pods: Flight,
    containers: Flight,
    kept: Kept,
    changed: Notify,
    /// What the delegate refuses to say, and why.
    refusals: Mutex<BTreeMap<&'static str, String>>,
}

/// When the list of one kind that arrived last began. Who holds the lock has one on its way.
#[derive(Debug, Default)]
struct Flight(tokio::sync::Mutex<Option<Instant>>);

impl Inventory {
    /// Begins with what the daemon before this one kept in the directory.
    pub fn new(delegate: Delegate, directory: &Path) -> Self {
        let first = delegate.name().split(',').next().unwrap_or_default();
        let kept = Kept::new(directory, first);
        let saved = kept.read(&delegate.socket().to_string_lossy());
        Self {
            delegate,
            roll: Mutex::new(saved.map(Roll::restore).unwrap_or_default()),
            pods: Flight::default(),
            containers: Flight::default(),
            kept,
            changed: Notify::new(),
            refusals: Mutex::default(),
        }
    }

    pub fn roll(&self) -> MutexGuard<'_, Roll> {
        self.roll.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the delegate has just done.
    pub fn note(&self, change: Change) {
        self.roll().note(change);
        self.changed.notify_one();
    }

    /// Makes a call to the delegate for a caller.
    pub async fn pass_on<Q, A, F>(
        &self,
        limit: Limit,
        request: Request<Q>,
        call: impl Fn(RuntimeServiceClient<Channel>, Request<Q>) -> F,
    ) -> Result<Response<A>, DelegateError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let answer = self.delegate.runtime(limit, request.into_inner(), call);
        answer.await.map(Response::new)
    }

    /// Puts the handler that kubelet sent into what the delegate shows of a pod.
    pub fn show_handler(&self, pod: &mut cri::PodSandboxStatus, index: usize, sides: &Sides) {
        let sent = self.roll().handler(&pod.id).map(ToOwned::to_owned);
        pod.runtime_handler = sent.unwrap_or_else(|| sides.as_sent(index, &pod.runtime_handler));
    }

    /// Asks for the pods, if the delegate answers.
    pub async fn refresh_pods(&self) {
        let take = |began, pods: Vec<cri::PodSandbox>| self.roll().list_pods(began, pods);
        self.refresh("the list of pods", &self.pods, self.delegate.pods(), take)
            .await;
    }

    pub async fn refresh_containers(&self) {
        let take = |began, all: Vec<cri::Container>| self.roll().list_containers(began, all);
        let listed = self.delegate.containers();
        self.refresh("the list of containers", &self.containers, listed, take)
            .await;
    }

    async fn refresh<T>(
        &self,
        what: &'static str,
        flight: &Flight,
        listed: impl Future<Output = Result<Vec<T>, DelegateError>>,
        take: impl Fn(Instant, Vec<T>) -> bool,
    ) {
        let asked = Instant::now();
        let mut last = flight.0.lock().await;
        // A list that began after this caller asked has all that the caller may know of.
        let is_new = last.is_some_and(|began| began >= asked);
        if is_new || !self.may_answer() {
            return;
        }
        let began = Instant::now();
        let listed = listed.await;
        self.log_refusal(what, listed.as_ref().err());
        if let Ok(listed) = listed {
            if take(began, listed) {
                self.changed.notify_one();
            }
            *last = Some(began);
        }
    }

    /// Logs once that the delegate does not say something, and once that it does again. That it does not answer at all
    /// is logged as its health.
    pub fn log_refusal(&self, what: &'static str, error: Option<&DelegateError>) {
        if error.is_some() && !self.delegate.health().is_up() {
            return;
        }
        let refused = error.map(ToString::to_string);
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let delegate = self.delegate.name();
        match (refused, refusals.get(what).cloned()) {
            (Some(why), told) if told.as_ref() != Some(&why) => {
                tracing::warn!(delegate, "left out of {what}: {why}");
                refusals.insert(what, why);
            }
            (None, Some(_)) => {
                tracing::info!(delegate, "is in {what} again");
                refusals.remove(what);
            }
            _ => {}
        }
    }

    /// Whether it is worth asking. A server that is down refuses at once, but nobody waits again for one that was slow
    /// before the watch has heard from it.
    pub fn may_answer(&self) -> bool {
        self.delegate.health() != Health::Slow
    }

    /// Writes the file when something has changed, until the daemon ends.
    pub async fn keep(&self) {
        let mut told = String::new();
        loop {
            self.changed.notified().await;
            let socket = self.delegate.socket().to_string_lossy().into_owned();
            let saved = self.roll().save(socket);
            let kept = self.kept.clone();
            let written = tokio::task::spawn_blocking(move || kept.write(&saved)).await;
            let error = match written {
                Ok(Ok(())) => String::new(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            if !error.is_empty() && error != told {
                let name = self.delegate.name();
                tracing::warn!(delegate = name, "what it has is not kept: {error}");
            }
            told = error;
            sleep(WRITE_PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_delegate::Limits;
    use bulkhead_delegate::fake::Fake;
    use std::sync::Arc;

    fn pod(id: &str) -> cri::PodSandbox {
        cri::PodSandbox {
            id: id.into(),
            ..Default::default()
        }
    }

    fn ids(inventory: &Inventory) -> Vec<String> {
        inventory.roll().pods().map(|pod| pod.id.clone()).collect()
    }

    #[tokio::test]
    async fn what_was_listed_last_is_known_while_the_delegate_is_down_and_to_the_next_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let fake = Fake::new("fake");
        fake.world().pods.push(pod("one"));
        let running = fake.serve(&socket);
        let limits = Limits::default();
        let delegate = || Delegate::new("runc,gvisor", &socket, limits);
        let new = || Inventory::new(delegate(), directory.path());
        let inventory = Arc::new(new());
        let keeping = Arc::clone(&inventory);
        let keeping = tokio::spawn(async move { keeping.keep().await });
        inventory.refresh_pods().await;
        drop(running);
        inventory.refresh_pods().await;
        assert_eq!(ids(&inventory), ["one"]);
        let file = directory.path().join("runc.list");
        while !file.exists() {
            sleep(Duration::from_millis(5)).await;
        }
        keeping.abort();
        assert_eq!(ids(&new()), ["one"]);
    }

    #[tokio::test]
    async fn callers_share_a_list_and_a_slow_delegate_is_not_waited_for_again() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let fake = Fake::new("fake");
        let _running = fake.serve(&socket);
        let limits = Limits {
            list: Duration::from_millis(500),
            ..Limits::default()
        };
        let delegate = Delegate::new("runc", &socket, limits);
        let inventory = Inventory::new(delegate, directory.path());
        inventory.refresh_pods().await;
        fake.freeze(true);
        fake.world().pods.push(pod("one"));
        let thaw = async {
            sleep(Duration::from_millis(50)).await;
            fake.freeze(false);
        };
        let many = (0..10).map(|_| inventory.refresh_pods());
        tokio::join!(futures_util::future::join_all(many), thaw);
        assert_eq!(ids(&inventory), ["one"]);
        let calls = fake.world().calls.len();
        assert!(
            calls <= 3,
            "one before, one on its way, one for all: {calls}"
        );
        fake.freeze(true);
        inventory.refresh_pods().await;
        assert!(!inventory.may_answer());
        let before = Instant::now();
        inventory.refresh_pods().await;
        assert!(before.elapsed() < Duration::from_millis(250));
        assert_eq!(ids(&inventory), ["one"]);
    }
}
