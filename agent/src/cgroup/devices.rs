// SPDX-License-Identifier: Apache-2.0
//! The eBPF program that decides which devices a container may use. The default is runc's: any device node may
//! be created, but only harmless devices may be opened. Without this program CAP_MKNOD, which containers have by
//! default, would give access to the pod's disks.

const CHARACTER: u32 = 2;
const ACCESS_MKNOD: u32 = 1;
const ALL_ACCESS: u32 = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;
/// Major and minor numbers. Without a minor number, all of that major number.
const ALLOWED: [(u32, Option<u32>); 9] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(2)), // ptmx
    (136, None),  // pseudo-terminals
    (137, None),
];

// Registers: 0 verdict, 1 context, 2 device type, 3 access, 4 major number, 5 minor number.
const LOAD_WORD: u8 = 0x61;
const SHIFT_RIGHT: u8 = 0x74;
const AND: u8 = 0x54;
const MOVE: u8 = 0xb4;
const COPY: u8 = 0xbc;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// A device that a container may use in addition to the default ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub major: u32,
    pub minor: u32,
    /// Whether it is a block device. Otherwise it is a character device.
    pub block: bool,
    /// The allowed access: bits of `BPF_DEVCG_ACC_*` (linux/bpf.h).
    pub access: u32,
}

pub const ACCESS_READ: u32 = 2;
pub const ACCESS_WRITE: u32 = 4;

/// Builds the program, one number per instruction, in the kernel's layout. It allows the devices in `given`
/// and the default ones.
pub fn program(given: &[Rule]) -> Vec<u64> {
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(COPY, 3, 2, 0, 0),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(AND, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    code.push(instruction(JUMP_NOT_EQUAL, 3, 0, 2, ACCESS_MKNOD));
    code.extend(verdict(1));
    let (blocks, characters): (Vec<Rule>, Vec<Rule>) = given.iter().partition(|rule| rule.block);
    let of_blocks = rules(&blocks);
    // How far to jump for character devices. `given` is bounded, so the distance fits 16 bits.
    let beyond = i16::try_from(of_blocks.len() + 2).unwrap_or(0);
    code.push(instruction(JUMP_EQUAL, 2, 0, beyond, CHARACTER));
    code.extend(of_blocks);
    code.extend(verdict(0));
    for (major, minor) in ALLOWED {
        match minor {
            Some(minor) => {
                code.push(instruction(JUMP_NOT_EQUAL, 4, 0, 3, major));
                code.push(instruction(JUMP_NOT_EQUAL, 5, 0, 2, minor));
            }
            None => code.push(instruction(JUMP_NOT_EQUAL, 4, 0, 2, major)),
        }
        code.extend(verdict(1));
    }
    code.extend(rules(&characters));
    code.extend(verdict(0));
    code
}

/// Instructions that allow what the rules allow, and otherwise fall through.
fn rules(given: &[Rule]) -> Vec<u64> {
    let mut code = Vec::new();
    for rule in given {
        code.push(instruction(JUMP_NOT_EQUAL, 4, 0, 6, rule.major));
        code.push(instruction(JUMP_NOT_EQUAL, 5, 0, 5, rule.minor));
        // Keep the bits that are requested but not allowed. If there are none, allow.
        code.push(instruction(COPY, 0, 3, 0, 0));
        code.push(instruction(AND, 0, 0, 0, !rule.access & ALL_ACCESS));
        code.push(instruction(JUMP_NOT_EQUAL, 0, 0, 2, 0));
        code.extend(verdict(1));
    }
    code
}

fn verdict(allowed: u32) -> [u64; 2] {
    [
        instruction(MOVE, 0, 0, 0, allowed),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

fn instruction(opcode: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> u64 {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = immediate.to_le_bytes();
    u64::from_le_bytes([opcode, source << 4 | destination, o0, o1, i0, i1, i2, i3])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdict of the program, from an interpreter of the few instructions that it uses.
    fn said(code: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> u64 {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 6];
        let mut at = 0;
        loop {
            let [opcode, who, o0, o1, i0, i1, i2, i3] = code[at].to_le_bytes();
            let (to, from) = (usize::from(who & 15), usize::from(who >> 4));
            let offset = usize::try_from(i16::from_le_bytes([o0, o1])).unwrap();
            let immediate = u64::from(u32::from_le_bytes([i0, i1, i2, i3]));
            at += 1;
            match opcode {
                LOAD_WORD => registers[to] = context[offset / 4].into(),
                SHIFT_RIGHT => registers[to] >>= immediate,
                AND => registers[to] &= immediate,
                MOVE => registers[to] = immediate,
                COPY => registers[to] = registers[from],
                JUMP_EQUAL if registers[to] == immediate => at += offset,
                JUMP_NOT_EQUAL if registers[to] != immediate => at += offset,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                EXIT => return registers[0],
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn a_given_device_may_be_used_as_it_was_given_and_no_other() {
        const BLOCK: u32 = 1;
        let (fuse, tun, disk) = ((10, 229), (10, 200), (252, 3));
        let code = program(&[
            Rule {
                major: fuse.0,
                minor: fuse.1,
                block: false,
                access: ACCESS_READ,
            },
            Rule {
                major: tun.0,
                minor: tun.1,
                block: false,
                access: ACCESS_READ | ACCESS_WRITE,
            },
            Rule {
                major: disk.0,
                minor: disk.1,
                block: true,
                access: ACCESS_READ,
            },
        ]);
        let both = ACCESS_READ | ACCESS_WRITE;
        for (kind, access, device, expected) in [
            (CHARACTER, ACCESS_READ, fuse, 1),
            (CHARACTER, ACCESS_WRITE, fuse, 0),
            (CHARACTER, both, fuse, 0),
            (CHARACTER, both, tun, 1),
            (CHARACTER, both, (10, 1), 0),
            (CHARACTER, both, (1, 3), 1),
            (CHARACTER, ACCESS_MKNOD, (10, 1), 1),
            (BLOCK, ACCESS_READ, tun, 0),
            (BLOCK, ACCESS_READ, disk, 1),
            (BLOCK, both, disk, 0),
            (BLOCK, ACCESS_READ, (252, 0), 0),
            (BLOCK, ACCESS_READ, (1, 3), 0),
            (CHARACTER, ACCESS_READ, disk, 0),
            (BLOCK, ACCESS_MKNOD, tun, 1),
        ] {
            let said = said(&code, kind, access, device.0, device.1);
            assert_eq!(said, expected, "{kind} {access} {device:?}");
        }
        assert_eq!(said(&program(&[]), CHARACTER, both, fuse.0, fuse.1), 0);
    }
}
