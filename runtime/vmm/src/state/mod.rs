// SPDX-License-Identifier: Apache-2.0
//! The state of a VM apart from its memory: vCPUs, interrupt controllers, clock, devices. Taken from one VM and given to
//! another that KVM has just made, so that the guest goes on where it was.
//!
//! [`mod@format`] is how a state is written and read; [`origin`] says where it can go on. [`vcpu`] (with [`cpuid`] and [`msrs`])
//! and [`machine`] each own a section: what KVM has to be asked, and the order in which it is given back. Another section
//! is another field of [`State`] and a new version of the format. Called on one thread, while the vCPUs are parked.
//!
//! ```text
//! capture   vCPUs (each by itself), then the VM
//! restore   memory and interrupt controllers exist -> vCPU 0, 1, ... -> clock -> PICs -> IO-APIC -> devices
//! ```
//! What is read may have been written by anybody. A number of things is bounded before they are allocated, and KVM checks
//! what is left: a state can do no more than a guest can, because it can be given to a VM only.
#![deny(clippy::indexing_slicing)]
#![deny(clippy::arithmetic_side_effects)]

mod cpuid;
mod format;
pub mod machine;
mod msrs;
#[cfg(test)]
mod on_kvm;
pub mod origin;
pub mod refusal;
#[cfg(test)]
mod samples;
pub mod vcpu;

use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, Error, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::bounded::bounded;
use crate::bus::DeviceStates;
use crate::config::{KernelSum, MAX_VCPUS};
use crate::cpu;
use machine::VmState;
use origin::Origin;
use refusal::Refusal;
use vcpu::VcpuState;

pub use format::MOST_BYTES;

const MOST_VCPUS: usize = MAX_VCPUS as usize;

/// Why a state could not be taken from KVM or given to it.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("{what} of vCPU {vcpu}")]
    Vcpu {
        what: &'static str,
        vcpu: u8,
        source: Error,
    },
    #[error("{what}")]
    Vm { what: &'static str, source: Error },
    #[error("KVM refuses to {what} the model-specific register {index:#x} of vCPU {vcpu}")]
    Msr {
        what: &'static str,
        vcpu: u8,
        index: u32,
    },
    #[error(
        "the guest's TSC has {found} kHz, vCPU {vcpu} here has {here} kHz, and this host's CPU cannot scale it: restore \
         on a host with that frequency, or boot anew"
    )]
    Frequency { vcpu: u8, found: u32, here: u32 },
    #[error("refuse the state")]
    Refused(#[from] Refusal),
}

/// What has to be known of this host's KVM to take states and to give them back.
#[derive(Clone, Debug)]
pub struct Host {
    cpuid: CpuId,
    msrs: Vec<u32>,
    can_scale_tsc: bool,
}

impl Host {
    pub fn of(kvm: &Kvm) -> Result<Self, TransferError> {
        let failed = |what| move |source| TransferError::Vm { what, source };
        let cpuid = cpu::host_cpuid(kvm).map_err(failed("read supported CPUID"))?;
        let msrs = msrs::saved(kvm).map_err(failed("list model-specific registers"))?;
        Ok(Self {
            cpuid,
            msrs,
            can_scale_tsc: kvm.check_extension(Cap::TscControl),
        })
    }

    /// What it offers to guests, see [`cpu::host_cpuid`].
    pub(crate) fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }
}

/// How many vCPUs the guest was told that there may be.
fn told_vcpus(vcpus: &[VcpuState]) -> u8 {
    let told = vcpus
        .first()
        .and_then(|first| cpuid::told_vcpus(&first.leaves));
    told.unwrap_or(0)
}

/// The state of a VM. Each field is a section of the format.
#[allow(missing_debug_implementations)]
#[derive(Clone, Serialize, Deserialize)]
pub struct State {
    origin: Origin,
    vm: VmState,
    #[serde(deserialize_with = "bounded::<MOST_VCPUS, _, _>")]
    vcpus: Vec<VcpuState>,
    devices: DeviceStates,
}

impl State {
    /// Takes the state of a VM whose guest kernel has the sum `kernel`. All vCPUs must be parked, see
    /// [`crate::vcpu::Gate`]: what KVM still has to do for an access to a device is in no state. `devices` were frozen before,
    /// because they send interrupts.
    pub fn capture(
        host: &Host,
        kernel: KernelSum,
        vm: &VmFd,
        vcpus: &[VcpuFd],
        devices: DeviceStates,
    ) -> Result<Self, TransferError> {
        let count = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        let captured = (0..count).zip(vcpus);
        let captured = captured.map(|(id, vcpu)| VcpuState::capture(host, vm, vcpu, id));
        let vcpus = captured.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            origin: Origin::here(host, kernel, told_vcpus(&vcpus).max(count)),
            // After the vCPUs, so that the clock is not behind their TSCs: kvm-clock never goes back.
            vm: VmState::capture(vm)?,
            vcpus,
            devices,
        })
    }

    /// The state of the devices.
    #[must_use]
    pub fn devices(&self) -> &DeviceStates {
        &self.devices
    }

    /// Says whether this state can go on here, in a VM with so many vCPUs. It may have fewer than the state if the guest has
    /// never started the others.
    pub fn check(&self, host: &Host, kernel: KernelSum, vcpus: usize) -> Result<(), Refusal> {
        let found = self.vcpus.len();
        let started = self.vcpus.iter().rposition(VcpuState::was_started);
        let least = started.map_or(1, |last| last.saturating_add(1));
        let count = match u8::try_from(found) {
            Ok(count @ 1..) if (least..=found).contains(&vcpus) => {
                // A fork may have fewer vCPUs than its template, which is what its guest knows of.
                told_vcpus(&self.vcpus).min(MAX_VCPUS).max(count)
            }
            _ => {
                return Err(Refusal::Vcpus {
                    found,
                    least,
                    here: vcpus,
                });
            }
        };
        self.origin.check(&Origin::here(host, kernel, count))?;
        self.vm.check()?;
        for (id, vcpu) in (0..count).zip(&self.vcpus) {
            vcpu.check(host, id, count)?;
        }
        Ok(())
    }

    /// Gives the state to a VM that has never run. Its vCPUs exist and are not set up, and it has the guest's memory as it
    /// was: KVM writes to some of it when registers are set (kvm-clock, steal time, asynchronous page faults).
    pub fn restore(
        &self,
        host: &Host,
        kernel: KernelSum,
        vm: &VmFd,
        vcpus: &[VcpuFd],
    ) -> Result<(), TransferError> {
        self.check(host, kernel, vcpus.len())?;
        let mut shift = None;
        for (id, (state, vcpu)) in (0..MAX_VCPUS).zip(self.vcpus.iter().zip(vcpus)) {
            shift = Some(state.restore(host, vm, vcpu, id, shift)?);
        }
        // After all TSCs: KVM derives the clock from them as long as they agree.
        self.vm.restore(vm)
    }
}

/// What the fuzz target needs.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing {
    pub use super::format::seal;
    use super::{CpuId, Host, TransferError, msrs};

    /// A host whose KVM has no CPUID leaves, and no register but the TSC.
    pub fn host() -> Result<Host, TransferError> {
        let cpuid = CpuId::new(0).map_err(|_| TransferError::Vm {
            what: "make a table",
            source: kvm_ioctls::Error::new(libc::ENOMEM),
        })?;
        Ok(Host {
            cpuid,
            msrs: vec![msrs::TSC],
            can_scale_tsc: false,
        })
    }
}
