// SPDX-License-Identifier: Apache-2.0
//! The eBPF program that decides which devices a container may use, as runc's default: make any node,
//! open only the harmless ones. Without it CAP_MKNOD, which containers have by default, would be
//! access to the pod's disks.

const CHARACTER: u32 = 2;
const ACCESS_MKNOD: u32 = 1;
/// (major, minor); no minor: all of them.
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

// Registers: 0 the verdict, 1 the context, 2 the type, 3 the access, 4 and 5 the device.
const LOAD_WORD: u8 = 0x61;
const SHIFT_RIGHT: u8 = 0x74;
const AND: u8 = 0x54;
const MOVE: u8 = 0xb4;
const COPY: u8 = 0xbc;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// One instruction each, as the kernel lays them out.
pub fn program() -> Vec<u64> {
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(COPY, 3, 2, 0, 0),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(AND, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    let verdict = |allowed: u32| {
        [
            instruction(MOVE, 0, 0, 0, allowed),
            instruction(EXIT, 0, 0, 0, 0),
        ]
    };
    code.push(instruction(JUMP_NOT_EQUAL, 3, 0, 2, ACCESS_MKNOD));
    code.extend(verdict(1));
    code.push(instruction(JUMP_EQUAL, 2, 0, 2, CHARACTER));
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
    code.extend(verdict(0));
    code
}

fn instruction(opcode: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> u64 {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = immediate.to_le_bytes();
    u64::from_le_bytes([opcode, source << 4 | destination, o0, o1, i0, i1, i2, i3])
}
