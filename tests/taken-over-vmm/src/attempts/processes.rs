// SPDX-License-Identifier: Apache-2.0
//! Other processes: the daemon, other VMMs, all of the host; and its own main process, which is not dumpable.

use libc::{
    EINVAL, ENOPROTOOPT, ENOSYS, EPERM, ESRCH, F_SETOWN, PTRACE_ATTACH, PTRACE_SEIZE, SOL_SOCKET,
};
use syscalls::x86_64::Sysno;

use super::calls::{done, of_stranger};
use crate::attempt::Answer::{No, Nothing};
use crate::attempt::{Answer, Attempt};
use crate::world::{Tried, Word, World, call};

const SO_PEERPIDFD: i32 = 77;
const KCMP_FILE: i32 = 0;
const NOBODY: &[Answer] = &[No(ESRCH)];
const FORBIDDEN: &[Answer] = &[No(EPERM)];
/// The first process of the PID namespace: the VMM itself.
const ITSELF: i32 = 1;

/// Reads or writes a word of another process's memory.
fn memory(world: &World, call: Sysno, pid: i32) -> Tried {
    let mut word = [0u8; 8];
    let own = [Word::from(&mut word).bits(), 8];
    // Where programs are mapped; it matters little, because the process comes first.
    let other = [0x0040_0000usize, 8];
    let words = [
        Word::from(pid),
        Word::from(&own),
        Word::from(1),
        Word::from(&other),
        Word::from(1),
        Word::from(0),
    ];
    match world.call(call, &words) {
        // The right to read is there, the page is not.
        Err(libc::EFAULT) => Ok(true),
        result => of_stranger(world, pid, result),
    }
}

/// Copies a descriptor of another process.
fn descriptor_of(world: &World, pid: i32) -> Tried {
    let process = world.descriptor(Sysno::pidfd_open, &[Word::from(pid), Word::from(0)])?;
    done(call!(world, pidfd_getfd, process, 0, 0))
}

