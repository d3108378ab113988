// SPDX-License-Identifier: Apache-2.0
//! Users, groups, capabilities, and what a crash leaves.

use libc::{
    EINVAL, ENODEV, EPERM, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAPBSET_DROP, PR_SET_DUMPABLE,
    PR_SET_MM, PR_SET_MM_START_CODE, PR_SET_NO_NEW_PRIVS, PR_SET_SECUREBITS, RLIMIT_CORE,
};

use super::calls::done;
use crate::attempt::Answer::{No, Nothing, Works};
use crate::attempt::{Answer, Attempt};
use crate::sys;
use crate::world::{Tried, World, call};

const FORBIDDEN: &[Answer] = &[No(EPERM)];
/// The root of the host has no number in the user namespace (EINVAL). Without one, it may not be had (EPERM).
const NO_ROOT: &[Answer] = &[No(EINVAL), No(EPERM)];
const CAP_SYS_ADMIN: i32 = 21;
const PR_SCHED_CORE: i32 = 62;
const PR_SET_IO_FLUSHER: i32 = 57;
/// The bit of a wait status that says that a core was written.
const CORE_DUMPED: i32 = 0x80;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Whether a child that crashes leaves a core. It first undoes what it can of what forbids that.
fn leaves_core(world: &World) -> Tried {
    let status = world.in_child(|world| {
        let _ = call!(world, prctl, PR_SET_DUMPABLE, 1, 0, 0, 0);
        let limit = [u64::MAX, u64::MAX];
        let _ = call!(world, prlimit64, 0, RLIMIT_CORE, &limit, 0);
        if world.is_real() {
            sys::crash();
        }
    })?;
    Ok(status & CORE_DUMPED != 0)
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("become root (`setuid`)", NO_ROOT, |w| {
        done(call!(w, setuid, 0))
    }),
    Attempt::refused("become root (`setresuid`)", NO_ROOT, |w| {
        done(call!(w, setresuid, 0, 0, 0))
    }),
    Attempt::refused("become another VMM's user", NO_ROOT, |w| {
        let user = call!(w, getuid)?;
        done(call!(w, setuid, user + 1))
    }),
    Attempt::refused("become root for files (`setfsuid`)", &[Nothing], |w| {
        call!(w, setfsuid, 0)?;
        // The second call tells what the first one did.
        Ok(call!(w, setfsuid, 0)? == 0)
    }),
    Attempt::refused("join root's group", NO_ROOT, |w| done(call!(w, setgid, 0))),
    Attempt::refused("join more groups", FORBIDDEN, |w| {
        let groups = [0u32];
        done(call!(w, setgroups, 1, &groups))
    }),
    Attempt::refused("take all capabilities (`capset`)", FORBIDDEN, |w| {
        let header = [CAPABILITY_VERSION_3, 0];
        let all = [u32::MAX; 6];
        done(call!(w, capset, &header, &all))
    }),
    Attempt::refused("pass capabilities on (`PR_CAP_AMBIENT`)", FORBIDDEN, |w| {
        let raise = PR_CAP_AMBIENT_RAISE;
        done(call!(w, prctl, PR_CAP_AMBIENT, raise, CAP_SYS_ADMIN, 0, 0))
    }),
    Attempt::refused("change its bounding set", FORBIDDEN, |w| {
        done(call!(w, prctl, PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0))
    }),
    Attempt::refused("take `no_new_privs` back", &[No(EINVAL)], |w| {
        done(call!(w, prctl, PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0))
    }),
    Attempt::refused("change its secure bits", FORBIDDEN, |w| {
        done(call!(w, prctl, PR_SET_SECUREBITS, 0, 0, 0, 0))
    }),
    Attempt::refused(
        "change what `/proc` says of it (`PR_SET_MM`)",
        FORBIDDEN,
        |w| done(call!(w, prctl, PR_SET_MM, PR_SET_MM_START_CODE, 4096, 0, 0)),
    ),
    Attempt::refused(
        "use memory that is reserved for disks (`PR_SET_IO_FLUSHER`)",
        FORBIDDEN,
        |w| done(call!(w, prctl, PR_SET_IO_FLUSHER, 1, 0, 0, 0)),
    ),
    Attempt::harmless(
        "become dumpable",
        &[Works],
        "nobody else has its user, and it leaves no core",
        |w| done(call!(w, prctl, PR_SET_DUMPABLE, 1, 0, 0, 0)),
    ),
    Attempt::harmless(
        "keep others off its core (`PR_SCHED_CORE`)",
        &[Works, No(EINVAL), No(ENODEV)],
        "its time on a CPU stays that of its cgroup",
        |w| {
            let (create, itself, process) = (1, 0, 1);
            done(call!(w, prctl, PR_SCHED_CORE, create, itself, process, 0))
        },
    ),
    Attempt::refused(
        "leave a core, as a dumpable process",
        &[Nothing],
        leaves_core,
    ),
];
