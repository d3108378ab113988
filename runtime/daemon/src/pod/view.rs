// SPDX-License-Identifier: Apache-2.0
//! A snapshot of what is known of a pod. Its owner publishes a new one after each change.

use std::collections::BTreeMap;

use bulkhead_host::Guest;

use super::errors::PodError;
use super::life::record::{ContainerRecord, PodRecord};
use super::life::state::PodState;

/// A pod, its containers by their ids, and its guest.
#[derive(Clone, Debug)]
pub struct View {
    pub pod: PodRecord,
    pub containers: BTreeMap<String, ContainerRecord>,
    /// `None` if the pod has no running VM.
    pub guest: Option<Guest>,
}

impl View {
    /// A container, found by its whole id.
    pub fn container(&self, id: &str) -> Result<&ContainerRecord, PodError> {
        let record = self.containers.get(id);
        record.ok_or_else(|| PodError::not_found("container", id))
    }

    /// The guest of a ready pod. For any other pod, the error names `event`.
    pub fn ready_guest(&self, event: &'static str) -> Result<Guest, PodError> {
        match (&self.pod.state, &self.guest) {
            (PodState::Ready, Some(guest)) => Ok(guest.clone()),
            _ => Err(PodError::pod_is(&self.pod, event)),
        }
    }
}
