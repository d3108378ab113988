// SPDX-License-Identifier: Apache-2.0
//! CPUID leaves in a state, and how those of a guest are compared with what this host offers. Pure.

use std::fmt;

use bulkhead_text::one_line;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// One leaf, or a subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    /// EAX, EBX, ECX, EDX.
    pub registers: [u32; 4],
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        Self {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        }
    }
}

impl From<&Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: &Leaf) -> Self {
        let [eax, ebx, ecx, edx] = leaf.registers;
        Self {
            function: leaf.function,
            index: leaf.index,
            flags: leaf.flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }
}

pub fn leaves(cpuid: &CpuId) -> Vec<Leaf> {
    cpuid.as_slice().iter().map(Leaf::from).collect()
}

/// How many vCPUs the guest was told that there may be, see [`crate::cpu::vcpu_cpuid`].
pub fn told_vcpus(leaves: &[Leaf]) -> Option<u8> {
    let first = leaves.iter().find(|leaf| leaf.function == 1)?;
    let [_, ebx, ..] = first.registers;
    let [_, _, count, _] = ebx.to_le_bytes();
    Some(count)
}

/// A place at which two CPUs differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    function: u32,
    index: u32,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Missing,
    Added,
    Register {
        name: &'static str,
        found: u32,
        here: u32,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (function, index) = (self.function, self.index);
        write!(f, "CPUID leaf {function:#x}.{index} ")?;
        match self.what {
            What::Missing => f.write_str("exists here only"),
            What::Added => f.write_str("does not exist here"),
            What::Register { name, found, here } => {
                write!(f, "has {name} {found:#x}, here {here:#x}")
            }
        }
    }
}

/// The bits that KVM changes while a guest runs, because they show other registers of it: whether OSXSAVE, MWAIT, the APIC
/// and OSPKE are on, and how large the enabled parts of the XSAVE area are.
fn shown_state(leaf: &Leaf) -> [u32; 4] {
    match (leaf.function, leaf.index) {
        (0x1, _) => [0, 0, 1 << 27 | 1 << 3, 1 << 9],
        (0x7, 0) => [0, 0, 1 << 4, 0],
        (0xd, 0 | 1) => [0, !0, 0, 0],
        _ => [0; 4],
    }
}

/// The first difference between the leaves of a guest and those that this host would give it.
///
/// All bits are compared, not only those that are known to be features: what a newer CPU may offer without harm, nobody
/// can know for a leaf that is yet to be invented.
pub fn compare(found: &[Leaf], here: &[Leaf]) -> Result<(), Difference> {
    let differ = |leaf: &Leaf, what| Difference {
        function: leaf.function,
        index: leaf.index,
        what,
    };
    for (leaf, own) in found.iter().zip(here) {
        if (leaf.function, leaf.index) != (own.function, own.index) {
            return Err(differ(own, What::Missing));
        }
        if leaf.flags != own.flags {
            let (name, found, here) = ("flags", leaf.flags, own.flags);
            return Err(differ(leaf, What::Register { name, found, here }));
        }
        let ignored = shown_state(own);
        let registers = leaf.registers.into_iter().zip(own.registers);
        for (((found, here), ignored), name) in registers.zip(ignored).zip(REGISTERS) {
            if (found ^ here) & !ignored != 0 {
                return Err(differ(leaf, What::Register { name, found, here }));
            }
        }
    }
    match (found.get(here.len()), here.get(found.len())) {
        (Some(leaf), _) => Err(differ(leaf, What::Added)),
        (None, Some(leaf)) => Err(differ(leaf, What::Missing)),
        (None, None) => Ok(()),
    }
}

