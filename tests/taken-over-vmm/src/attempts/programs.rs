// SPDX-License-Identifier: Apache-2.0
//! Other programs, and other ways to run code and to make calls.

use std::ffi::CStr;

use libc::{
    AT_EMPTY_PATH, EACCES, EINVAL, ENOENT, ENOEXEC, ENOSYS, EPERM, MAP_ANONYMOUS, MAP_PRIVATE,
    MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE, RLIMIT_NPROC,
};

use super::calls::done;
use crate::attempt::Answer::{No, Works};
use crate::attempt::Attempt;
use crate::world::{Tried, World, call};

/// `getpid` of programs of 32 bits.
const GETPID_OF_32_BITS: i32 = 20;
const READ_IMPLIES_EXEC: i32 = 0x0040_0000;
const EXIT_CODE: i32 = 7;

/// An ELF program of one segment that exits with [`EXIT_CODE`]: `mov edi, 7; mov eax, 60; syscall`.
const PROGRAM: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\
    \x02\0\x3e\0\x01\0\0\0\x78\0\x40\0\0\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
    \0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0\
    \x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\x40\0\0\0\0\0\
    \x84\0\0\0\0\0\0\0\x84\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\
    \xbf\x07\0\0\0\xb8\x3c\0\0\0\x0f\x05";

fn execute(world: &World, fd: i32, path: &CStr, flags: i32) -> Result<usize, i32> {
    let none = [0usize];
    call!(world, execveat, fd, path, &none, &none, flags)
}

/// Runs a program of its own from memory.
fn run_from_memory(world: &World) -> Tried {
    let file = call!(world, memfd_create, c"program", 0)?;
    let file = i32::try_from(file).unwrap_or(-1);
    call!(world, write, file, PROGRAM, PROGRAM.len())?;
    let status = world.in_child(|world| {
        let _ = execute(world, file, c"", AT_EMPTY_PATH);
    })?;
    match libc::WEXITSTATUS(status) {
        EXIT_CODE => Ok(true),
        _ => Err(EACCES),
    }
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("run a shell", &[No(ENOENT)], |w| {
        let none = [0usize];
        done(call!(w, execve, c"/bin/sh", &none, &none))
    }),
    Attempt::refused("run its own program again", &[No(ENOENT)], |w| {
        done(execute(w, libc::AT_FDCWD, c"/proc/self/exe", 0))
    }),
    Attempt::refused(
        "run the guest's kernel as a program",
        &[No(EACCES), No(ENOEXEC)],
        |w| done(execute(w, w.held.kernel, c"", AT_EMPTY_PATH)),
    ),
    Attempt::refused(
        "run a layer as a program",
        &[No(EACCES), No(ENOEXEC)],
        |w| done(execute(w, w.held.layer, c"", AT_EMPTY_PATH)),
    ),
    Attempt::refused(
        "run the scratch disk as a program",
        &[No(EACCES), No(libc::ETXTBSY)],
        |w| done(execute(w, w.held.scratch, c"", AT_EMPTY_PATH)),
    ),
    Attempt::harmless(
        "run a program from memory (`memfd_create`, `execveat`)",
        &[Works, No(EACCES), No(ENOSYS)],
        "the program is in the same jail",
        run_from_memory,
    ),
    Attempt::harmless(
        "start a process",
        &[Works],
        "it is in the same jail, and the number is limited",
        |w| w.in_child(|_| {}).map(|status| status == 0),
    ),
    Attempt::harmless(
        "map memory that can be written and executed",
        &[Works],
        "new code can do what is in this table",
        |w| {
            let (access, flags) = (
                PROT_READ | PROT_WRITE | PROT_EXEC,
                MAP_PRIVATE | MAP_ANONYMOUS,
            );
            done(call!(w, mmap, 0, 4096, access, flags, -1, 0))
        },
    ),
    Attempt::harmless(
        "make memory executable",
        &[Works],
        "new code can do what is in this table",
        |w| {
            let flags = MAP_PRIVATE | MAP_ANONYMOUS;
            let page = call!(w, mmap, 0, 4096, PROT_READ | PROT_WRITE, flags, -1, 0)?;
            done(call!(w, mprotect, page, 4096, PROT_READ | PROT_EXEC))
        },
    ),
    Attempt::harmless(
        "map the guest's kernel as code",
        &[Works, No(EPERM)],
        "new code can do what is in this table",
        |w| {
            let access = PROT_READ | PROT_EXEC;
            done(call!(
                w,
                mmap,
                0,
                4096,
                access,
                MAP_SHARED,
                w.held.kernel,
                0
            ))
        },
    ),
    Attempt::harmless(
        "change its personality",
        &[Works],
        "it is that of this process",
        |w| done(call!(w, personality, READ_IMPLIES_EXEC)),
    ),
    Attempt::harmless(
        "change its segments (`modify_ldt`)",
        &[Works, No(ENOSYS), No(EINVAL)],
        "they are those of this process",
        |w| {
            // Entry 0, a data segment of 32 bits.
            let entry = [0u32, 0, 0xfffff, 0b101_0001];
            let write = 1;
            done(call!(w, modify_ldt, write, &entry, 16))
        },
    ),
    Attempt::harmless(
        "make a call as a program of 32 bits",
        &[
            Works,
            No(ENOSYS),
            crate::attempt::Answer::Signal(libc::SIGSEGV),
        ],
        "it can do what is in this table",
        |w| w.call_of_32_bits(GETPID_OF_32_BITS).map(|_| true),
    ),
    Attempt::refused("raise its own limit of processes", &[No(EPERM)], |w| {
        let limit = [u64::MAX, u64::MAX];
        done(call!(w, prlimit64, 0, RLIMIT_NPROC, &limit, 0))
    }),
    Attempt::refused(
        "load a library of the kernel's (`uselib`)",
        &[No(ENOSYS), No(ENOENT)],
        |w| done(call!(w, uselib, c"/lib/libc.so")),
    ),
];
