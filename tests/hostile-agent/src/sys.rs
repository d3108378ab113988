// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this program: system calls that have no safe wrapper.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::process::{Resource, Rlimit, setrlimit};

const POWER_PORT: u16 = 0x600;
/// Requests of block devices (linux/fs.h).
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
/// Frames have a virtio header before them (linux/if_packet.h).
const PACKET_VNET_HDR: libc::c_int = 15;

/// Makes a constant of the C library fit a field of its structures.
fn fit<T>(number: impl TryInto<T>) -> io::Result<T> {
    let fits = number.try_into().ok();
    fits.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

pub fn raise_open_files(most: u64) -> io::Result<()> {
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// Ends the VM by its power port.
pub fn power_off() {
    // SAFETY: takes no pointer; it only allows this thread to use the port.
    let allowed = unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) };
    if allowed == 0 {
        // SAFETY: the port is allowed (above); `out` touches no memory of ours and no flags.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") POWER_PORT, in("al") 1u8, options(nostack, preserves_flags));
        };
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Erase {
    Discard,
    Zero,
}

/// Discards a part of a disk, or writes zeroes there.
pub fn erase(disk: impl AsFd, how: Erase, start: u64, bytes: u64) -> io::Result<()> {
    let request = match how {
        Erase::Discard => BLKDISCARD,
        Erase::Zero => BLKZEROOUT,
    };
    let range = [start, bytes];
    // SAFETY: the kernel reads two numbers at the address of a live array of two.
    check(unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), request, range.as_ptr()) })
}

/// A socket for raw frames on the interface `name`, which is brought up. Each frame has a virtio header before it.
pub fn frames(name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let protocol = u16::to_be(fit(libc::ETH_P_ALL)?);
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointer.
    let raw = unsafe { libc::socket(libc::AF_PACKET, kind, protocol.into()) };
    check(raw)?;
    // SAFETY: the call above has just returned `raw`; nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all zeroes are a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = (*from).cast_signed();
    }
    request.ifr_ifru.ifru_flags = fit(libc::IFF_UP)?;
    // SAFETY: the kernel reads one ifreq at the address of a live one.
    check(unsafe { libc::ioctl(raw, libc::SIOCSIFFLAGS as _, &raw mut request) })?;
    // SAFETY: the name ends with a zero and outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let on: libc::c_int = 1;
    let size = fit(size_of::<libc::c_int>())?;
    // SAFETY: the kernel reads `size` bytes at the address of a live integer of that size.
    check(unsafe {
        libc::setsockopt(
            raw,
            libc::SOL_PACKET,
            PACKET_VNET_HDR,
            (&raw const on).cast(),
            size,
        )
    })?;
    let address = libc::sockaddr_ll {
        sll_family: fit(libc::AF_PACKET)?,
        sll_protocol: protocol,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = fit(size_of::<libc::sockaddr_ll>())?;
    // SAFETY: the kernel reads `size` bytes at the address of a live structure of that size.
    check(unsafe { libc::bind(raw, (&raw const address).cast(), size) })?;
    Ok(socket)
}
