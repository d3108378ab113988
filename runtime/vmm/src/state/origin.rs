// SPDX-License-Identifier: Apache-2.0
//! Where a state comes from, and so where it can go on: the VMM, the guest's kernel, the kind of CPU. Pure.
//!
//! A guest does not notice that it goes on elsewhere. It has chosen its code by the CPU that it saw at its boot, and the
//! VMM knows by its version what the devices are.

use bulkhead_text::{cut, hex, one_line};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use serde::{Deserialize, Serialize};

use super::Host;
use super::cpuid::{self, Leaf};
use super::refusal::Refusal;
use crate::bounded::bounded;
use crate::config::KernelSum;
use crate::cpu;

/// How much of a stranger's version is shown.
const MOST_VERSION_BYTES: usize = 40;

/// Where a state comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    vmm: String,
    kernel: KernelSum,
    /// What this host gave to vCPU 0 before the guest ran. Which microcode the CPU has is not part of it.
    #[serde(deserialize_with = "bounded::<KVM_MAX_CPUID_ENTRIES, _, _>")]
    leaves: Vec<Leaf>,
}

impl Origin {
    /// The origin of VMs with `vcpus` vCPUs on this host.
    pub(super) fn here(host: &Host, kernel: KernelSum, vcpus: u8) -> Self {
        let leaves = cpuid::leaves(&cpu::vcpu_cpuid(&host.cpuid, 0, vcpus));
        Self::new(env!("CARGO_PKG_VERSION"), kernel, leaves)
    }

    pub(super) fn new(vmm: &str, kernel: KernelSum, leaves: Vec<Leaf>) -> Self {
        Self {
            vmm: vmm.to_owned(),
            kernel,
            leaves,
        }
    }

    /// Says whether what comes from here can go on there.
    pub fn check(&self, here: &Self) -> Result<(), Refusal> {
        if self.vmm != here.vmm {
            let shown = |version: &str| one_line(cut(version, MOST_VERSION_BYTES));
            return Err(Refusal::Vmm {
                found: shown(&self.vmm),
                here: shown(&here.vmm),
            });
        }
        if self.kernel != here.kernel {
            return Err(Refusal::Kernel {
                found: hex(&self.kernel),
                here: hex(&here.kernel),
            });
        }
        let (found, own) = (cpuid::name(&self.leaves), cpuid::name(&here.leaves));
        if found != own {
            return Err(Refusal::Cpu { found, here: own });
        }
        cpuid::compare(&self.leaves, &here.leaves).map_err(Refusal::Features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Origin {
        let leaf = |function, eax| Leaf {
            function,
            index: 0,
            flags: 0,
            registers: [eax, 1, 2, 3],
        };
        Origin::new("1.2.3", [7; 32], vec![leaf(0, 1), leaf(1, 0x6f2)])
    }

    #[test]
    fn a_state_goes_on_only_where_all_is_the_same_and_the_refusal_says_what_is_not() {
        type Change = fn(&mut Origin);
        let table: [(Change, &str); 5] = [
            (
                |origin| origin.vmm = "1.2.4".to_owned(),
                "of VMM 1.2.4, this is 1.2.3",
            ),
            (
                |origin| origin.vmm = format!("9\n{}", "x".repeat(99)),
                "of VMM 9 xxxx",
            ),
            (|origin| origin.kernel[31] = 8, "0708, here it is 0707"),
            (
                |origin| origin.leaves[1].registers[0] = 0x6f3,
                "stepping 3, this host has",
            ),
            (
                |origin| origin.leaves[1].registers[3] = 0x103,
                "leaf 0x1.0 has EDX 0x103",
            ),
        ];
        let here = origin();
        here.check(&here).unwrap();
        for (change, expected) in table {
            let mut other = origin();
            change(&mut other);
            let said = other.check(&here).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
            assert!(said.len() < 300, "{said}");
        }
    }
}
