// SPDX-License-Identifier: Apache-2.0
//! Steps that several attempts have in common.

use std::ffi::CStr;

use libc::{AF_INET, AF_UNIX, O_CLOEXEC, O_DIRECTORY, O_RDONLY, SOCK_STREAM};
use syscalls::x86_64::Sysno;

use crate::world::{Tried, Word, World, call};

/// Whether a call succeeded.
pub fn done(result: Result<usize, i32>) -> Tried {
    result.map(|_| true)
}

/// Opens a path.
pub fn open(world: &World, path: &CStr, flags: i32) -> Tried {
    done(call!(
        world,
        openat,
        libc::AT_FDCWD,
        path,
        flags | O_CLOEXEC,
        0o600
    ))
}

/// Whether a directory contains anything.
pub fn list(world: &World, path: &CStr) -> Tried {
    let flags = O_RDONLY | O_DIRECTORY;
    let fd = call!(world, openat, libc::AT_FDCWD, path, flags)?;
    let mut entries = [0u8; 1024];
    let size = entries.len();
    let bytes = call!(world, getdents64, fd, &mut entries, size)?;
    // `.` and `..` take 24 bytes each.
    Ok(bytes > 48)
}

/// An ioctl with a number as its argument.
pub fn ioctl(world: &World, fd: i32, request: u32, argument: i64) -> Tried {
    done(call!(world, ioctl, fd, request, argument))
}

/// An ioctl with a buffer as its argument.
pub fn ioctl_on(world: &World, fd: i32, request: u32, buffer: &mut [u8]) -> Tried {
    done(call!(world, ioctl, fd, request, buffer))
}

/// A new socket.
pub fn socket(world: &World, family: i32, kind: i32, protocol: i32) -> Result<i32, i32> {
    let words = [
        Word::from(family),
        Word::from(kind | libc::SOCK_CLOEXEC),
        Word::from(protocol),
    ];
    world.descriptor(Sysno::socket, &words)
}

/// The address of a path or, after a zero byte, of an abstract name.
pub fn unix_address(name: &[u8]) -> Vec<u8> {
    let family = u16::try_from(AF_UNIX).unwrap_or(0).to_ne_bytes();
    [&family, name].concat()
}

pub fn inet_address(host: [u8; 4], port: u16) -> Vec<u8> {
    let family = u16::try_from(AF_INET).unwrap_or(0).to_ne_bytes();
    [&family, &port.to_be_bytes(), host.as_slice(), &[0; 8]].concat()
}

pub fn connect(world: &World, family: i32, kind: i32, address: &[u8]) -> Tried {
    let socket = socket(world, family, kind, 0)?;
    done(call!(world, connect, socket, address, address.len()))
}

/// Connects to the socket at a path.
pub fn connect_unix(world: &World, path: &[u8]) -> Tried {
    connect(world, AF_UNIX, SOCK_STREAM, &unix_address(path))
}

/// Sends a byte and a control message over a socket.
pub fn send_with(world: &World, fd: i32, kind: i32, body: &[u8]) -> Tried {
    let mut control = Vec::new();
    let length = 16 + body.len();
    control.extend_from_slice(&length.to_ne_bytes());
    control.extend_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    control.extend_from_slice(&kind.to_ne_bytes());
    control.extend_from_slice(body);
    control.resize(control.len().next_multiple_of(8), 0);
    let byte = [0u8];
    let vector = [Word::from(&byte).bits(), 1];
    let message = [
        0,
        0,
        Word::from(&vector).bits(),
        1,
        Word::from(control.as_slice()).bits(),
        control.len(),
        0,
    ];
    done(call!(
        world,
        sendmsg,
        fd,
        &message,
        libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL
    ))
}

/// Refuses what came back for a process that has this number inside by chance.
pub fn of_stranger(world: &World, pid: i32, result: Result<usize, i32>) -> Tried {
    let own = |result: &usize| *result == usize::try_from(pid).unwrap_or(0);
    match result {
        Ok(_) if call!(world, getpid).is_ok_and(|id| own(&id)) => Err(libc::ESRCH),
        result => done(result),
    }
}
