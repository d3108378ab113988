// SPDX-License-Identifier: Apache-2.0
//! The model-specific registers (MSRs) that a guest may use. KVM refuses all others with the fault that a CPU without
//! them gives.
//!
//! KVM emulates hundreds: counters, nested virtualization, Hyper-V, machine checks, tracing. Linux 6.12 as it is built in
//! `guest-kernel/` uses those below, which were read from its source. Some exist on one maker's CPUs only, or only with
//! a CPUID bit that a newer KVM may offer. What Linux tries and does without is not here. The registers of the local
//! APIC (0x800 to 0x8ff) cannot be filtered.

use kvm_ioctls::{Error, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

/// How many registers a range covers. The CPUs' makers give out blocks of this size.
const RANGE: u32 = 0x2000;
const RANGE_BYTES: usize = RANGE as usize / 8;
const COMMON: u32 = 0;
const AMD64: u32 = 0xc000_0000;
const AMD_OWN: u32 = 0xc001_0000;
const KVM: u32 = 0x4b56_4d00;
const BASES: [u32; 4] = [COMMON, AMD64, AMD_OWN, KVM];

#[rustfmt::skip]
pub const ALLOWED: &[u32] = &[
    0x10, // TSC
    0x17, // PLATFORM_ID
    0x1b, // APIC_BASE
    0x33, // TEST_CTRL: split locks
    0x3b, // TSC_ADJUST
    0x48, // SPEC_CTRL
    0x49, // PRED_CMD
    0x8b, // BIOS_SIGN_ID and PATCH_LEVEL: the microcode's version
    0xce, // PLATFORM_INFO: whether CPUID can fault
    0xcf, // CORE_CAPABILITIES
    0xe1, // UMWAIT_CONTROL
    0x10a, // ARCH_CAPABILITIES
    0x10b, // FLUSH_CMD
    0x122, // TSX_CTRL
    0x123, // MCU_OPT_CTRL
    0x140, // MISC_FEATURES_ENABLES: lets CPUID fault
    0x174, 0x175, 0x176, // SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP
    0x1a0, // MISC_ENABLE
    0x1c4, 0x1c5, // XFD, XFD_ERR
    0x1d9, // DEBUGCTL: steps by blocks, bus locks
    0x277, // PAT
    0x6a0, 0x6a2, // U_CET, S_CET
    0x6e0, // TSC_DEADLINE
    0xda0, // XSS
    KVM, KVM + 1, // WALL_CLOCK_NEW, SYSTEM_TIME_NEW
    KVM + 2, KVM + 3, KVM + 4, // ASYNC_PF_EN, STEAL_TIME, PV_EOI_EN
    KVM + 5, KVM + 6, KVM + 7, KVM + 8, // POLL_CONTROL, ASYNC_PF_INT, ASYNC_PF_ACK, MIGRATION_CONTROL
    0xc000_0080, // EFER
    0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, // STAR, LSTAR, CSTAR, SYSCALL_MASK
    0xc000_0100, 0xc000_0101, 0xc000_0102, 0xc000_0103, // FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX
    0xc001_0010, 0xc001_0015, // SYSCFG, HWCR
    0xc001_0055, // INT_PENDING_MSG
    0xc001_011f, // VIRT_SPEC_CTRL
    0xc001_1020, 0xc001_1021, 0xc001_1029, 0xc001_102a, // LS_CFG, IC_CFG, DE_CFG, BU_CFG2
];

/// One bit for each register of a range, set if the guest may use it.
fn bitmap(base: u32) -> [u8; RANGE_BYTES] {
    let mut bits = [0; RANGE_BYTES];
    let offsets = ALLOWED.iter().filter_map(|msr| msr.checked_sub(base));
    for offset in offsets.filter(|&offset| offset < RANGE) {
        if let Some(byte) = bits.get_mut(offset as usize / 8) {
            *byte |= 1 << (offset % 8);
        }
    }
    bits
}

/// Refuses the guest all registers that are not in the list.
pub fn filter(vm: &VmFd) -> Result<(), Error> {
    let bitmaps = BASES.map(bitmap);
    let mut ranges = Vec::new();
    for (base, bitmap) in BASES.into_iter().zip(&bitmaps) {
        ranges.push(MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count: RANGE,
            bitmap,
        });
    }
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_allowed(msr: u32) -> bool {
        BASES.into_iter().any(|base| {
            let offset = msr.checked_sub(base).filter(|&offset| offset < RANGE);
            offset.is_some_and(|at| bitmap(base)[at as usize / 8] & (1 << (at % 8)) != 0)
        })
    }

    #[test]
    fn every_register_of_the_list_is_in_a_range() {
        for &msr in ALLOWED {
            assert!(is_allowed(msr), "{msr:#x}");
        }
        let bits = BASES.map(|base| bitmap(base).iter().map(|byte| byte.count_ones()).sum());
        assert_eq!(
            bits.iter().sum::<u32>(),
            u32::try_from(ALLOWED.len()).unwrap()
        );
    }

    #[test]
    fn what_a_guest_has_no_business_with_is_refused() {
        for (msr, what) in [
            (0x3a, "FEAT_CTL"),
            (0x79, "a microcode update"),
            (0x9e, "SMBASE"),
            (0xc1, "a counter of Intel"),
            (0x186, "a counter's event"),
            (0x38f, "GLOBAL_CTRL of the counters"),
            (0x1c8, "last branches"),
            (0x400, "machine checks"),
            (0x480, "nested VMX"),
            (0x491, "nested VMX"),
            (0x570, "Processor Trace"),
            (0x600, "the debug store"),
            (0x4000_0000, "Hyper-V"),
            (0x4000_0200, "Xen"),
            (0xc000_0104, "the TSC's ratio of nested guests"),
            (0xc001_0000, "an event of AMD's counters"),
            (0xc001_0200, "an event of AMD's counters"),
            (0xc001_0114, "VM_CR"),
            (0xc001_0117, "VM_HSAVE_PA"),
            (0xc001_0131, "SEV"),
        ] {
            assert!(!is_allowed(msr), "{msr:#x}: {what}");
        }
    }
}
