// SPDX-License-Identifier: Apache-2.0
//! The guest of a pod, as the daemon sees it: a running VM with its agent and files.

use std::sync::{Arc, OnceLock};

use bulkhead_guest::agent::Agent;
use bulkhead_guest::remarks::Remarks;

use crate::files::Files;
use crate::process::VmmProcess;
use crate::pulse::Pulse;

/// A running VM whose agent answers.
#[derive(Clone, Debug)]
pub struct Guest {
    pub process: Arc<VmmProcess>,
    pub agent: Agent,
    pub files: Files,
    pub pulse: Pulse,
    pub remarks: Remarks,
    given_up: Arc<OnceLock<String>>,
}

impl Guest {
    /// Makes the guest. Its agent is reached through the vsock socket in `files`.
    pub fn new(process: Arc<VmmProcess>, files: Files) -> Self {
        Self {
            process,
            agent: Agent::new(files.vsock()),
            remarks: Remarks::new(files.name()),
            files,
            pulse: Pulse::default(),
            given_up: Arc::default(),
        }
    }

    /// Kills the VMM, because its guest is of no use any more. `why` becomes its obituary, unless it has one.
    pub fn give_up(&self, why: String) {
        // A guest that is given up twice keeps the first reason.
        let _ = self.given_up.set(why);
        self.process.kill();
    }

    /// A sentence that says why the VM ended.
    pub fn obituary(&self) -> String {
        let given_up = self.given_up.get().cloned();
        given_up.unwrap_or_else(|| self.files.obituary())
    }
}
