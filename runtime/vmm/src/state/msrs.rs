// SPDX-License-Identifier: Apache-2.0
//! The model-specific registers (MSRs) in a vCPU's state: those that a guest may use ([`crate::msr`]) and that KVM keeps,
//! because a guest cannot have changed others.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Error, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::cpu::MSR_MTRR_DEF_TYPE;
use crate::msr;

pub const TSC: u32 = 0x10;
pub const TSC_DEADLINE: u32 = 0x6e0;
const DEBUGCTL: u32 = 0x1d9;
const XSS: u32 = 0xda0;
const WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const ASYNC_PF_ACK: u32 = 0x4b56_4d07;

/// A write to these is a command: KVM writes the time to the guest's memory, or delivers the next page. A guest does it
/// each time it wants that.
const COMMANDS: [u32; 2] = [WALL_CLOCK_NEW, ASYNC_PF_ACK];
/// KVM keeps these and does not list them. It may lack the last two, depending on its version and the CPU. Without XSS,
/// XRSTORS fails in the guest.
const UNLISTED: [u32; 3] = [MSR_MTRR_DEF_TYPE, DEBUGCTL, XSS];
const OPTIONAL: [u32; 2] = [DEBUGCTL, XSS];

/// A register and its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    pub index: u32,
    pub data: u64,
}

/// Why registers were not transferred.
#[derive(Debug)]
pub enum MsrError {
    Kvm(Error),
    /// KVM refuses this one.
    Refused(u32),
}

impl From<Error> for MsrError {
    fn from(error: Error) -> Self {
        Self::Kvm(error)
    }
}

/// The registers that a state has on this host, in the order in which they are set.
pub fn saved(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let listed = kvm.get_msr_index_list()?;
    Ok(chosen(listed.as_slice()))
}

fn chosen(listed: &[u32]) -> Vec<u32> {
    let of_guest = listed.iter().filter(|index| msr::ALLOWED.contains(index));
    let mut chosen: Vec<u32> = of_guest.copied().chain(UNLISTED).collect();
    chosen.retain(|index| !COMMANDS.contains(index));
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

fn table(registers: &[Msr]) -> Result<Msrs, Error> {
    let entries = registers.iter().map(|&Msr { index, data }| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let entries: Vec<_> = entries.collect();
    Msrs::from_entries(&entries).map_err(|_| Error::new(libc::E2BIG))
}

/// Reads registers.
pub fn capture(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, MsrError> {
    let wanted: Vec<Msr> = indices
        .iter()
        .map(|&index| Msr { index, data: 0 })
        .collect();
    let mut found = Vec::new();
    let mut left = wanted.as_slice();
    // KVM handles a table in its order, and stops at the first register that it refuses.
    while !left.is_empty() {
        let mut read = table(left)?;
        let count = vcpu.get_msrs(&mut read)?;
        let done = read.as_slice().iter().take(count);
        found.extend(done.map(|entry| Msr {
            index: entry.index,
            data: entry.data,
        }));
        left = match left.get(count..).and_then(<[Msr]>::split_first) {
            None => return Ok(found),
            Some((refused, rest)) if OPTIONAL.contains(&refused.index) => rest,
            Some((refused, _)) => return Err(MsrError::Refused(refused.index)),
        };
    }
    Ok(found)
}

/// Writes registers, all of them. KVM refuses to write some that cannot change; that is no failure if they are as they
/// should be.
pub fn restore(vcpu: &VcpuFd, registers: &[Msr]) -> Result<(), MsrError> {
    let mut left = registers;
    while !left.is_empty() {
        let count = vcpu.set_msrs(&table(left)?)?;
        left = match left.get(count..).and_then(<[Msr]>::split_first) {
            None => return Ok(()),
            Some((refused, rest)) => {
                let is = capture(vcpu, &[refused.index])?;
                if !is.contains(refused) {
                    return Err(MsrError::Refused(refused.index));
                }
                rest
            }
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_has_what_a_guest_may_use_and_no_commands() {
        let listed = [
            0x174,
            0x480,
            TSC,
            WALL_CLOCK_NEW,
            TSC_DEADLINE,
            XSS,
            0x4000_0000,
            ASYNC_PF_ACK,
        ];
        let expected = [TSC, 0x174, DEBUGCTL, 0x2ff, TSC_DEADLINE, XSS];
        assert_eq!(chosen(&listed), expected);
    }
}
