// SPDX-License-Identifier: Apache-2.0
//! Starting a copy of this binary: `clone(CLONE_VM | CLONE_VFORK)`, then exec.
//!
//! No page table is copied and one call makes the PID namespace too, so a container costs one
//! process. Between clone and exec the child only makes system calls, on a stack of its own.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::fcntl_dupfd_cloexec;

use super::{check, set_signal_mask};

const STACK_BYTES: usize = 64 << 10;
/// Inherited descriptors are first moved above the numbers they will get in the child.
const FIRST_FREE_FD: RawFd = 64;
const THIS_BINARY: &CStr = c"/proc/self/exe";

/// Whether the child is the first process of a new PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidNamespace {
    New,
    OfChildren,
}

struct Child {
    args: [*const c_char; 3],
    env: [*const c_char; 1],
    fds: *const RawFd,
    fd_count: c_int,
    error: c_int,
}

/// Runs this binary as `role` with `fds` as its descriptors 0, 1, 2, ... and no others.
pub fn spawn_self(role: &CStr, fds: &[BorrowedFd<'_>], namespace: PidNamespace) -> io::Result<i32> {
    let moved = fds
        .iter()
        .map(|fd| fcntl_dupfd_cloexec(fd, FIRST_FREE_FD))
        .collect::<Result<Vec<OwnedFd>, _>>()?;
    let numbers: Vec<RawFd> = moved.iter().map(AsRawFd::as_raw_fd).collect();
    let mut child = Child {
        args: [c"bulkhead-agent".as_ptr(), role.as_ptr(), std::ptr::null()],
        env: [std::ptr::null()],
        fds: numbers.as_ptr(),
        fd_count: c_int::try_from(numbers.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        error: 0,
    };
    let mut flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    if namespace == PidNamespace::New {
        flags |= libc::CLONE_NEWPID;
    }
    let mut stack = vec![0u128; STACK_BYTES / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end.cast::<c_void>();
    // The child has no handlers of ours to run: it must not see a signal before it has exec'd.
    set_signal_mask(u64::MAX)?;
    // SAFETY: `top` is the 16-byte aligned end of a live stack; `child` and what it points to live
    // until the child has exec'd or exited, because CLONE_VFORK suspends us until then.
    let pid = unsafe { libc::clone(start, top, flags, (&raw mut child).cast::<c_void>()) };
    let cloned = check(pid.into());
    set_signal_mask(0)?;
    cloned?;
    if child.error != 0 {
        // It exited before the exec; the reaper collects it.
        return Err(io::Error::from_raw_os_error(child.error));
    }
    Ok(pid)
}

/// The child. Shares the parent's memory, so: no allocation, no lock, no return into Rust's runtime.
extern "C" fn start(argument: *mut c_void) -> c_int {
    let child = argument.cast::<Child>();
    // SAFETY: the parent passed the address of its `Child` and is suspended: we alone use it.
    let child = unsafe { &mut *child };
    for number in 0..child.fd_count {
        // SAFETY: `fds` holds `fd_count` numbers.
        let from = unsafe { child.fds.add(number.unsigned_abs() as usize) };
        // SAFETY: in bounds and initialised, see above.
        let from = unsafe { *from };
        // SAFETY: takes no pointer.
        if unsafe { libc::dup2(from, number) } < 0 {
            return fail(child);
        }
    }
    // SAFETY: null-terminated arrays of C strings that live in the suspended parent.
    unsafe {
        libc::execve(
            THIS_BINARY.as_ptr(),
            child.args.as_ptr(),
            child.env.as_ptr(),
        )
    };
    fail(child)
}

fn fail(child: &mut Child) -> c_int {
    // SAFETY: takes no pointer; answers where this thread's errno is.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: that place is always valid; the parent, whose errno it is, is suspended.
    child.error = unsafe { *errno };
    127
}
