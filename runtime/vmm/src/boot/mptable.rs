// SPDX-License-Identifier: Apache-2.0
//! The MP table (Intel MultiProcessor Specification 1.4): from it a kernel without ACPI learns which
//! CPUs and interrupt lines there are. Pure: builds bytes.

const APIC_ADDRESS: u32 = 0xfee0_0000;
const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const IRQS: u8 = 24;
const SPEC_REVISION: u8 = 4;

const POINTER_BYTES: u8 = 16;
const HEADER_BYTES: usize = 44;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
const ALL_CPUS: u8 = 0xff;

/// Builds the floating pointer and, directly after it, the table, to be written at `address`.
#[must_use]
pub fn build(address: u32, vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        // Bit 0: enabled. Bit 1: boot processor.
        let flags = if id == 0 { 3 } else { 1 };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
        // Family 6, and the features FPU and APIC. The kernel takes the details from CPUID.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&entry);
    }
    add(b"\x01\x00ISA   ");
    let io_apic = vcpus;
    let [a, b, c, d] = IO_APIC_ADDRESS.to_le_bytes();
    add(&[ENTRY_IO_APIC, io_apic, APIC_VERSION, 1, a, b, c, d]);
    for irq in 0..IRQS {
        add(&[ENTRY_INTERRUPT, INT, 0, 0, 0, irq, io_apic, irq]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_CPUS, 1]);
    debug_assert_eq!(entries[usize::from(vcpus) * 20], ENTRY_BUS);

    let mut header = [0; HEADER_BYTES];
    let len = u16::try_from(HEADER_BYTES + entries.len()).unwrap_or(u16::MAX);
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&len.to_le_bytes());
    header[6] = SPEC_REVISION;
    header[8..16].copy_from_slice(b"BULKHEAD");
    header[16..28].copy_from_slice(b"microVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&APIC_ADDRESS.to_le_bytes());
    header[7] = checksum(&[&header, &entries]);

    let mut pointer = [0; POINTER_BYTES as usize];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(address + u32::from(POINTER_BYTES)).to_le_bytes());
    pointer[8] = 1;
    pointer[9] = SPEC_REVISION;
    pointer[10] = checksum(&[&pointer]);
    [pointer.as_slice(), &header, &entries].concat()
}

/// The byte that makes the sum of all bytes zero (modulo 256).
fn checksum(parts: &[&[u8]]) -> u8 {
    let sum = |sum: u8, byte: &u8| sum.wrapping_add(*byte);
    parts.iter().copied().flatten().fold(0, sum).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_are_right() {
        for vcpus in [1, 2, 64] {
            let bytes = build(0x9fc00, vcpus);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(sum(pointer), 0);
            assert_eq!(
                u32::from_le_bytes(pointer[4..8].try_into().unwrap()),
                0x9fc10
            );
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(sum(table), 0);
            let len = u16::from_le_bytes(table[4..6].try_into().unwrap());
            assert_eq!(usize::from(len), table.len());
            let count = u16::from_le_bytes(table[34..36].try_into().unwrap());
            assert_eq!(count, u16::from(vcpus) + 1 + 1 + 24 + 2);
            assert_eq!(table.len(), 44 + usize::from(vcpus) * 20 + (2 + 24 + 2) * 8);
        }
    }
}
