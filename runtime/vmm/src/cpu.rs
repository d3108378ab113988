// SPDX-License-Identifier: Apache-2.0
//! The state of a virtual CPU: its CPUID leaves, model-specific registers and local APIC, and the
//! registers with which it enters a 64-bit kernel. Called at setup only, before any guest code runs.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::boot::Entry;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    #[error("{what} of vCPU {vcpu}")]
    Kvm {
        what: &'static str,
        vcpu: u8,
        source: kvm_ioctls::Error,
    },
    #[error("host CPU has more CPUID leaves or MSRs than KVM takes")]
    TooMany,
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_NMI: u32 = 0x4 << 8;
const APIC_MODE_EXTINT: u32 = 0x7 << 8;
const APIC_MODE_MASK: u32 = 0x7 << 8;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
pub const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, all memory write-back.
const MTRR_ALL_WRITE_BACK: u64 = 1 << 11 | 6;

/// The CPUID leaves that all vCPUs have in common, from what this host supports.
pub fn host_cpuid(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        filter(entry, deadline);
    }
    Ok(cpuid)
}

/// Adds features that KVM emulates and removes those that the guest must not have.
fn filter(entry: &mut kvm_cpuid_entry2, deadline: bool) {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const X2APIC: u32 = 1 << 21;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    const MTRR: u32 = 1 << 12;
    // What belongs to counters and tracing: the debug store with two extensions and PERF_CAPABILITIES in leaf 1,
    // Processor Trace and last branches in leaf 7, AMD's counters and sampling in leaf 0x8000_0001.
    const DEBUG_STORE: u32 = 1 << 21;
    const COUNTING: u32 = 1 << 2 | 1 << 4 | 1 << 15;
    const PROCESSOR_TRACE: u32 = 1 << 25;
    const LAST_BRANCHES: u32 = 1 << 19;
    const MORE_COUNTERS: u32 = 1 << 8;
    const AMD_COUNTING: u32 = 1 << 10 | 1 << 23 | 1 << 24 | 1 << 27 | 1 << 28;
    match entry.function {
        0x1 => {
            // No nested virtualization: it is the largest part of KVM that a guest could attack.
            entry.ecx = (entry.ecx & !(VMX | COUNTING)) | HYPERVISOR | X2APIC;
            // All memory is write-back, so there is nothing to set up. A kernel that sees these registers reads and
            // rewrites all of them, on every CPU, with its caches off.
            entry.edx &= !(MTRR | DEBUG_STORE);
            if deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
        // Thermal and power leaf: keep only ARAT, which says that the APIC timer never stops.
        0x6 => {
            entry.eax &= 1 << 2;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        0x7 if entry.index == 0 => {
            entry.ebx &= !PROCESSOR_TRACE;
            entry.edx &= !LAST_BRANCHES;
        }
        0x7 if entry.index == 1 => entry.eax &= !MORE_COUNTERS,
        // Hide performance counters (0xa, 0x23), SGX (0x12), Processor Trace (0x14), last branches (0x1c), and details
        // of SVM, sampling and counters (0x8000_00xx).
        0xa | 0x12 | 0x14 | 0x1c | 0x23 | 0x8000_000a | 0x8000_001b | 0x8000_0022 => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        0x8000_0001 => entry.ecx &= !(SVM | AMD_COUNTING),
        _ => {}
    }
}

/// The common leaves plus those values that differ from vCPU to vCPU.
pub(crate) fn vcpu_cpuid(shared: &CpuId, vcpu: u8, count: u8) -> CpuId {
    let mut cpuid = shared.clone();
    let (id, total) = (u32::from(vcpu), u32::from(count));
    // The number of bits of an APIC id that select a core within a package.
    let bits = total.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                const CLFLUSH_64: u32 = 8 << 8;
                const HTT: u32 = 1 << 28;
                entry.ebx = id << 24 | total << 16 | CLFLUSH_64 | (entry.ebx & 0xff);
                entry.edx = if count > 1 {
                    entry.edx | HTT
                } else {
                    entry.edx & !HTT
                };
            }
            0x4 => {
                // One thread per core. All cores share the caches of level 3.
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
                let kind = entry.eax & 0x3ff;
                if kind & 0x1f != 0 {
                    entry.eax = kind | sharing << 14 | ((1 << bits) - 1) << 26;
                }
            }
            0xb | 0x1f => {
                let (shift, number, kind) = match entry.index {
                    0 => (0, 1, 1 << 8),
                    1 => (bits, total, 2 << 8),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = number;
                entry.ecx = kind | entry.index;
                entry.edx = id;
            }
            0x8000_0008 => entry.ecx = bits << 12 | (total - 1),
            0x8000_001d => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { total - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14;
            }
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// A flat segment that covers all addresses.
#[must_use]
pub fn segment(selector: u16, kind: u8, dpl: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Sets up vCPU `vcpu` of `count`. The first one starts at `entry`; the others wait until the guest starts them.
pub fn set_up(
    fd: &VcpuFd,
    shared: &CpuId,
    vcpu: u8,
    count: u8,
    entry: &Entry,
) -> Result<(), CpuError> {
    let failed = |what| move |source| CpuError::Kvm { what, vcpu, source };
    fd.set_cpuid2(&vcpu_cpuid(shared, vcpu, count))
        .map_err(failed("set CPUID"))?;
    set_msrs(fd, vcpu)?;
    set_apic_lines(fd).map_err(failed("set local APIC"))?;
    if vcpu == 0 {
        enter_long_mode(fd, entry).map_err(failed("set registers"))?;
    }
    Ok(())
}

/// Sets the model-specific registers that a firmware would set.
fn set_msrs(fd: &VcpuFd, vcpu: u8) -> Result<(), CpuError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ALL_WRITE_BACK),
    ]);
    let msrs = msrs.map_err(|_| CpuError::TooMany)?;
    let set = fd.set_msrs(&msrs).map_err(|source| CpuError::Kvm {
        what: "set MSRs",
        vcpu,
        source,
    })?;
    if set < 2 {
        let source = kvm_ioctls::Error::new(libc::EINVAL);
        let what = "set MSRs";
        return Err(CpuError::Kvm { what, vcpu, source });
    }
    Ok(())
}

