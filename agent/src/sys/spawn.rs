// SPDX-License-Identifier: Apache-2.0
//! Starts a copy of this binary: `clone(CLONE_VM | CLONE_VFORK)`, then exec.
//!
//! No page table is copied, and the same call creates the PID namespace, so a container needs only one process.
//! Between clone and exec the child only makes system calls, on a stack of its own.
//!
//! With a user namespace, a container needs a second, short-lived process. A PID namespace belongs to the user
//! namespace of the process that creates it, and only a process without other threads can enter a user namespace.

use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::fcntl_dupfd_cloexec;

use super::{check, set_signal_mask};

const STACK_BYTES: usize = 64 << 10;
const STACK_WORDS: usize = STACK_BYTES / size_of::<u128>();
/// Inherited descriptors are first moved above the numbers that they will get in the child.
const FIRST_FREE_FD: RawFd = 64;
const THIS_BINARY: &CStr = c"/proc/self/exe";
const NONE: RawFd = -1;

/// Whether the child becomes the first process of a new PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidNamespace {
    New,
    OfChildren,
}

/// A user namespace in which the child becomes root, and a cgroup, which it has to join before entering.
#[derive(Clone, Copy, Debug)]
pub struct Inside<'a> {
    pub users: BorrowedFd<'a>,
    /// `cgroup.procs`, opened for writing. `None` for the agent's own cgroup.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// What the child needs, and its results. The agent and its children share it, as all their memory, until the exec.
struct Child {
    args: [*const c_char; 3],
    env: [*const c_char; 1],
    fds: *const RawFd,
    fd_count: c_int,
    users: RawFd,
    cgroup: RawFd,
    /// The end of the second process's stack. Null if there is no second process.
    second_stack: *mut c_void,
    second_pid: c_int,
    error: c_int,
}

