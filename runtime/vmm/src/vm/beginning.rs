// SPDX-License-Identifier: Apache-2.0
//! What a VM begins with: its memory, and the state of one that goes on. On the main thread, before it filters system calls.

use std::io;

use bulkhead_text::chain;

use super::SetupError;
use super::machine::Machine;
use super::resources::{Origin, Saved};
use crate::foreseen::Foreseen;
use crate::memory::{self, Laid, Memory, MemoryError, ahead};
use crate::state::State;
use crate::sys::Singly;

/// Memory to begin with.
#[derive(Debug)]
pub struct Begun {
    pub memory: Memory,
    /// Which parts of it are mapped from its template or its checkpoint.
    pub laid: Laid,
    /// In a fork from which the parent learns. Keep it.
    pub shown: Option<Singly>,
}

pub fn memory_of(origin: &Origin, bytes: u64) -> Result<Begun, MemoryError> {
    let own = |memory| (memory, Laid::new());
    let (memory, laid) = match origin {
        Origin::Boot { template, .. } => match template {
            None => memory::create(bytes).map(own),
            Some(template) => memory::of_template(&template.memory, bytes).map(own),
        },
        Origin::Fork { template, .. } => memory::forked(&template.memory, bytes),
        Origin::Restore {
            checkpoint,
            maps_memory,
        } => match maps_memory {
            false => memory::restored(&checkpoint.memory, bytes).map(own),
            true => memory::mapped(&checkpoint.memory, bytes),
        },
    }?;
    let shown = match origin {
        Origin::Fork { foreseen, .. } => of_fork(&memory, &laid, foreseen.as_ref()),
        Origin::Boot { .. } | Origin::Restore { .. } => None,
    };
    Ok(Begun {
        memory,
        laid,
        shown,
    })
}

/// Copies what a fork will write to, or shows the parent what it uses.
fn of_fork(memory: &Memory, laid: &Laid, foreseen: Option<&Foreseen>) -> Option<Singly> {
    match foreseen {
        Some(foreseen) => {
            or_go_on("copy pages ahead", ahead::copy(memory, foreseen));
            None
        }
        None => or_go_on("show which pages are used", ahead::show(memory, laid)),
    }
}

/// Lets the guest go on where it was saved.
pub fn go_on(machine: &Machine, saved: &Saved) -> Result<(), SetupError> {
    let state = State::read(&saved.state)?;
    Ok(machine.restore(&state, saved.kernel_sum)?)
}

/// Maps what a fork's guest will use first.
pub fn map_ahead(machine: &Machine, foreseen: Option<&Foreseen>) {
    if let Some(foreseen) = foreseen {
        or_go_on("map pages ahead", machine.map_ahead(foreseen));
    }
}

/// What only saves time may fail.
fn or_go_on<T>(what: &str, done: io::Result<T>) -> Option<T> {
    done.inspect_err(|e| eprintln!("bulkhead-vmm: {what}: {}", chain(e)))
        .ok()
}
