// SPDX-License-Identifier: Apache-2.0
//! Notices that a guest has halted for good, so that its VM can end.
//!
//! A kernel that halts, or that powers off without a way to do so, executes HLT on each vCPU with interrupts off. No
//! interrupt wakes such a vCPU, and a vCPU that was never started waits for another one to do it. KVM keeps all of them
//! asleep and tells nobody. So a thread looks every [`PERIOD`]: if the vCPUs had no exits since it looked last, it
//! interrupts them, and each notes whether it can ever run again.
//!
//! For a moment, a healthy vCPU may look the same: the kernel's spin locks halt with interrupts off until another vCPU
//! wakes them. So the VM ends only if all vCPUs are found at the same instructions twice.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuFd;

/// The time between two looks. A guest that has halted is noticed after three to four of them.
pub const PERIOD: Duration = Duration::from_secs(2);
/// The flag IF of RFLAGS: interrupts are on.
const INTERRUPTS: u64 = 1 << 9;
const NOT_SEEN: u64 = 0;

/// At which instruction each vCPU was last found halted for good.
#[derive(Debug)]
pub struct Halts(Vec<AtomicU64>);

impl Halts {
    #[must_use]
    pub fn new(vcpus: usize) -> Self {
        Self((0..vcpus).map(|_| AtomicU64::new(NOT_SEEN)).collect())
    }

    /// A vCPU that was interrupted notes whether it is halted for good. Call this on its own thread.
    pub fn note(&self, id: u8, vcpu: &VcpuFd) {
        let (Ok(state), Ok(registers)) = (vcpu.get_mp_state(), vcpu.get_regs()) else {
            return;
        };
        if is_final(state.mp_state, registers.rflags) {
            self.found(id, registers.rip);
        }
    }

    fn found(&self, id: u8, instruction: u64) {
        if let Some(place) = self.0.get(usize::from(id)) {
            place.store(instruction.max(NOT_SEEN + 1), Ordering::Relaxed);
        }
    }

    /// Where all vCPUs were found. `None` if one was not found halted since the last call.
    fn take(&self) -> Option<Vec<u64>> {
        let places = self.0.iter();
        let places: Vec<_> = places
            .map(|place| place.swap(NOT_SEEN, Ordering::Relaxed))
            .collect();
        places
            .iter()
            .all(|place| *place != NOT_SEEN)
            .then_some(places)
    }
}

/// Whether a vCPU in this state stays in it until another vCPU does something.
fn is_final(state: u32, rflags: u64) -> bool {
    match state {
        KVM_MP_STATE_HALTED => rflags & INTERRUPTS == 0,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
        _ => false,
    }
}

/// What to do after a look.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The guest runs.
    Wait,
    /// Interrupt the vCPUs, so that they note where they are.
    Interrupt,
    /// All have halted for good.
    End,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Looks {
    exits: Option<u64>,
    places: Option<Vec<u64>>,
}

impl Looks {
    /// `exits` is the sum of all vCPUs' exits, if the host counts them.
    pub fn look(&mut self, exits: Option<u64>, halts: &Halts) -> Next {
        let places = halts.take();
        let has_run = exits.is_some() && exits != self.exits;
        self.exits = exits;
        if has_run {
            self.places = None;
            return Next::Wait;
        }
        if places.is_some() && places == self.places {
            return Next::End;
        }
        self.places = places;
        Next::Interrupt
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::KVM_MP_STATE_RUNNABLE;

    #[test]
    fn only_a_halt_without_interrupts_and_a_vcpu_that_was_never_started_are_final() {
        assert!(is_final(KVM_MP_STATE_HALTED, 2));
        assert!(!is_final(KVM_MP_STATE_HALTED, 2 | INTERRUPTS), "idle");
        assert!(!is_final(KVM_MP_STATE_RUNNABLE, 2), "spins");
        assert!(is_final(KVM_MP_STATE_UNINITIALIZED, 2));
    }

    #[test]
    fn a_vm_ends_when_all_vcpus_are_found_at_the_same_places_twice() {
        let halts = Halts::new(2);
        let mut looks = Looks::default();
        let mut look = |exits, found: &[(u8, u64)]| {
            for (id, at) in found {
                halts.found(*id, *at);
            }
            looks.look(exits, &halts)
        };
        assert_eq!(look(Some(5), &[]), Next::Wait);
        assert_eq!(look(Some(5), &[]), Next::Interrupt);
        assert_eq!(look(Some(5), &[(0, 7)]), Next::Interrupt, "one is idle");
        assert_eq!(look(Some(5), &[(0, 7), (1, 9)]), Next::Interrupt);
        assert_eq!(look(Some(6), &[(0, 7), (1, 9)]), Next::Wait, "it has run");
        assert_eq!(look(Some(6), &[(0, 7), (1, 9)]), Next::Interrupt);
        assert_eq!(look(Some(6), &[(0, 8), (1, 9)]), Next::Interrupt, "moved");
        assert_eq!(look(Some(6), &[(0, 8), (1, 0)]), Next::Interrupt);
        assert_eq!(look(Some(6), &[(0, 8), (1, 0)]), Next::End);
    }

    #[test]
    fn a_host_that_counts_no_exits_finds_it_too() {
        let halts = Halts::new(1);
        let mut looks = Looks::default();
        assert_eq!(looks.look(None, &halts), Next::Interrupt);
        for expected in [Next::Interrupt, Next::End] {
            halts.found(0, 7);
            assert_eq!(looks.look(None, &halts), expected);
        }
    }
}