/// LINT0 delivers interrupts of the legacy controller (PIC), LINT1 the NMI, as the MP table says.
fn set_apic_lines(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut apic = fd.get_lapic()?;
    let modes = [
        (APIC_LVT_LINT0, APIC_MODE_EXTINT),
        (APIC_LVT_LINT1, APIC_MODE_NMI),
    ];
    for (register, mode) in modes {
        for (index, byte) in (0..4).zip(mode.to_le_bytes()) {
            // The delivery mode is in bits 8 to 10, so only the second byte changes.
            let mask = APIC_MODE_MASK.to_le_bytes()[index].cast_signed();
            if let Some(reg) = apic.regs.get_mut(register + index) {
                *reg = (*reg & !mask) | byte.cast_signed();
            }
        }
    }
    fd.set_lapic(&apic)
}

/// Sets the registers that the 64-bit boot protocol wants (Documentation/x86/boot.rst): paging on,
/// memory identity-mapped, flat segments at 0x10 and 0x18, interrupts off, the zero page's address in RSI.
fn enter_long_mode(fd: &VcpuFd, entry: &Entry) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = fd.get_sregs()?;
    sregs.cs = segment(0x10, 11, 0, true);
    let data = segment(0x18, 3, 0, false);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt.base = entry.gdt;
    sregs.gdt.limit = entry.gdt_limit;
    sregs.cr0 |= CR0_PE | CR0_PG | CR0_ET;
    sregs.cr3 = entry.page_table;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    fd.set_sregs(&sregs)?;
    fd.set_regs(&kvm_regs {
        rip: entry.rip,
        rsi: entry.zero_page,
        rsp: entry.stack,
        rbp: entry.stack,
        rflags: 2,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_differ_where_they_must() {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        let leaves = [leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_0008, 0)];
        let shared = CpuId::from_entries(&leaves).unwrap();
        let cpuid = vcpu_cpuid(&shared, 2, 3);
        let leaves = cpuid.as_slice();
        assert_eq!(leaves[0].ebx, 2 << 24 | 3 << 16 | 8 << 8);
        assert_eq!(leaves[0].edx, 1 << 28);
        assert_eq!((leaves[1].eax, leaves[1].edx), (0, 2));
        assert_eq!((leaves[2].eax, leaves[2].ebx), (2, 3));
        assert_eq!(leaves[3].ecx, 2 << 12 | 2);
    }

    #[test]
    fn counters_and_tracing_are_hidden() {
        for (function, index, expected) in [
            (0x1, 0, [!0, !0, !0x8034, !0x0020_1000]),
            (0x7, 0, [!0, !(1 << 25), !0, !(1 << 19)]),
            (0x7, 1, [!(1 << 8), !0, !0, !0]),
            (0x7, 2, [!0; 4]),
            (0xa, 0, [0; 4]),
            (0x14, 1, [0; 4]),
            (0x1c, 0, [0; 4]),
            (0x23, 1, [0; 4]),
            (0x8000_0001, 0, [!0, !0, !0x1980_0404, !0]),
            (0x8000_0022, 0, [0; 4]),
        ] {
            let mut entry = kvm_cpuid_entry2 {
                function,
                index,
                eax: !0,
                ebx: !0,
                ecx: !0,
                edx: !0,
                ..Default::default()
            };
            filter(&mut entry, false);
            let found = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            assert_eq!(found, expected, "{function:#x} {index}");
        }
    }

    #[test]
    fn nested_virtualization_and_memory_types_are_hidden() {
        let mut entry = kvm_cpuid_entry2 {
            function: 1,
            ecx: 1 << 5,
            edx: 1 << 12 | 1,
            ..Default::default()
        };
        filter(&mut entry, true);
        assert_eq!(entry.ecx, 1 << 31 | 1 << 24 | 1 << 21);
        assert_eq!(entry.edx, 1);
    }
}
