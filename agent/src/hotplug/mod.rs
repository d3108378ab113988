// SPDX-License-Identifier: Apache-2.0
//! Memory and CPUs that the guest gets while it runs.
//!
//! A VM has more CPUs than it starts at boot, and addresses for more memory than its kernel is told of. The host
//! allocates memory when it is touched, so unused memory costs nothing, not even its page structures in the guest's
//! kernel. The daemon says how much the pod needs for sure ([`Hotplug::size`]). If the pod has no limit, the guest
//! itself adds memory when its containers have used up what there is: [`gate`].

mod cpus;
mod gate;
mod memory;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::{
    GUEST_FIXED_BYTES, GUEST_PARTS, SizeSandboxRequest, SizeSandboxResponse,
};

use memory::Memory;

#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    #[error("the ranges of memory are not valid")]
    Ranges,
    #[error("{wanted} bytes of memory were requested, this VM can have at most {most}")]
    Full { wanted: u64, most: u64 },
    #[error("this guest's kernel does not support memory hotplug")]
    Unable(#[source] io::Error),
    #[error("add the memory at {address:#x}")]
    Add { address: u64, source: io::Error },
    #[error("bring {path} online")]
    Online { path: PathBuf, source: io::Error },
    #[error("watch the pod's memory")]
    Gate(#[source] io::Error),
}

/// The guest's memory and CPUs. The memory is known once the daemon has said where it can be. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Hotplug {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    memory: Option<Memory>,
    /// Whether the guest adds memory without a request.
    grows: bool,
    watched: bool,
}

impl Hotplug {
    /// Gives the guest at least what the request says. Blocks while the kernel adds memory and CPUs.
    pub fn size(&self, request: &SizeSandboxRequest) -> Result<SizeSandboxResponse, HotplugError> {
        let mut state = self.state();
        if state.memory.is_none() {
            state.memory = Some(Memory::new(request)?);
        }
        let memory = state.memory.as_mut().ok_or(HotplugError::Ranges)?;
        memory.grow_to(request.least_bytes)?;
        let memory_bytes = memory.present();
        state.grows = request.grows;
        state.set_gate().map_err(HotplugError::Gate)?;
        if state.grows && !state.watched {
            gate::watch(self.clone()).map_err(HotplugError::Gate)?;
            state.watched = true;
        }
        drop(state);
        Ok(SizeSandboxResponse {
            memory_bytes,
            cpus: cpus::bring_up(request.cpus)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic in between leaves a valid state, because each change is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Sets the gate and the final limit by the memory that is present now.
    fn set_gate(&self) -> io::Result<()> {
        match &self.memory {
            Some(memory) if self.grows => gate::set(
                containers_share(memory.present()),
                containers_share(memory.most()),
            ),
            _ => gate::lift(),
        }
    }
}

/// How much containers can use in a guest that has `bytes` of memory.
fn containers_share(bytes: u64) -> u64 {
    bytes.saturating_sub(GUEST_FIXED_BYTES + bytes / GUEST_PARTS)
}