/// Runs this binary as `role`. The new process has `fds` as its descriptors 0, 1, 2, ... and no others.
pub fn spawn_self(
    role: &CStr,
    fds: &[BorrowedFd<'_>],
    namespace: PidNamespace,
    inside: Option<Inside<'_>>,
) -> io::Result<i32> {
    let moved = |fd: BorrowedFd<'_>| fcntl_dupfd_cloexec(fd, FIRST_FREE_FD);
    let given = fds
        .iter()
        .map(|fd| moved(*fd))
        .collect::<Result<Vec<OwnedFd>, _>>()?;
    let users = inside.map(|inside| moved(inside.users)).transpose()?;
    let cgroup = inside.and_then(|inside| inside.cgroup);
    let cgroup = cgroup.map(moved).transpose()?;
    let number = |fd: &Option<OwnedFd>| fd.as_ref().map_or(NONE, AsRawFd::as_raw_fd);
    let numbers: Vec<RawFd> = given.iter().map(AsRawFd::as_raw_fd).collect();
    let is_second_needed = inside.is_some() && namespace == PidNamespace::New;
    let mut second_stack = vec![0u128; if is_second_needed { STACK_WORDS } else { 0 }];
    let mut child = Child {
        args: [c"bulkhead-agent".as_ptr(), role.as_ptr(), std::ptr::null()],
        env: [std::ptr::null()],
        fds: numbers.as_ptr(),
        fd_count: c_int::try_from(numbers.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        users: number(&users),
        cgroup: number(&cgroup),
        second_stack: if is_second_needed {
            second_stack.as_mut_ptr_range().end.cast::<c_void>()
        } else {
            std::ptr::null_mut()
        },
        second_pid: 0,
        error: 0,
    };
    let mut flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    if namespace == PidNamespace::New && !is_second_needed {
        flags |= libc::CLONE_NEWPID;
    }
    let mut stack = vec![0u128; STACK_WORDS];
    let top = stack.as_mut_ptr_range().end.cast::<c_void>();
    // The child must not run a signal handler of the agent, so block all signals until the exec.
    set_signal_mask(u64::MAX)?;
    // SAFETY: `top` is the 16-byte aligned end of a live stack; `child` and what it points to live
    // until the child has exec'd or exited, because CLONE_VFORK suspends us until then.
    let pid = unsafe { libc::clone(start, top, flags, (&raw mut child).cast::<c_void>()) };
    let cloned = check(pid.into());
    set_signal_mask(0)?;
    cloned?;
    if child.error != 0 {
        // The child exited before the exec. The reaper collects it.
        return Err(io::Error::from_raw_os_error(child.error));
    }
    Ok(if is_second_needed {
        child.second_pid
    } else {
        pid
    })
}

/// The child. It shares the parent's memory, so it must not allocate, lock, or return into Rust's runtime.
extern "C" fn start(argument: *mut c_void) -> c_int {
    let child = argument.cast::<Child>();
    // SAFETY: the parent passed the address of its `Child` and is suspended: we alone use it.
    let child = unsafe { &mut *child };
    if child.users == NONE {
        return become_role(child);
    }
    // SAFETY: reads one byte that lives as long as the program.
    let join = || unsafe { libc::write(child.cgroup, c"0".as_ptr().cast::<c_void>(), 1) };
    if child.cgroup != NONE && join() != 1 {
        return fail(child);
    }
    // SAFETY: takes no pointer.
    if unsafe { libc::setns(child.users, libc::CLONE_NEWUSER) } != 0 {
        return fail(child);
    }
    if child.second_stack.is_null() {
        return become_root(child);
    }
    // CLONE_PARENT makes the agent the parent. The exit signal is then the same as ours, SIGCHLD.
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT | libc::CLONE_NEWPID;
    // SAFETY: as in the parent: the stack and `child` live until the second process has exec'd or exited.
    let pid = unsafe { libc::clone(second, child.second_stack, flags, argument) };
    if pid < 0 {
        return fail(child);
    }
    child.second_pid = pid;
    // SAFETY: takes no pointer; what the agent would do at its exit must not be done here.
    unsafe { libc::_exit(0) }
}

extern "C" fn second(argument: *mut c_void) -> c_int {
    // SAFETY: the first process passed on the address of the agent's `Child` and is suspended like the agent.
    become_root(unsafe { &mut *argument.cast::<Child>() })
}

/// Becomes root in the user namespace, because only root keeps its capabilities over an exec. Uses raw system calls:
/// libc's functions would also change the agent's other threads.
fn become_root(child: &mut Child) -> c_int {
    let zero: c_long = 0;
    // SAFETY: an empty list is not read.
    if unsafe { libc::syscall(libc::SYS_setgroups, zero, std::ptr::null::<libc::gid_t>()) } != 0 {
        return fail(child);
    }
    // SAFETY: takes no pointer.
    if unsafe { libc::syscall(libc::SYS_setresgid, zero, zero, zero) } != 0 {
        return fail(child);
    }
    // SAFETY: takes no pointer.
    if unsafe { libc::syscall(libc::SYS_setresuid, zero, zero, zero) } != 0 {
        return fail(child);
    }
    become_role(child)
}

fn become_role(child: &mut Child) -> c_int {
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

/// Calls `look` with the id of a process that is alone in a new user namespace. Ends that process afterwards.
pub fn in_new_user_namespace<T>(look: impl FnOnce(i32) -> io::Result<T>) -> io::Result<T> {
    let mut stack = vec![0u128; STACK_WORDS];
    let top = stack.as_mut_ptr_range().end.cast::<c_void>();
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    // SAFETY: `top` is the 16-byte aligned end of a stack, which the child has a copy of.
    let pid = unsafe { libc::clone(wait_for_end, top, flags, std::ptr::null_mut()) };
    check(pid.into())?;
    let seen = look(pid);
    super::kill(pid, libc::SIGKILL)?;
    seen
}

/// A copy of this process that only waits.
extern "C" fn wait_for_end(_argument: *mut c_void) -> c_int {
    loop {
        // SAFETY: takes no pointer.
        unsafe { libc::pause() };
    }
}
