// SPDX-License-Identifier: Apache-2.0
//! Memory and CPUs that the guest gets while it runs.
//!
//! A VM has addresses for more memory than its kernel is told of at the boot, and more CPUs than it starts. The host backs
//! memory when it is touched, so what is not used costs nothing, not even its description in the kernel. The daemon
//! says how much the pod needs for certain ([`Hotplug::size`]). Where the pod has no limit, the guest itself adds
//! memory when its containers come to the end of what is there: [`gate`].

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
    #[error("the ranges of memory make no sense")]
    Ranges,
    #[error("{wanted} bytes of memory were asked for, this VM can have {most}")]
    Full { wanted: u64, most: u64 },
    #[error("this guest's kernel cannot be given memory")]
    Unable(#[source] io::Error),
    #[error("add the memory at {address:#x}")]
    Add { address: u64, source: io::Error },
    #[error("bring {path} online")]
    Online { path: PathBuf, source: io::Error },
    #[error("watch the pod's memory")]
    Gate(#[source] io::Error),
}

/// The guest's memory, once the daemon has said where it can be. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Hotplug {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    memory: Option<Memory>,
    /// More is added without being asked for.
    grows: bool,
    watched: bool,
}

impl Hotplug {
    /// Gives the guest what is asked for, at least. Blocks while the kernel takes memory and CPUs in.
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
        // Each change leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Sets the gate and the end of all growth by what is there now.
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

/// What containers can use of a guest that has `bytes` of memory.
fn containers_share(bytes: u64) -> u64 {
    bytes.saturating_sub(GUEST_FIXED_BYTES + bytes / GUEST_PARTS)
}
