// SPDX-License-Identifier: Apache-2.0
//! For tests: an interpreter of the BPF instructions that [`super::compile`] uses.

use super::bpf::*;

/// Runs `program` for one system call and returns its verdict.
pub fn run(program: &[u64], arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = [number.to_le_bytes(), arch.to_le_bytes(), [0; 4], [0; 4]].concat();
    args.iter()
        .for_each(|arg| data.extend_from_slice(&arg.to_le_bytes()));
    let (mut pc, mut a) = (0usize, 0u32);
    let program = crate::seccomp::decode(program);
    loop {
        let instruction = program[pc];
        pc += 1;
        let taken = match instruction.code {
            LOAD => {
                let at = instruction.k as usize;
                a = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                continue;
            }
            AND => {
                a &= instruction.k;
                continue;
            }
            JUMP => {
                pc += instruction.k as usize;
                continue;
            }
            RETURN => return instruction.k,
            JUMP_EQUAL => a == instruction.k,
            JUMP_GREATER => a > instruction.k,
            JUMP_GREATER_EQUAL => a >= instruction.k,
            code => panic!("unknown instruction {code:#x}"),
        };
        pc += usize::from(if taken {
            instruction.jt
        } else {
            instruction.jf
        });
    }
}

pub fn verdict(program: &[u64], number: u32, args: [u64; 6]) -> u32 {
    run(program, AUDIT_ARCH_X86_64, number, args)
}

pub const ALLOWED: u32 = 0x7fff_0000;
pub const DENIED: u32 = 0x0005_0001;
