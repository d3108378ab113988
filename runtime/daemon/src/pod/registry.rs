// SPDX-License-Identifier: Apache-2.0
//! Which pods there are, by id and by name, and the way to the task that owns each.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_host::patience::{self, Clock, STARVED, Verdict};
use tokio::sync::{mpsc, oneshot, watch};

use super::errors::PodError;
use super::life::record::{ContainerRecord, PodRecord};
use super::life::spec::PodName;
use super::request::{Answer, Request};
use super::view::View;

/// The shortest prefix of an id that is accepted instead of the whole id.
const ID_PREFIX: usize = 4;
/// How long the rest of a stop may take after the end of the VM.
const FORCE_LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub struct Registry(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    pods: BTreeMap<String, Handle>,
    /// The pod's id by the container's id.
    containers: BTreeMap<String, String>,
    /// The pod's id by the pod's name; also of pods that wait for their turn.
    names: HashMap<PodName, String>,
}

/// The name of a pod that waits for its turn. The name is free again when this is dropped, unless [`Reservation::keep`]
/// was called.
#[derive(Debug)]
pub struct Reservation<'a> {
    registry: &'a Registry,
    record: Option<&'a PodRecord>,
}

impl<'a> Reservation<'a> {
    /// Reserves the name of a pod; the error says which pod has it already.
    pub fn of(registry: &'a Registry, record: &'a PodRecord) -> Result<Self, PodError> {
        registry.reserve(record)?;
        Ok(Self {
            registry,
            record: Some(record),
        })
    }

    /// From now on the pod's owner is responsible for the name.
    pub fn keep(mut self) {
        self.record = None;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(record) = self.record {
            self.registry.release(record);
        }
    }
}

/// The way to one pod's owner.
#[derive(Clone, Debug)]
pub struct Handle {
    pub id: String,
    pub inbox: mpsc::Sender<Request>,
    pub view: watch::Receiver<Arc<View>>,
}

impl Known {
    fn release(&mut self, record: &PodRecord) {
        let name = &record.spec.name;
        if self.names.get(name) == Some(&record.id) {
            self.names.remove(name);
        }
    }
}

impl Registry {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves the name of a pod; the error says which pod has it already.
    pub fn reserve(&self, record: &PodRecord) -> Result<(), PodError> {
        let mut known = self.known();
        let name = &record.spec.name;
        if let Some(holder) = known.names.get(name) {
            return Err(PodError::Exists {
                what: "pod",
                name: format!(
                    "{}/{} ({}, attempt {})",
                    name.namespace, name.name, name.uid, name.attempt
                ),
                holder: holder.clone(),
            });
        }
        known.names.insert(name.clone(), record.id.clone());
        Ok(())
    }

    /// Adds a pod, with the containers in its view.
    pub fn register(&self, handle: Handle) {
        let view = handle.view();
        let mut known = self.known();
        for container in view.containers.keys() {
            let pod = handle.id.clone();
            known.containers.insert(container.clone(), pod);
        }
        known.pods.insert(handle.id.clone(), handle);
    }

    /// Forgets a pod, its name and its containers.
    pub fn forget(&self, record: &PodRecord) {
        let mut known = self.known();
        known.pods.remove(&record.id);
        known.release(record);
        known.containers.retain(|_, pod| *pod != record.id);
    }

    pub fn add_container(&self, id: &str, pod: &str) {
        let mut known = self.known();
        known.containers.insert(id.to_owned(), pod.to_owned());
    }

    pub fn forget_container(&self, id: &str) {
        self.known().containers.remove(id);
    }

    /// Frees the name of a pod. Another pod that has it by now keeps it.
    pub fn release(&self, record: &PodRecord) {
        self.known().release(record);
    }

    /// The views of all pods.
    pub fn views(&self) -> Vec<Arc<View>> {
        self.known().pods.values().map(Handle::view).collect()
    }

    /// The way to a pod, found by its id or a unique prefix of it.
    pub fn pod(&self, id: &str) -> Result<Handle, PodError> {
        let known = self.known();
        let (_, handle) = find(&known.pods, id, "pod")?;
        Ok(handle.clone())
    }

