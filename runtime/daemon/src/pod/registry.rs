// SPDX-License-Identifier: Apache-2.0
//! Which pods there are, by id and by name, and the way to the task that owns each.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::owner::{Answer, Request};
use super::record::{ContainerRecord, PodRecord};
use super::spec::PodName;
use super::{PodError, Shared, View};

/// The shortest part of an id that names something.
const ID_PREFIX: usize = 4;

#[derive(Debug, Default)]
pub struct Registry {
    pub pods: HashMap<String, Handle>,
    pub names: HashMap<PodName, String>,
}

/// The name of a pod that waits for its turn; free again when this is dropped, unless it is kept.
#[derive(Debug)]
pub struct Reservation<'a> {
    shared: &'a Shared,
    name: Option<PodName>,
}

impl<'a> Reservation<'a> {
    /// Takes the name of a pod, or says who has it.
    pub fn of(shared: &'a Shared, record: &PodRecord) -> Result<Self, PodError> {
        shared.reserve(record)?;
        Ok(Self {
            shared,
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
            self.shared.release(name);
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

impl Shared {
    pub fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the name of a pod, or says who has it.
    pub fn reserve(&self, record: &PodRecord) -> Result<(), PodError> {
        let mut registry = self.registry();
        let name = &record.spec.name;
        if let Some(holder) = registry.names.get(name) {
            return Err(PodError::Exists {
                what: "pod",
                name: format!(
                    "{}/{} ({}, attempt {})",
                    name.namespace, name.name, name.uid, name.attempt
                ),
                holder: holder.clone(),
            });
        }
        registry.names.insert(name.clone(), record.id.clone());
        Ok(())
    }

    pub fn register(&self, handle: Handle) {
        self.registry().pods.insert(handle.id.clone(), handle);
    }

    pub fn forget(&self, record: &PodRecord) {
        let mut registry = self.registry();
        registry.pods.remove(&record.id);
        registry.names.remove(&record.spec.name);
    }

    fn release(&self, name: &PodName) {
        self.registry().names.remove(name);
    }

    pub fn pod(&self, id: &str) -> Result<Handle, PodError> {
        let registry = self.registry();
        let ids = registry.pods.keys().map(String::as_str);
        let full = find(ids, id, "pod")?;
        registry
            .pods
            .get(&full)
            .cloned()
            .ok_or_else(|| not_found("pod", id))
    }

    pub fn container(&self, id: &str) -> Result<(Handle, String), PodError> {
        let handles: Vec<Handle> = self.registry().pods.values().cloned().collect();
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
