// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this crate: making a TAP, and the umask of plugins.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::stat::{Mode, umask};
use tokio::process::Command;

// _IOW('T', 202, int), from linux/if_tun.h; the argument is a struct ifreq.
nix::ioctl_write_ptr_bad!(tun_set_iff, 0x4004_54ca, libc::ifreq);

/// Gives a plugin the usual umask. The daemon's own is stricter, and plugins make files that others read.
pub fn set_usual_umask(plugin: &mut Command) {
    let usual = || {
        umask(Mode::S_IWGRP | Mode::S_IWOTH);
        Ok(())
    };
    // SAFETY: between fork and exec, the closure makes one system call, which is async-signal-safe, and touches no
    // memory of the parent.
    unsafe { plugin.pre_exec(usual) };
}

/// Makes a TAP called `name` in the network namespace of this thread, without packet information and with virtio-net
/// headers. It exists as long as the file descriptor is open.
pub fn make_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less than there is room for, so that the name ends with a NUL byte.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq, which lives for the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
    Ok(file.into())
}
