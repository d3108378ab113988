// SPDX-License-Identifier: Apache-2.0
//! Namespaces: new ones, in which it might be root, and those of others.

use libc::{
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER,
    CLONE_NEWUTS, EBADF, EINVAL, ENOSYS, ENOTTY, EPERM, SIGCHLD,
};
use syscalls::x86_64::Sysno;

use super::calls::{done, ioctl};
use crate::attempt::Answer::No;
use crate::attempt::{Answer, Attempt};
use crate::world::{Tried, Word, World, call};

const CLONE_NEWTIME: i32 = 0x80;
/// `SIOCGSKNS` and `TUNGETDEVNETNS` (`_IO('T', 227)`)
const SIOCGSKNS: u32 = 0x894c;
const TUNGETDEVNETNS: u32 = 0x54e3;
const FORBIDDEN: &[Answer] = &[No(EPERM)];

fn unshare(world: &World, flags: i32) -> Tried {
    done(call!(world, unshare, flags))
}

/// The first process of its own PID namespace, as a pidfd.
fn first(world: &World) -> Result<i32, i32> {
    world.descriptor(Sysno::pidfd_open, &[Word::from(1), Word::from(0)])
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("create a user namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWUSER)
    }),
    Attempt::refused("create a mount namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWNS)
    }),
    Attempt::refused("create a PID namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWPID)
    }),
    Attempt::refused("create a network namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWNET)
    }),
    Attempt::refused("create an IPC namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWIPC)
    }),
    Attempt::refused("create a UTS namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWUTS)
    }),
    Attempt::refused("create a cgroup namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWCGROUP)
    }),
    Attempt::refused("create a time namespace", FORBIDDEN, |w| {
        unshare(w, CLONE_NEWTIME)
    }),
    Attempt::refused(
        "start a process in a user namespace (`clone`)",
        FORBIDDEN,
        |w| {
            let flags = CLONE_NEWUSER | CLONE_NEWNET | SIGCHLD;
            match call!(w, clone, flags, 0, 0, 0, 0)? {
                0 => Ok(w.exit(0)),
                _ => Ok(true),
            }
        },
    ),
    Attempt::refused(
        "start a process in a user namespace (`clone3`)",
        &[No(EPERM), No(ENOSYS)],
        |w| {
            let flags = u64::from(CLONE_NEWUSER.cast_unsigned());
            let arguments = [flags, 0, 0, 0, u64::from(SIGCHLD.cast_unsigned()), 0, 0, 0];
            match call!(w, clone3, &arguments, 64)? {
                0 => Ok(w.exit(0)),
                _ => Ok(true),
            }
        },
    ),
    Attempt::refused("enter namespaces by a pidfd", FORBIDDEN, |w| {
        let flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID;
        done(call!(w, setns, first(w)?, flags))
    }),
    Attempt::refused(
        "enter its user namespace again",
        &[No(EINVAL), No(EPERM)],
        |w| done(call!(w, setns, first(w)?, CLONE_NEWUSER)),
    ),
    Attempt::refused(
        "enter a namespace by a descriptor that it holds",
        &[No(EINVAL), No(EBADF)],
        |w| done(call!(w, setns, w.held.ready, 0)),
    ),
    Attempt::refused(
        "get the network namespace of the daemon's socket",
        FORBIDDEN,
        |w| ioctl(w, w.held.ready, SIOCGSKNS, 0),
    ),
    Attempt::refused(
        "get the network namespace of its TAP",
        &[No(EPERM), No(ENOTTY)],
        |w| ioctl(w, w.held.tap, TUNGETDEVNETNS, 0),
    ),
    Attempt::refused("get the socket's namespace of its TAP", FORBIDDEN, |w| {
        ioctl(w, w.held.tap, SIOCGSKNS, 0)
    }),
];
