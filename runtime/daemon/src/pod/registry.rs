// SPDX-License-Identifier: Apache-2.0
//! Which pods there are, by id and by name, and the way to the task that owns each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::errors::PodError;
use super::life::record::{ContainerRecord, PodRecord};
use super::life::spec::PodName;
use super::request::{Answer, Request};
use super::view::View;

/// The shortest part of an id that names something.
const ID_PREFIX: usize = 4;

#[derive(Debug, Default)]
pub struct Registry(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    pods: HashMap<String, Handle>,
    /// The ids of those who have these names.
    names: HashMap<PodName, String>,
}

/// The name of a pod that waits for its turn; free again when this is dropped, unless it is kept.
#[derive(Debug)]
pub struct Reservation<'a> {
    registry: &'a Registry,
    name: Option<PodName>,
}

impl<'a> Reservation<'a> {
    /// Takes the name of a pod, or says who has it.
    pub fn of(registry: &'a Registry, record: &PodRecord) -> Result<Self, PodError> {
        registry.reserve(record)?;
        Ok(Self {
            registry,
            name: Some(record.spec.name.clone()),
        })
    }

    /// The pod's owner gives the name back.
    pub fn keep(mut self) {
        self.name = None;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            self.registry.release(name);
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

impl Registry {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the name of a pod, or says who has it.
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

    pub fn register(&self, handle: Handle) {
        self.known().pods.insert(handle.id.clone(), handle);
    }

    pub fn forget(&self, record: &PodRecord) {
        let mut known = self.known();
        known.pods.remove(&record.id);
        known.names.remove(&record.spec.name);
    }

    fn release(&self, name: &PodName) {
        self.known().names.remove(name);
    }

    /// What is known of all pods.
    pub fn views(&self) -> Vec<Arc<View>> {
        self.known().pods.values().map(Handle::view).collect()
    }

    pub fn pod(&self, id: &str) -> Result<Handle, PodError> {
        let known = self.known();
        let ids = known.pods.keys().map(String::as_str);
        let full = find(ids, id, "pod")?;
        known
            .pods
            .get(&full)
            .cloned()
            .ok_or_else(|| not_found("pod", id))
    }

    pub fn container(&self, id: &str) -> Result<(Handle, String), PodError> {
        let handles: Vec<Handle> = self.known().pods.values().cloned().collect();
        let views: Vec<_> = handles.iter().map(Handle::view).collect();
        let ids = views.iter().flat_map(|view| view.containers.keys());
        let full = find(ids.map(String::as_str), id, "container")?;
        let owner = handles
            .into_iter()
            .zip(&views)
            .find(|(_, view)| view.containers.contains_key(&full));
        let (handle, _) = owner.ok_or_else(|| not_found("container", id))?;
        Ok((handle, full))
    }
}

impl Handle {
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    pub async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, PodError> {
        let gone = || PodError::Gone {
            id: self.id.clone(),
        };
        let (answer, answered) = oneshot::channel();
        self.inbox.send(request(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    pub async fn signal(&self, id: &str, signal: i32) -> Result<(), PodError> {
        let id = id.to_owned();
        self.ask(|answer| Request::Signal { id, signal, answer })
            .await
    }

    pub fn running(&self, id: &str) -> Option<ContainerRecord> {
        let record = self.view().containers.get(id).cloned();
        record.filter(|record| record.state.is_running())
    }

    /// Waits until the container does not run any more, and says whether that was in time.
    pub async fn exits_within(&self, id: &str, limit: Duration) -> bool {
        let mut view = self.view.clone();
        let over = |view: &Arc<View>| {
            let record = view.containers.get(id);
            !record.is_some_and(|record| record.state.is_running())
        };
        // A pod that went away has no running containers either.
        tokio::time::timeout(limit, view.wait_for(over))
            .await
            .is_ok()
    }
}

/// Finds the only id that begins with `wanted`.
pub fn find<'a>(
    ids: impl Iterator<Item = &'a str>,
    wanted: &str,
    what: &'static str,
) -> Result<String, PodError> {
    let mut found = None;
    for id in ids {
        if id == wanted {
            return Ok(id.to_owned());
        }
        if wanted.len() >= ID_PREFIX && id.starts_with(wanted) {
            if found.is_some() {
                return Err(PodError::Ambiguous {
                    what,
                    id: wanted.to_owned(),
                });
            }
            found = Some(id);
        }
    }
    found
        .map(str::to_owned)
        .ok_or_else(|| not_found(what, wanted))
}

pub fn not_found(what: &'static str, id: &str) -> PodError {
    PodError::NotFound {
        what,
        id: id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_by_a_unique_beginning() {
        let ids = ["aaaa1111", "aaaa2222", "bbbb1111", "bbbb"];
        let find = |wanted| find(ids.iter().copied(), wanted, "pod");
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
}
