// SPDX-License-Identifier: Apache-2.0
//! Who a container's process is: what its user and groups turned out to be in the image.

use bulkhead_proto::agent as protocol;
use serde::{Deserialize, Serialize};

/// More groups than the agent tells.
const MAX_GROUPS: usize = 1024;

/// In numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessUser {
    pub uid: u32,
    pub gid: u32,
    /// The primary one first.
    pub groups: Vec<u32>,
}

impl From<protocol::Identity> for ProcessUser {
    /// The guest's word, cut to a bearable length.
    fn from(mut told: protocol::Identity) -> Self {
        told.groups.truncate(MAX_GROUPS);
        Self {
            uid: told.uid,
            gid: told.gid,
            groups: told.groups,
        }
    }
}
