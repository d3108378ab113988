// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this program: any system call, and what an attacker does without one.

use std::arch::asm;
use std::os::fd::{FromRawFd, OwnedFd};

/// Makes a system call. The error is a number of errno(3).
pub fn call(number: usize, arguments: [usize; 6]) -> Result<usize, i32> {
    let [a, b, c, d, e, f] = arguments;
    let number = number.cast_signed();
    // SAFETY: an address among the arguments is one of a live buffer of the size that the call gets, because only
    // `world::Word` makes arguments. What else a call does to this process is borne by a child that is there for it.
    let result = unsafe { libc::syscall(number as libc::c_long, a, b, c, d, e, f) };
    usize::try_from(result).map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// Makes a system call without arguments as a program of 32 bits does. Its numbers are others.
pub fn call_of_32_bits(number: i32) -> i32 {
    let result: i32;
    // SAFETY: the call has no arguments, so it reads and writes no memory; `eax` is the only register that it changes,
    // apart from those that the list names.
    unsafe {
        asm!("int 0x80", inlateout("eax") number => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    result
}

/// Reads memory that is not there.
pub fn crash() {
    // SAFETY: none: this ends the process by SIGSEGV, which is what it is for. The processor, not the compiler, sees the
    // address.
    unsafe {
        asm!("mov {0}, qword ptr [{0}]", inout(reg) 8usize => _, options(nostack, readonly));
    }
}

/// Owns a descriptor that a system call has just returned.
pub fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the caller has it from a system call, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
