// SPDX-License-Identifier: Apache-2.0
//! The guest of a pod, as the daemon sees it: a running VM with its agent and files.

use std::sync::Arc;

use bulkhead_guest::agent::Agent;

use crate::files::Files;
use crate::process::VmmProcess;

/// A running VM whose agent answers.
#[derive(Clone, Debug)]
pub struct Guest {
    pub process: Arc<VmmProcess>,
    pub agent: Agent,
    pub files: Files,
}

impl Guest {
    /// Makes the guest. Its agent is reached through the vsock socket in `files`.
    pub fn new(process: Arc<VmmProcess>, files: Files) -> Self {
        Self {
            process,
            agent: Agent::new(files.vsock()),
            files,
        }
    }
}
