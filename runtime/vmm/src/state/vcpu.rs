// SPDX-License-Identifier: Apache-2.0
//! The state of one vCPU, and the order in which KVM has to be asked for it and gets it back. The order is most of what
//! there is to know here: KVM changes some of a vCPU's state when other state is read or set.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_SMM, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpuid::{self, Leaf};
use super::msrs::{self, Msr, MsrError};
use super::refusal::Refusal;
use super::{Host, TransferError};
use crate::bounded::bounded;
use crate::{cpu, sys};

/// The largest XSAVE area that exists has 11 KiB.
pub(super) const MOST_XSAVE_WORDS: usize = 4096;
/// Of the type of a task's segment.
const TSS_BUSY: u8 = 2;
/// Frequencies of TSCs that differ by less are the same: it is what KVM tolerates, and how well they are measured.
const TOLERATED_PPM: u64 = 250;

/// The state of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    pub(super) run_state: kvm_mp_state,
    pub(super) registers: kvm_regs,
    pub(super) special: kvm_sregs,
    #[serde(deserialize_with = "bounded::<MOST_XSAVE_WORDS, _, _>")]
    pub(super) xsave: Vec<u32>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debug: kvm_debugregs,
    pub(super) apic: kvm_lapic_state,
    pub(super) tsc_khz: u32,
    /// What KVM adds to the host's TSC.
    pub(super) tsc_offset: u64,
    #[serde(deserialize_with = "bounded::<KVM_MAX_CPUID_ENTRIES, _, _>")]
    pub(super) leaves: Vec<Leaf>,
    #[serde(deserialize_with = "bounded::<KVM_MAX_MSR_ENTRIES, _, _>")]
    pub(super) msrs: Vec<Msr>,
    pub(super) events: kvm_vcpu_events,
}

/// By how much the offsets of all TSCs differ from those in the state.
pub(super) type TscShift = u64;

impl VcpuState {
    /// Takes the state of vCPU `id`, which must be parked.
    pub fn capture(host: &Host, vm: &VmFd, vcpu: &VcpuFd, id: u8) -> Result<Self, TransferError> {
        let failed = |what| {
            move |source| TransferError::Vcpu {
                what,
                vcpu: id,
                source,
            }
        };
        Ok(Self {
            // First: before it answers, KVM handles an INIT or SIPI that is pending, which changes all registers.
            run_state: vcpu.get_mp_state().map_err(failed("read the run state"))?,
            registers: vcpu.get_regs().map_err(failed("read registers"))?,
            special: vcpu.get_sregs().map_err(failed("read special registers"))?,
            xsave: sys::xsave(vm, vcpu).map_err(failed("read the XSAVE area"))?,
            xcrs: vcpu
                .get_xcrs()
                .map_err(failed("read extended control registers"))?,
            debug: vcpu
                .get_debug_regs()
                .map_err(failed("read debug registers"))?,
            apic: vcpu.get_lapic().map_err(failed("read the local APIC"))?,
            tsc_khz: vcpu
                .get_tsc_khz()
                .map_err(failed("read the TSC's frequency"))?,
            tsc_offset: sys::tsc_offset(vcpu)
                .map_err(failed("read the TSC's offset (Linux 5.16 and later)"))?,
            // As KVM answers now, and not worked out once more: the guest has seen this. As many leaves as this VMM sets,
            // because some KVMs do not say how many there are (Linux 6.1).
            leaves: cpuid::leaves(
                &vcpu
                    .get_cpuid2(host.cpuid.as_slice().len())
                    .map_err(failed("read CPUID"))?,
            ),
            msrs: msrs::capture(vcpu, &host.msrs).map_err(of_msr("read", id))?,
            // Last, because reading other state can still move an event on.
            events: vcpu
                .get_vcpu_events()
                .map_err(failed("read pending events"))?,
        })
    }

    /// Whether the guest has started this vCPU.
    pub(super) fn was_started(&self) -> bool {
        self.run_state.mp_state != KVM_MP_STATE_UNINITIALIZED
    }