    /// The way to the pod of a container, found by the container's id or a unique prefix of it; and the whole id.
    pub fn container(&self, id: &str) -> Result<(Handle, String), PodError> {
        let known = self.known();
        let (full, pod) = find(&known.containers, id, "container")?;
        let handle = known.pods.get(pod);
        let handle = handle.ok_or_else(|| PodError::not_found("container", id))?;
        Ok((handle.clone(), full.to_owned()))
    }
}

impl Handle {
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Sends a request to the owner and waits for its answer.
    pub async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, PodError> {
        let gone = || PodError::Gone {
            id: self.id.clone(),
        };
        let (answer, answered) = oneshot::channel();
        self.inbox.send(request(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Does what stops something in the guest. If that is not done within `limit`, it gives the guest up, so that
    /// nothing waits for it any more. Time in which the VM waited for a CPU does not count.
    pub async fn insist<T>(
        &self,
        stopping: impl Future<Output = Result<T, PodError>>,
        limit: Duration,
        what: &'static str,
    ) -> Result<T, PodError> {
        self.insist_within(stopping, [limit, FORCE_LIMIT], what)
            .await
    }

    async fn insist_within<T>(
        &self,
        stopping: impl Future<Output = Result<T, PodError>>,
        [limit, force_limit]: [Duration; 2],
        what: &'static str,
    ) -> Result<T, PodError> {
        tokio::pin!(stopping);
        let guest = self.view().guest.clone();
        let clock = guest
            .as_ref()
            .map(|guest| Clock::of(guest.process.identity().pid));
        let mut again = limit;
        loop {
            if let Ok(stopped) = tokio::time::timeout(again, &mut stopping).await {
                return stopped;
            }
            if guest.as_ref().is_some_and(|guest| guest.pulse.is_held()) {
                // It is being saved, which has a time limit of its own.
                again = limit;
                continue;
            }
            let Some(spent) = clock.map(|clock| clock.spent()) else {
                break;
            };
            match patience::judge(&spent, limit, limit.saturating_mul(STARVED)) {
                Verdict::GoOn(until) => again = until.saturating_sub(spent.passed),
                Verdict::Slow | Verdict::Late => break,
            }
        }
        if let (Some(guest), Some(clock)) = (guest, clock) {
            let spent = clock.spent();
            guest.give_up(format!(
                "the guest did not let a {what} end within {:.0?}, of which its VM ran {:.0?} and waited {:.0?} for a CPU",
                spent.passed, spent.scheduled.on_cpu, spent.scheduled.waiting
            ));
        }
        let stopped = tokio::time::timeout(force_limit, stopping).await;
        stopped.unwrap_or_else(|_| {
            let id = self.id.clone();
            Err(PodError::Stuck { what, id })
        })
    }

    /// Sends a container its stop signal, unless it has had it already.
    pub async fn signal_stop(&self, id: &str) -> Result<(), PodError> {
        let id = id.to_owned();
        self.ask(|answer| Request::SignalStop { id, answer }).await
    }

    pub async fn signal(&self, id: &str, signal: i32) -> Result<(), PodError> {
        let id = id.to_owned();
        self.ask(|answer| Request::Signal { id, signal, answer })
            .await
    }

    /// The record of a container, if it runs.
    pub fn running(&self, id: &str) -> Option<ContainerRecord> {
        let record = self.view().containers.get(id).cloned();
        record.filter(|record| record.state.is_running())
    }

    /// Waits until the container no longer runs. Returns false if it still runs after `limit`.
    pub async fn exits_within(&self, id: &str, limit: Duration) -> bool {
        let mut view = self.view.clone();
        let over = |view: &Arc<View>| {
            let record = view.containers.get(id);
            !record.is_some_and(|record| record.state.is_running())
        };
        // If the pod is removed meanwhile, `wait_for` returns an error at once: then nothing runs either.
        tokio::time::timeout(limit, view.wait_for(over))
            .await
            .is_ok()
    }
}

/// Finds the only id that begins with `wanted`, and the value that belongs to it. A whole id wins over longer ones.
pub fn find<'a, V>(
    ids: &'a BTreeMap<String, V>,
    wanted: &str,
    what: &'static str,
) -> Result<(&'a str, &'a V), PodError> {
    let from_wanted = (Bound::Included(wanted), Bound::Unbounded);
    let mut found = ids.range::<str, _>(from_wanted);
    let (id, value) = match found.next() {
        Some((id, value)) if id == wanted => return Ok((id, value)),
        Some((id, value)) if wanted.len() >= ID_PREFIX && id.starts_with(wanted) => (id, value),
        _ => return Err(PodError::not_found(what, wanted)),
    };
    match found.next() {
        Some((other, _)) if other.starts_with(wanted) => Err(PodError::Ambiguous {
            what,
            id: wanted.to_owned(),
        }),
        _ => Ok((id, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixtures;

    /// Issue 13, point 15.
    #[tokio::test]
    async fn a_stop_that_is_dragged_out_ends_with_an_error_though_there_is_no_vm_to_kill() {
        let handle = handle("c");
        let never = std::future::pending::<Result<(), PodError>>();
        let moments = [Duration::from_millis(1); 2];
        let error = handle.insist_within(never, moments, "pod").await;
        assert!(matches!(error, Err(PodError::Stuck { .. })), "{error:?}");
        let done = handle.insist(async { Ok(7) }, Duration::from_secs(60), "pod");
        assert_eq!(done.await.unwrap(), 7);
    }

    #[test]
    fn ids_are_found_by_a_unique_beginning() {
        let ids = ["aaaa1111", "aaaa2222", "bbbb1111", "bbbb"];
        let ids: BTreeMap<String, ()> = ids.map(|id| (id.to_owned(), ())).into();
        let find = |wanted| find(&ids, wanted, "pod").map(|(id, ())| id);
        assert_eq!(find("aaaa1").unwrap(), "aaaa1111");
        assert_eq!(find("bbbb").unwrap(), "bbbb", "an exact match wins");
        assert!(matches!(find("aaaa"), Err(PodError::Ambiguous { .. })));
        for unknown in ["", "a", "cccc", "aaaa11112"] {
            assert!(
                matches!(find(unknown), Err(PodError::NotFound { .. })),
                "{unknown}"
            );
        }
    }

    fn handle(container: &str) -> Handle {
        let (inbox, _) = mpsc::channel(1);
        let container = ContainerRecord {
            id: container.to_owned(),
            ..fixtures::container_record()
        };
        let view = View {
            pod: fixtures::pod_record(),
            containers: BTreeMap::from([(container.id.clone(), container)]),
            guest: None,
        };
        let (_, view) = watch::channel(Arc::new(view));
        Handle {
            id: "pod".into(),
            inbox,
            view,
        }
    }

    #[test]
    fn a_name_that_was_freed_early_is_its_next_pods() {
        let registry = Registry::default();
        let named = |id: &str| PodRecord {
            id: id.to_owned(),
            ..fixtures::pod_record()
        };
        let (first, second) = (named("first"), named("second"));
        registry.reserve(&first).unwrap();
        assert!(registry.reserve(&second).is_err());
        registry.release(&first);
        registry.reserve(&second).unwrap();
        registry.forget(&first);
        let error = registry.reserve(&named("third")).unwrap_err();
        assert!(error.to_string().contains("second"), "{error}");
    }

    #[test]
    fn a_containers_pod_is_known_until_the_container_or_the_pod_is_forgotten() {
        let registry = Registry::default();
        registry.register(handle("adopted"));
        registry.add_container("made later", "pod");
        for id in ["adopted", "adop", "made later"] {
            assert_eq!(registry.container(id).unwrap().0.id, "pod", "{id}");
        }
        registry.forget_container("made later");
        assert!(registry.container("made later").is_err());
        registry.forget(&fixtures::pod_record());
        assert!(registry.container("adopted").is_err());
        assert!(registry.known().containers.is_empty());
    }
}
