// SPDX-License-Identifier: Apache-2.0
//! What everyone but its owner knows of a pod.

use std::collections::BTreeMap;

use bulkhead_host::Guest;

use super::life::record::{ContainerRecord, PodRecord};

/// What a pod's owner published last.
#[derive(Clone, Debug)]
pub struct View {
    pub pod: PodRecord,
    pub containers: BTreeMap<String, ContainerRecord>,
    /// `None`: no VM lives.
    pub guest: Option<Guest>,
}