    /// Says whether this is the state of vCPU `id` of `count` as this host could have made it.
    pub(super) fn check(&self, host: &Host, id: u8, count: u8) -> Result<(), Refusal> {
        // So no state gives a guest more of KVM than a boot does: nested virtualization, counters.
        let own = cpuid::leaves(&cpu::vcpu_cpuid(&host.cpuid, id, count));
        cpuid::compare(&self.leaves, &own).map_err(Refusal::Features)?;
        let is_known = |msr: &Msr| host.msrs.contains(&msr.index);
        match self.msrs.iter().all(is_known) && tsc_of(&self.msrs).is_some() {
            true => Ok(()),
            false => Err(Refusal::Foreign(None)),
        }
    }

    /// Gives the state to vCPU `id`. `shift` is what this returned for vCPU 0, which comes first.
    pub(super) fn restore(
        &self,
        host: &Host,
        vm: &VmFd,
        vcpu: &VcpuFd,
        id: u8,
        shift: Option<TscShift>,
    ) -> Result<TscShift, TransferError> {
        let failed = |what| {
            move |source| TransferError::Vcpu {
                what,
                vcpu: id,
                source,
            }
        };
        // Before all that counts in ticks.
        self.set_frequency(host, vcpu, id)?;
        // Before all that a CPU may lack: KVM refuses bits of registers that CPUID does not announce.
        vcpu.set_cpuid2(&self.cpuid().map_err(failed("restore CPUID"))?)
            .map_err(failed("restore CPUID"))?;
        vcpu.set_mp_state(self.run_state)
            .map_err(failed("restore the run state"))?;
        vcpu.set_regs(&self.registers)
            .map_err(failed("restore registers"))?;
        // With them the local APIC's base: whether it is on, and whether it is an x2APIC.
        vcpu.set_sregs(&self.special_here())
            .map_err(failed("restore special registers"))?;
        sys::set_xsave(vm, vcpu, &self.xsave).map_err(failed("restore the XSAVE area"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(failed("restore extended control registers"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(failed("restore debug registers"))?;
        vcpu.set_lapic(&self.apic)
            .map_err(failed("restore the local APIC"))?;
        let rest = self.msrs.iter().copied();
        let (deadline, rest): (Vec<Msr>, Vec<Msr>) = rest
            .filter(|msr| msr.index != msrs::TSC)
            .partition(|msr| msr.index == msrs::TSC_DEADLINE);
        msrs::restore(vcpu, &rest).map_err(of_msr("write", id))?;
        let shift = self.set_tsc(vcpu, shift).map_err(of_msr("write", id))?;
        // The deadline is the last of the MSRs. It is in ticks of this TSC, and KVM drops it in silence if the local APIC's
        // timer is not in the mode for it yet.
        msrs::restore(vcpu, &deadline).map_err(of_msr("write", id))?;
        // After the registers, with which KVM drops events.
        vcpu.set_vcpu_events(&self.events())
            .map_err(failed("restore pending events"))?;
        // Tells the guest's watchdogs about the pause. Fails for a guest without kvm-clock.
        let _ = vcpu.kvmclock_ctrl();
        Ok(shift)
    }

    fn set_frequency(&self, host: &Host, vcpu: &VcpuFd, id: u8) -> Result<(), TransferError> {
        let failed = |what| {
            move |source| TransferError::Vcpu {
                what,
                vcpu: id,
                source,
            }
        };
        let here = vcpu
            .get_tsc_khz()
            .map_err(failed("read the TSC's frequency"))?;
        if is_same_frequency(self.tsc_khz, here) {
            return Ok(());
        }
        if !host.can_scale_tsc {
            return Err(TransferError::Frequency {
                vcpu: id,
                found: self.tsc_khz,
                here,
            });
        }
        vcpu.set_tsc_khz(self.tsc_khz)
            .map_err(failed("restore the TSC's frequency"))
    }

    /// Lets vCPU 0's TSC go on from its value. The others follow it, because the value of each was read at another moment:
    /// so their distances are kept, which are zero if the guest has not changed them.
    ///
    /// Writes to the register would not do: KVM takes a value within a second of what a TSC has already for an attempt to
    /// make it equal to that of another vCPU, and ignores it. The TSC of a guest that is young would go back.
    fn set_tsc(&self, vcpu: &VcpuFd, shift: Option<TscShift>) -> Result<TscShift, MsrError> {
        let Some(shift) = shift else {
            let here = sys::tsc_offset(vcpu)?;
            let now = msrs::capture(vcpu, &[msrs::TSC])?;
            let (Some(now), Some(saved)) = (tsc_of(&now), tsc_of(&self.msrs)) else {
                return Err(MsrError::Refused(msrs::TSC));
            };
            let offset = here.wrapping_add(saved.wrapping_sub(now));
            sys::set_tsc_offset(vcpu, offset)?;
            return Ok(offset.wrapping_sub(self.tsc_offset));
        };
        sys::set_tsc_offset(vcpu, self.tsc_offset.wrapping_add(shift))?;
        Ok(shift)
    }

    /// The special registers as this CPU has them. KVM shows the task register as busy, as Intel's CPUs have it; AMD's do not
    /// say so (KVM, `svm_get_segment`), and QEMU's refuses user programs the I/O ports that they may use if it is.
    fn special_here(&self) -> kvm_sregs {
        let mut special = self.special;
        if cpuid::is_amd(&self.leaves) {
            special.tr.type_ &= !TSS_BUSY;
        }
        special
    }

    fn cpuid(&self) -> Result<CpuId, Error> {
        let entries: Vec<_> = self.leaves.iter().map(kvm_cpuid_entry2::from).collect();
        CpuId::from_entries(&entries).map_err(|_| Error::new(libc::E2BIG))
    }

    /// The events without system management mode, in which no guest of ours is ever: it has no firmware.
    fn events(&self) -> kvm_vcpu_events {
        kvm_vcpu_events {
            flags: self.events.flags & !KVM_VCPUEVENT_VALID_SMM,
            ..self.events
        }
    }
}

fn tsc_of(registers: &[Msr]) -> Option<u64> {
    let tsc = registers.iter().find(|msr| msr.index == msrs::TSC);
    tsc.map(|msr| msr.data)
}

fn of_msr(what: &'static str, vcpu: u8) -> impl Fn(MsrError) -> TransferError {
    move |error| match error {
        MsrError::Kvm(source) => TransferError::Vcpu {
            what: "transfer model-specific registers",
            vcpu,
            source,
        },
        MsrError::Refused(index) => TransferError::Msr { what, vcpu, index },
    }
}

fn is_same_frequency(found: u32, here: u32) -> bool {
    const MILLION: u64 = 1_000_000;
    let scaled = |number: u32, by: u64| u64::from(number).saturating_mul(by);
    scaled(found.abs_diff(here), MILLION) <= scaled(here, TOLERATED_PPM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_that_differ_by_no_more_than_250_millionths_are_the_same() {
        for (found, here, expected) in [
            (2_000_000, 2_000_000, true),
            (2_000_500, 2_000_000, true),
            (1_999_500, 2_000_000, true),
            (2_000_501, 2_000_000, false),
            (1_999_499, 2_000_000, false),
            (0, 2_000_000, false),
            (u32::MAX, 1, false),
            (0, 0, true),
        ] {
            assert_eq!(is_same_frequency(found, here), expected, "{found} {here}");
        }
    }

    #[test]
    fn no_guest_is_restored_in_system_management_mode() {
        let shape = crate::state::samples::Shape::SMALL;
        for seed in 0..8 {
            let state = crate::state::samples::sample(seed, shape);
            for vcpu in &state.vcpus {
                assert_eq!(vcpu.events().flags & KVM_VCPUEVENT_VALID_SMM, 0);
            }
        }
    }
}