/// Vendor, family, model and stepping, for people.
pub fn name(leaves: &[Leaf]) -> String {
    let leaf = |function| {
        let found = leaves.iter().find(|leaf| leaf.function == function);
        found.map_or([0; 4], |leaf| leaf.registers)
    };
    let [_, first, third, second] = leaf(0);
    let vendor = [first, second, third].map(u32::to_le_bytes).concat();
    let vendor = one_line(&String::from_utf8_lossy(&vendor));
    let [signature, ..] = leaf(1);
    let field = |shift, bits: u32| signature.checked_shr(shift).unwrap_or(0) & bits;
    let (mut family, mut model) = (field(8, 0xf), field(4, 0xf));
    if matches!(family, 6 | 15) {
        model |= field(16, 0xf) << 4;
    }
    if family == 15 {
        family = family.saturating_add(field(20, 0xff));
    }
    format!(
        "{vendor} family {family} model {model} stepping {}",
        field(0, 0xf)
    )
}

/// Whether this is the CPU of AMD, or of Hygon, which are its.
pub fn is_amd(leaves: &[Leaf]) -> bool {
    let vendor = leaves.iter().find(|leaf| leaf.function == 0);
    let first = vendor.map(|leaf| leaf.registers[1].to_le_bytes());
    matches!(first.as_ref(), Some(b"Auth" | b"Hygo"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn leaf(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
        Leaf {
            function,
            index,
            flags: 0,
            registers,
        }
    }

    #[test]
    fn a_cpu_has_a_name() {
        let vendor = |text: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
            [0x10, word(0), word(8), word(4)]
        };
        let intel = [
            leaf(0, 0, vendor(b"GenuineIntel")),
            leaf(1, 0, [0x000c_06f2, 0, 0, 0]),
        ];
        assert_eq!(name(&intel), "GenuineIntel family 6 model 207 stepping 2");
        let amd = [
            leaf(0, 0, vendor(b"AuthenticAMD")),
            leaf(1, 0, [0x00a1_0f11, 0, 0, 0]),
        ];
        assert_eq!(name(&amd), "AuthenticAMD family 25 model 17 stepping 1");
        assert!(name(&[]).ends_with("family 0 model 0 stepping 0"));
    }

    #[test]
    fn what_shows_the_state_of_a_guest_is_no_difference_and_all_else_is() {
        let here = [
            leaf(0x1, 0, [0; 4]),
            leaf(0x7, 0, [0; 4]),
            leaf(0xd, 0, [0; 4]),
        ];
        let changes = [
            (0, 2, 1 << 27, None),
            (0, 3, 1 << 9, None),
            (1, 2, 1 << 4, None),
            (2, 1, !0, None),
            (
                0,
                2,
                1 << 28,
                Some("CPUID leaf 0x1.0 has ECX 0x10000000, here 0x0"),
            ),
            (1, 1, 1, Some("CPUID leaf 0x7.0 has EBX 0x1, here 0x0")),
        ];
        for (at, register, bits, expected) in changes {
            let mut found = here;
            found[at].registers[register] ^= bits;
            let said = compare(&found, &here).err().map(|e| e.to_string());
            assert_eq!(said.as_deref(), expected);
        }
        let mut found = here;
        found[1].flags = 1;
        let said = compare(&found, &here).unwrap_err().to_string();
        assert_eq!(said, "CPUID leaf 0x7.0 has flags 0x1, here 0x0");
    }

    #[test]
    fn a_leaf_too_few_or_too_many_is_a_difference() {
        let all = [leaf(0, 0, [1; 4]), leaf(1, 0, [2; 4]), leaf(7, 0, [3; 4])];
        let without = |at: usize| {
            let mut some = all.to_vec();
            some.remove(at);
            some
        };
        for (found, here, expected) in [
            (all.to_vec(), all.to_vec(), None),
            (
                without(1),
                all.to_vec(),
                Some("CPUID leaf 0x1.0 exists here only"),
            ),
            (
                without(2),
                all.to_vec(),
                Some("CPUID leaf 0x7.0 exists here only"),
            ),
            (
                all.to_vec(),
                without(2),
                Some("CPUID leaf 0x7.0 does not exist here"),
            ),
        ] {
            let said = compare(&found, &here).err().map(|e| e.to_string());
            assert_eq!(said.as_deref(), expected);
        }
    }
}
