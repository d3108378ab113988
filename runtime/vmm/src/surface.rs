// SPDX-License-Identifier: Apache-2.0
//! Makes the part of KVM that a guest can reach smaller, before the first vCPU exists. [`crate::cpu`] hides the same
//! things in CPUID.

use std::time::Duration;

use kvm_bindings::{
    KVM_BUS_LOCK_DETECTION_EXIT, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_BUS_LOCK_EXIT,
    KVM_PMU_CAP_DISABLE, KVM_RUN_X86_BUS_LOCK, kvm_enable_cap,
};
use kvm_ioctls::{Error, VmFd};

use crate::msr;

/// How long a vCPU rests after a bus lock. An access across two cache lines can lock the memory bus of the whole host
/// for microseconds. So a vCPU can do a thousand a second, and takes a hundredth of the bus at most. A correct program
/// does none.
const BUS_LOCK_PAUSE: Duration = Duration::from_millis(1);

/// Something that may be switched on for a VM, if the host has it.
struct Wish {
    what: &'static str,
    capability: u32,
    /// The bit that says whether the host has it, and switches it on.
    bit: u32,
}

const WISHES: [Wish; 2] = [
    // Linux 5.18. Counters tell a guest about its neighbours, and emulating them is a large part of KVM.
    Wish {
        what: "switch off the virtual PMU",
        capability: KVM_CAP_PMU_CAPABILITY,
        bit: KVM_PMU_CAP_DISABLE,
    },
    // Linux 5.12 and a CPU that notices bus locks.
    Wish {
        what: "watch for bus locks",
        capability: KVM_CAP_X86_BUS_LOCK_EXIT,
        bit: KVM_BUS_LOCK_DETECTION_EXIT,
    },
];

/// What could not be switched on or off.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct SurfaceError {
    what: &'static str,
    source: Error,
}

/// Call this before the first vCPU is created.
pub fn reduce(vm: &VmFd) -> Result<(), SurfaceError> {
    let failed = |what| move |source| SurfaceError { what, source };
    for wish in WISHES {
        let offered = vm.check_extension_raw(wish.capability.into());
        if !offers(offered, wish.bit) {
            continue;
        }
        let mut request = kvm_enable_cap {
            cap: wish.capability,
            ..Default::default()
        };
        request.args[0] = wish.bit.into();
        vm.enable_cap(&request).map_err(failed(wish.what))?;
    }
    msr::filter(vm).map_err(failed("set the filter of MSRs"))
}

/// Whether KVM's answer to a question about a capability has `bit`.
fn offers(answer: i32, bit: u32) -> bool {
    u32::try_from(answer).is_ok_and(|offered| offered & bit != 0)
}

/// How long a vCPU has to rest after an exit with these flags.
#[must_use]
pub fn rest_after(flags: u16) -> Option<Duration> {
    (u32::from(flags) & KVM_RUN_X86_BUS_LOCK != 0).then_some(BUS_LOCK_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_rests_after_a_bus_lock_whatever_else_its_exit_was() {
        assert_eq!(rest_after(0), None);
        assert_eq!(rest_after(1), None, "system management mode");
        for flags in [2, 3] {
            assert_eq!(rest_after(flags), Some(BUS_LOCK_PAUSE));
        }
    }

    #[test]
    fn only_what_the_host_has_is_asked_for() {
        for (answer, has_it) in [(-1, false), (0, false), (1, false), (2, true), (3, true)] {
            assert_eq!(offers(answer, 2), has_it, "{answer}");
        }
    }
}