/// The daemon, as a pidfd that the socket to it gives.
fn peer(world: &World) -> Result<i32, i32> {
    let (mut pidfd, mut size) = ([-1i32], [4u32]);
    let option = SO_PEERPIDFD;
    call!(
        world,
        getsockopt,
        world.held.ready,
        SOL_SOCKET,
        option,
        &mut pidfd,
        &mut size
    )?;
    Ok(pidfd[0])
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("signal everybody", NOBODY, |w| done(call!(w, kill, -1, 0))),
    Attempt::refused("signal the daemon", NOBODY, |w| {
        let pid = w.facts.daemon;
        of_stranger(w, pid, call!(w, kill, pid, 0))
    }),
    Attempt::refused("signal another VMM", NOBODY, |w| {
        let pid = w.facts.neighbour;
        of_stranger(w, pid, call!(w, kill, pid, 0))
    }),
    Attempt::refused("signal a thread of the daemon (`tgkill`)", NOBODY, |w| {
        let pid = w.facts.daemon;
        of_stranger(w, pid, call!(w, tgkill, pid, pid, 0))
    }),
    Attempt::refused("queue a signal for the daemon", NOBODY, |w| {
        let about = [0u64, 0xffff_ffff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let pid = w.facts.daemon;
        of_stranger(w, pid, call!(w, rt_sigqueueinfo, pid, 10, &about))
    }),
    Attempt::refused("have the daemon signalled for a socket", NOBODY, |w| {
        let pid = w.facts.daemon;
        of_stranger(w, pid, call!(w, fcntl, w.held.ready, F_SETOWN, pid))
    }),
    Attempt::refused("attach to the daemon (`ptrace`)", NOBODY, |w| {
        let pid = w.facts.daemon;
        of_stranger(w, pid, call!(w, ptrace, PTRACE_SEIZE, pid, 0, 0))
    }),
    Attempt::refused("attach to another VMM (`ptrace`)", NOBODY, |w| {
        let pid = w.facts.neighbour;
        let seized = of_stranger(w, pid, call!(w, ptrace, PTRACE_SEIZE, pid, 0, 0));
        let _ = call!(w, ptrace, libc::PTRACE_DETACH, pid, 0, 0);
        seized
    }),
    Attempt::refused(
        "attach to its own main process (`ptrace`)",
        FORBIDDEN,
        |w| done(call!(w, ptrace, PTRACE_ATTACH, ITSELF, 0, 0)),
    ),
    Attempt::refused("read the daemon's memory", NOBODY, |w| {
        memory(w, Sysno::process_vm_readv, w.facts.daemon)
    }),
    Attempt::refused("read another VMM's memory", NOBODY, |w| {
        memory(w, Sysno::process_vm_readv, w.facts.neighbour)
    }),
    Attempt::refused("write another VMM's memory", NOBODY, |w| {
        memory(w, Sysno::process_vm_writev, w.facts.neighbour)
    }),
    Attempt::refused("read the memory of its own main process", FORBIDDEN, |w| {
        memory(w, Sysno::process_vm_readv, ITSELF)
    }),
    Attempt::refused("get a handle of the daemon (`pidfd_open`)", NOBODY, |w| {
        let pid = w.facts.daemon;
        of_stranger(w, pid, call!(w, pidfd_open, pid, 0))
    }),
    Attempt::refused(
        "get a descriptor of another VMM (`pidfd_getfd`)",
        NOBODY,
        |w| descriptor_of(w, w.facts.neighbour),
    ),
    Attempt::refused("get a descriptor of its own main process", FORBIDDEN, |w| {
        descriptor_of(w, ITSELF)
    }),
    Attempt::refused(
        "signal the daemon by the handle of its socket (`SO_PEERPIDFD`)",
        &[No(ENOPROTOOPT), No(EINVAL), No(EPERM), No(ESRCH)],
        |w| done(call!(w, pidfd_send_signal, peer(w)?, 0, 0, 0)),
    ),
    Attempt::refused(
        "get a descriptor of the daemon by the handle of its socket",
        &[No(ENOPROTOOPT), No(EINVAL), No(EPERM), No(ESRCH)],
        |w| done(call!(w, pidfd_getfd, peer(w)?, 0, 0)),
    ),
    Attempt::refused(
        "enter the daemon's namespaces by the handle of its socket",
        &[No(ENOPROTOOPT), No(EINVAL), No(EPERM), No(ESRCH)],
        |w| done(call!(w, setns, peer(w)?, libc::CLONE_NEWNS)),
    ),
    Attempt::refused(
        "learn the daemon's number from its socket",
        &[Nothing],
        |w| {
            let (mut peer, mut size) = ([0i32; 3], [12u32]);
            let option = libc::SO_PEERCRED;
            call!(
                w,
                getsockopt,
                w.held.ready,
                SOL_SOCKET,
                option,
                &mut peer,
                &mut size
            )?;
            Ok(peer[0] != 0)
        },
    ),
    Attempt::refused(
        "compare its descriptors with those of its main process",
        &[No(EPERM), No(ENOSYS)],
        |w| done(call!(w, kcmp, ITSELF, ITSELF, KCMP_FILE, 0, 0)),
    ),
    Attempt::refused("find the locks of its main process", FORBIDDEN, |w| {
        let (mut head, mut size) = ([0usize], [0usize]);
        done(call!(w, get_robust_list, ITSELF, &mut head, &mut size))
    }),
    Attempt::refused(
        "move the daemon's memory to another node",
        &[No(ESRCH), No(ENOSYS)],
        |w| {
            let (pid, nodes) = (w.facts.daemon, [1usize]);
            of_stranger(w, pid, call!(w, migrate_pages, pid, 64, &nodes, &nodes))
        },
    ),
    Attempt::refused("lower the daemon's limits", NOBODY, |w| {
        let pid = w.facts.daemon;
        let mut old = [0u64; 2];
        of_stranger(
            w,
            pid,
            call!(w, prlimit64, pid, libc::RLIMIT_NOFILE, 0, &mut old),
        )
    }),
    Attempt::refused("bind the daemon to a CPU", NOBODY, |w| {
        let (pid, cpus) = (w.facts.daemon, [1usize]);
        of_stranger(w, pid, call!(w, sched_setaffinity, pid, 8, &cpus))
    }),
    Attempt::refused("slow the daemon down (`setpriority`)", NOBODY, |w| {
        let pid = w.facts.daemon;
        of_stranger(w, pid, call!(w, setpriority, libc::PRIO_PROCESS, pid, 19))
    }),
    Attempt::refused(
        "join the daemon's process group",
        &[No(EPERM), No(ESRCH)],
        |w| done(call!(w, setpgid, 0, w.facts.daemon)),
    ),
];
