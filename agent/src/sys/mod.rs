// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of the agent: system calls that have no safe wrapper in rustix.
//!
//! Nothing here makes decisions. Each function is one system call, or one sequence that belongs together.

pub mod bpf;
pub mod spawn;

use std::convert::Infallible;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;
use tokio::io::unix::AsyncFd;

pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Moves this single-threaded process into new namespaces.
pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: CLONE_FILES is never passed, so descriptors stay what their owners think they are.
    unsafe { rustix::thread::unshare_unsafe(flags.difference(UnshareFlags::FILES)) }?;
    Ok(())
}

/// Takes over a descriptor that the parent placed at a fixed number, and makes it close on exec.
///
/// Call it only once per number, and before the process opens anything.
pub fn inherited_fd(number: c_int) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with F_SETFD takes no pointer and fails on a number that is not open.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    check(result.into())?;
    // SAFETY: the call above showed that it is open; the caller asks once, so it has one owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes `fd` non-blocking and registers it with the runtime.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: an OwnedFd stays the same open descriptor for as long as the AsyncFd that owns it lives.
    let watched = unsafe { AsyncFd::register(fd) };
    watched.map_err(io::Error::from)
}

/// Writes one byte to an I/O port.
pub fn write_port(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: takes no pointer; it only allows this thread to use the port.
    let result = unsafe { libc::ioperm(port.into(), 1, 1) };
    check(result.into())?;
    // SAFETY: the port is allowed (above); `out` touches no memory of ours and no flags.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags))
    };
    Ok(())
}

/// Replaces the program. Returns only if that fails.
pub fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Result<Infallible> {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer and point to strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    Err(io::Error::last_os_error())
}

/// Sets every signal to its default action and unblocks all signals.
pub fn reset_signals() -> io::Result<()> {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL installs no code of ours. Signals that cannot be set answer EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_signal_mask(0)
}

/// Makes the kernel collect this process's children.
pub fn ignore_child_exits() -> io::Result<()> {
    // SAFETY: SIG_IGN installs no code of ours.
    let previous = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if previous == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the calling thread's mask of blocked signals (bit n-1 for signal n).
fn set_signal_mask(mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads eight bytes at the address of a live u64.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
    check(result).map(drop)
}

/// Sends any signal, including real-time signals, to the process behind a pidfd.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo means what kill(2) would send.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    };
    check(result).map(drop)
}

/// `kill(2)`. rustix's signal type has no real-time signals.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: takes no pointer.
    let result = unsafe { libc::kill(pid, signal) };
    check(result.into()).map(drop)
}

/// Sets attributes that restrict the mount `target`, such as read-only, with `mount_setattr(2)`. If `recursive`, also
/// on all mounts below it.
pub fn set_mount_attributes(
    target: BorrowedFd<'_>,
    attributes: u64,
    recursive: bool,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    mount_setattr(target, &attr, recursive)
}

/// Sets whether later mounts below the original of `target` also appear below `target`. Applies to the whole tree.
pub fn set_propagation(
    target: BorrowedFd<'_>,
    propagation: MountPropagationFlags,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation: propagation.bits().into(),
        userns_fd: 0,
    };
    mount_setattr(target, &attr, true)
}

/// Turns the detached mount `target` into an idmapped mount: its owners are shown as the user namespace maps them.
pub fn map_owners(target: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.as_raw_fd().unsigned_abs().into(),
    };
    mount_setattr(target, &attr, false)
}

fn mount_setattr(
    target: BorrowedFd<'_>,
    attr: &libc::mount_attr,
    recursive: bool,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a C string, and the size is that of the structure behind the pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            target.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// Loads a classic BPF program as this process's seccomp filter.
pub fn load_seccomp(program: &mut [libc::sock_filter], flags: u32) -> io::Result<()> {
    let len =
        u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let prog = libc::sock_fprog {
        len,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: `prog` describes a live slice of exactly `len` instructions; the kernel copies it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const prog,
        )
    };
    check(result).map(drop)
}

