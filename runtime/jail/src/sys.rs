// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this crate: system calls that have no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::ptr;

use rustix::thread::UnshareFlags;

/// `KEYCTL_JOIN_SESSION_KEYRING`
const JOIN_SESSION_KEYRING: libc::c_long = 1;

fn check(ret: impl Into<i64>) -> io::Result<()> {
    match ret.into() {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn inherited(fd: i32) -> io::Result<File> {
    // SAFETY: F_SETFD takes no pointer; it fails if `fd` is not open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: `fd` is open, and the configuration says that it is ours; it is taken once, before
    // the process opens files of its own.
    Ok(unsafe { File::from_raw_fd(fd) })
}

pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called before anything owns a descriptor of such a number.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) })
}

/// Forks this process. Returns the child's id in the parent and `None` in the child.
pub fn fork() -> io::Result<Option<i32>> {
    // SAFETY: called while there is one thread, so the child's memory is whole.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Some(child.as_raw())),
        nix::unistd::ForkResult::Child => Ok(None),
    }
}

/// Leaves namespaces of the parent.
pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the flags are of namespaces; UNSHARE_FILES, which would take descriptors away from
    // other threads, is not used.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

pub fn join_new_session_keyring() -> io::Result<()> {
    let no_name = ptr::null::<libc::c_char>();
    // SAFETY: this request reads no name if the pointer is null.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, no_name) };
    match check(joined) {
        // A kernel without keyrings.
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        joined => joined,
    }
}

/// Lets `handler` run, in the thread that was refused a system call, with SIGSYS and its details.
pub fn on_refused_call(
    handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void),
) -> io::Result<()> {
    // SAFETY: `sigaction` is plain data for which all zeroes is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` lives until after the call; the handler has the type that SA_SIGINFO asks for and makes only
    // calls that are allowed in a signal handler.
    check(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) })
}

/// The number of the refused system call.
pub fn refused_call(info: *mut libc::siginfo_t) -> i32 {
    /// The part of `siginfo_t` that SIGSYS has, `_sigsys` (asm-generic/siginfo.h).
    #[repr(C)]
    struct Refused {
        signo: libc::c_int,
        errno: libc::c_int,
        code: libc::c_int,
        address: *mut libc::c_void,
        call: libc::c_int,
    }
    // SAFETY: the kernel passes a pointer to a siginfo_t, which for SIGSYS has this layout.
    unsafe { (*info.cast::<Refused>()).call }
}

/// Writes bytes to a descriptor, as a signal handler may.
pub fn write_raw(fd: i32, bytes: &[u8]) {
    // SAFETY: the bytes are readable for the whole call.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// Ends the process, as a signal handler may.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(code) }
}
