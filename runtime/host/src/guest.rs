// SPDX-License-Identifier: Apache-2.0
//! A running VM with an agent that answers, as pods hold it.

use std::sync::Arc;

use bulkhead_guest::agent::Agent;

use crate::files::Files;
use crate::process::VmmProcess;

/// A running VM with an agent that answers.
#[derive(Clone, Debug)]
pub struct Guest {
    pub process: Arc<VmmProcess>,
    pub agent: Agent,
    pub files: Files,
}

impl Guest {
    /// The agent is reached through the socket among the files.
    pub fn new(process: Arc<VmmProcess>, files: Files) -> Self {
        Self {
            process,
            agent: Agent::new(files.vsock()),
            files,
        }
    }
}
