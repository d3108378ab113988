// SPDX-License-Identifier: Apache-2.0
//! System V and POSIX IPC, and keys.

use libc::{
    EACCES, EDQUOT, EINVAL, ENOENT, ENOKEY, ENOSPC, ENOSYS, EPERM, IPC_CREAT, O_CREAT, O_RDWR,
};

use super::calls::done;
use crate::attempt::Answer::{No, Works};
use crate::attempt::{Answer, Attempt};
use crate::bait::{C_NAME, IPC_KEY, USER_KEYRING};
use crate::world::call;

/// Requests of keyctl(2).
const KEYCTL_READ: i32 = 11;
const KEYCTL_LINK: i32 = 8;
const KEYCTL_GET_PERSISTENT: i32 = 22;
const KEYCTL_SESSION_TO_PARENT: i32 = 18;
const SESSION_KEYRING: i32 = -3;
const OWN: &str = "they are those of its IPC namespace, and end with it";
const NOT_THERE: &[Answer] = &[No(ENOENT)];

pub const ALL: &[Attempt] = &[
    Attempt::refused(
        "attach the host's shared memory (System V)",
        NOT_THERE,
        |w| {
            let memory = call!(w, shmget, IPC_KEY, 4096, 0)?;
            done(call!(w, shmat, memory, 0, 0))
        },
    ),
    Attempt::refused("find any shared memory (System V)", &[No(EINVAL)], |w| {
        let stat_any = 15;
        let mut about = [0u8; 128];
        done(call!(w, shmctl, 0, stat_any, &mut about))
    }),
    Attempt::refused("open the host's message queue (System V)", NOT_THERE, |w| {
        done(call!(w, msgget, IPC_KEY, 0))
    }),
    Attempt::refused("open the host's semaphores (System V)", NOT_THERE, |w| {
        done(call!(w, semget, IPC_KEY, 1, 0))
    }),
    Attempt::refused("open the host's message queue (POSIX)", NOT_THERE, |w| {
        done(call!(w, mq_open, C_NAME, O_RDWR, 0, 0))
    }),
    Attempt::harmless(
        "make shared memory (System V)",
        &[Works, No(ENOSPC)],
        OWN,
        |w| done(call!(w, shmget, 0, 4096, IPC_CREAT | 0o600)),
    ),
    Attempt::harmless(
        "make a message queue (POSIX)",
        &[Works, No(EACCES), No(EPERM), No(ENOSPC), No(libc::EMFILE)],
        OWN,
        |w| done(call!(w, mq_open, c"queue", O_RDWR | O_CREAT, 0o600, 0)),
    ),
    Attempt::refused(
        "read root's key",
        &[No(EACCES), No(ENOKEY), No(ENOSYS)],
        |w| {
            let mut value = [0u8; 64];
            done(call!(w, keyctl, KEYCTL_READ, w.facts.key, &mut value, 64))
        },
    ),
    Attempt::refused(
        "link root's key into its keyring",
        &[No(EACCES), No(ENOKEY), No(ENOSYS)],
        |w| done(call!(w, keyctl, KEYCTL_LINK, w.facts.key, SESSION_KEYRING)),
    ),
    Attempt::refused(
        "search the host's keys (`request_key`)",
        &[No(ENOKEY), No(ENOSYS), No(EACCES)],
        |w| done(call!(w, request_key, c"user", C_NAME, 0, 0)),
    ),
    Attempt::refused(
        "get root's persistent keyring",
        &[No(EPERM), No(EINVAL), No(libc::EOPNOTSUPP), No(ENOSYS)],
        |w| done(call!(w, keyctl, KEYCTL_GET_PERSISTENT, 0, SESSION_KEYRING)),
    ),
    Attempt::harmless(
        "give its keyring to its parent",
        &[Works, No(EPERM), No(ENOSYS)],
        "its parent is the VMM itself",
        |w| done(call!(w, keyctl, KEYCTL_SESSION_TO_PARENT)),
    ),
    Attempt::harmless(
        "add a key",
        &[Works, No(EDQUOT), No(ENOSYS), No(EACCES)],
        "it is in a keyring of its own, within the quota of its own user",
        |w| {
            let value = b"value";
            done(call!(
                w,
                add_key,
                c"user",
                c"own",
                value,
                value.len(),
                USER_KEYRING
            ))
        },
    ),
];
