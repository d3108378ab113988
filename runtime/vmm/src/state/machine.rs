// SPDX-License-Identifier: Apache-2.0
//! The state of what all vCPUs share: kvm-clock, the two PICs and the IO-APIC. There is no PIT.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::TransferError;
use super::refusal::Refusal;

/// In the order in which they are restored: the IO-APIC delivers what it has pending at once.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The state of a VM apart from its vCPUs.
#[allow(missing_debug_implementations)]
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// kvm-clock, in nanoseconds.
    pub(super) clock: u64,
    pub(super) chips: [kvm_irqchip; 3],
}

impl VmState {
    /// Call it after the vCPUs' states were taken: taking one may move an interrupt on.
    pub fn capture(vm: &VmFd) -> Result<Self, TransferError> {
        let failed = |what| move |source| TransferError::Vm { what, source };
        let clock = vm.get_clock().map_err(failed("read kvm-clock"))?.clock;
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut chips {
            vm.get_irqchip(chip)
                .map_err(failed("read an interrupt controller"))?;
        }
        Ok(Self { clock, chips })
    }

    pub(super) fn check(&self) -> Result<(), Refusal> {
        match self.chips.each_ref().map(|chip| chip.chip_id) == CHIPS {
            true => Ok(()),
            false => Err(Refusal::Foreign(None)),
        }
    }

    /// Call it after the vCPUs' states were given: the IO-APIC sends what it has pending to their local APICs.
    pub(super) fn restore(&self, vm: &VmFd) -> Result<(), TransferError> {
        let failed = |what| move |source| TransferError::Vm { what, source };
        // Without flags: the guest's clock stood still. With KVM_CLOCK_REALTIME it would jump by the time in between, and
        // with it the guest's monotonic clock. The time of day is set by the agent.
        let clock = kvm_clock_data {
            clock: self.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(failed("set kvm-clock"))?;
        for chip in &self.chips {
            vm.set_irqchip(chip)
                .map_err(failed("set an interrupt controller"))?;
        }
        Ok(())
    }
}
