// SPDX-License-Identifier: Apache-2.0
//! The user and groups that a container's process runs as, which the agent has looked up in the image.

use bulkhead_proto::agent as protocol;
use serde::{Deserialize, Serialize};

/// The most groups that are accepted. The agent sends fewer.
const MAX_GROUPS: usize = 1024;

/// The numbers of a process's user and groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessUser {
    pub uid: u32,
    pub gid: u32,
    /// The primary group is the first.
    pub groups: Vec<u32>,
}

impl From<protocol::Identity> for ProcessUser {
    /// Converts the guest's message, and limits its length.
    fn from(mut told: protocol::Identity) -> Self {
        told.groups.truncate(MAX_GROUPS);
        Self {
            uid: told.uid,
            gid: told.gid,
            groups: told.groups,
        }
    }
}
