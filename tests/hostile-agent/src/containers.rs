// SPDX-License-Identifier: Apache-2.0
//! The containers that the daemon believes in.

use std::collections::BTreeMap;
use std::sync::Mutex;

use bulkhead_proto::agent::container_status::State;

use crate::lock;

/// A container that is said to run.
#[derive(Clone, Debug)]
pub struct Container {
    pub args: Vec<String>,
    pub state: State,
}

#[derive(Debug, Default)]
pub struct Containers(Mutex<BTreeMap<String, Container>>);

impl Containers {
    /// All of them, by their ids.
    pub fn all(&self) -> BTreeMap<String, Container> {
        lock(&self.0).clone()
    }

    pub fn get(&self, id: &str) -> Option<Container> {
        lock(&self.0).get(id).cloned()
    }

    pub fn add(&self, id: String, container: Container) {
        lock(&self.0).insert(id, container);
    }

    pub fn remove(&self, id: &str) {
        lock(&self.0).remove(id);
    }

    pub fn change(&self, id: &str, state: State) {
        if let Some(container) = lock(&self.0).get_mut(id) {
            container.state = state;
        }
    }

    /// The ids of containers whose command begins with `word`.
    pub fn called(&self, word: &str) -> Vec<String> {
        let containers = lock(&self.0);
        let called = containers
            .iter()
            .filter(|(_, one)| one.args.first().is_some_and(|first| first == word));
        called.map(|(id, _)| id.clone()).collect()
    }
}