/// Creates a session keyring, so that containers do not share keys.
pub fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<c_char>(),
        )
    };
    check(result).map(drop)
}

/// Sends a request to device-mapper. The kernel writes at most `data_size` bytes, a field in the buffer. The
/// function checks that this is the length of `buffer`.
pub fn dm_ioctl(control: impl AsFd, request: libc::c_ulong, buffer: &mut [u8]) -> io::Result<()> {
    const DATA_SIZE: std::ops::Range<usize> = 12..16;
    let declared = buffer
        .get(DATA_SIZE)
        .and_then(|b| <[u8; 4]>::try_from(b).ok())
        .map(u32::from_ne_bytes);
    if declared.and_then(|n| usize::try_from(n).ok()) != Some(buffer.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the buffer is as long as it declares (checked above), so the kernel stays inside.
    let result = unsafe { libc::ioctl(control.as_fd().as_raw_fd(), request, buffer.as_mut_ptr()) };
    check(result.into()).map(drop)
}

/// Writes the content of an ext4 journal to the file system, and discards the journal's blocks.
pub fn empty_journal(root: impl AsFd) -> io::Result<()> {
    const EXT4_IOC_CHECKPOINT: libc::c_ulong = 0x4004_662b;
    const DISCARD: u32 = 1;
    let flags = DISCARD;
    let fd = root.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one u32, which is alive for the whole call.
    let result = unsafe { libc::ioctl(fd, EXT4_IOC_CHECKPOINT, &raw const flags) };
    check(result.into()).map(drop)
}

/// Adds `entropy` to the kernel's pool, credits it, and reseeds the generator at once.
pub fn add_entropy(random: impl AsFd, entropy: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let bytes = i32::try_from(entropy.len()).map_err(too_long)?;
    let mut request = Vec::with_capacity(8 + entropy.len());
    request.extend_from_slice(&bytes.saturating_mul(8).to_ne_bytes());
    request.extend_from_slice(&bytes.to_ne_bytes());
    request.extend_from_slice(entropy);
    let fd = random.as_fd().as_raw_fd();
    // SAFETY: a rand_pool_info: bit count, byte count, then exactly that many bytes, all live.
    let result = unsafe { libc::ioctl(fd, RNDADDENTROPY, request.as_ptr()) };
    check(result.into())?;
    // SAFETY: takes no argument.
    let result = unsafe { libc::ioctl(fd, RNDRESEEDCRNG, 0) };
    check(result.into()).map(drop)
}

/// Adds to the wall clock: whole seconds, which may be negative, and nanoseconds, which are not.
pub fn step_clock((seconds, nanoseconds): (i64, i64)) -> io::Result<()> {
    let mut change = timex(libc::ADJ_SETOFFSET | libc::ADJ_NANO);
    change.time.tv_sec = seconds;
    // With ADJ_NANO the field has nanoseconds, whatever its name says.
    change.time.tv_usec = nanoseconds;
    adjust_clock(change)
}

/// Makes the wall clock run faster or slower until it has made up for `nanoseconds`. `constant` says how slowly.
pub fn correct_clock(nanoseconds: i64, constant: u32) -> io::Result<()> {
    let mut change =
        timex(libc::ADJ_OFFSET | libc::ADJ_STATUS | libc::ADJ_TIMECONST | libc::ADJ_NANO);
    change.offset = nanoseconds;
    change.constant = constant.into();
    // Whether the host's clock is right is not known here, so the guest does not claim to be synchronized.
    change.status = libc::STA_PLL | libc::STA_UNSYNC;
    adjust_clock(change)
}

fn timex(modes: u32) -> libc::timex {
    // SAFETY: the structure has only numbers, for which zero is a value.
    let nothing: libc::timex = unsafe { std::mem::zeroed() };
    libc::timex { modes, ..nothing }
}

fn adjust_clock(mut change: libc::timex) -> io::Result<()> {
    // SAFETY: the kernel reads and writes one timex, which is alive for the whole call.
    let result = unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &raw mut change) };
    check(result.into()).map(drop)
}
