// SPDX-License-Identifier: Apache-2.0
//! What everyone but its owner knows of a pod.

use std::collections::BTreeMap;

use super::life::record::{ContainerRecord, PodRecord};
use crate::guest::Guest;

/// What a pod's owner published last.
#[derive(Clone, Debug)]
pub struct View {
    pub pod: PodRecord,
    pub containers: BTreeMap<String, ContainerRecord>,
    /// `None`: no VM lives.
    pub guest: Option<Guest>,
}
