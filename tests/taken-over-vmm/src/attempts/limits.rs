// SPDX-License-Identifier: Apache-2.0
//! What it may use up: processes, descriptors, memory, CPU time, space on the host's disks.

use libc::{
    EACCES, EAGAIN, EBADF, EFBIG, EINVAL, EMFILE, ENOMEM, EPERM, FALLOC_FL_KEEP_SIZE,
    MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, PRIO_PROCESS, PROT_NONE, PROT_READ, PROT_WRITE,
    RLIMIT_AS, RLIMIT_CORE, RLIMIT_FSIZE, RLIMIT_NOFILE, SCHED_FIFO, SIGXFSZ,
};

use super::calls::done;
use crate::attempt::Answer::{No, Signal, Works};
use crate::attempt::{Answer, Attempt};
use crate::world::{Tried, World, call};

const FORBIDDEN: &[Answer] = &[No(EPERM)];
/// The limit of a file's size ends a process that does not ignore the signal.
const TOO_LARGE: &[Answer] = &[Signal(SIGXFSZ), No(EFBIG), No(EINVAL), No(EPERM)];
/// Larger than any file of a VM.
const FAR: i64 = 1 << 50;
const MOST_PROCESSES: usize = 10_000;
const MOST_DESCRIPTORS: usize = 1_000_000;
/// A rehearsal needs each kind of call once.
const REHEARSED: usize = 1;

fn times(world: &World, most: usize) -> usize {
    if world.is_real() { most } else { REHEARSED }
}

fn raise(world: &World, resource: u32) -> Tried {
    let limit = [u64::MAX, u64::MAX];
    done(call!(world, prlimit64, 0, resource, &limit, 0))
}

fn write_at(world: &World, fd: i32, offset: i64) -> Tried {
    let byte = [1u8];
    done(call!(world, pwrite64, fd, &byte, 1, offset))
}

/// The size of a file, from the end of which the offset comes back.
fn size(world: &World, fd: i32) -> Result<i64, i32> {
    let end = call!(world, lseek, fd, 0, libc::SEEK_END)?;
    Ok(i64::try_from(end).unwrap_or(0))
}

/// Gives a log a size that fills a disk.
fn grow(world: &World, fd: i32) -> Tried {
    done(call!(world, ftruncate, fd, FAR))
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("raise its limit of descriptors", FORBIDDEN, |w| {
        raise(w, RLIMIT_NOFILE)
    }),
    Attempt::refused("raise its limit of memory", FORBIDDEN, |w| {
        raise(w, RLIMIT_AS)
    }),
    Attempt::refused("raise its limit of cores", FORBIDDEN, |w| {
        raise(w, RLIMIT_CORE)
    }),
    Attempt::refused("raise its limit of files' sizes", FORBIDDEN, |w| {
        raise(w, RLIMIT_FSIZE)
    }),
    Attempt::refused("start processes without end", &[No(EAGAIN)], |w| {
        for _ in 0..times(w, MOST_PROCESSES) {
            if call!(w, fork)? == 0 {
                let _ = call!(w, pause);
                w.exit(0);
            }
        }
        Ok(true)
    }),
    Attempt::refused("hold descriptors without end", &[No(EMFILE)], |w| {
        for _ in 0..times(w, MOST_DESCRIPTORS) {
            call!(w, dup, w.held.kernel)?;
        }
        Ok(true)
    }),
    Attempt::refused("map memory beyond its own", &[No(ENOMEM)], |w| {
        let bytes = w.facts.memory_max_bytes + (2 << 30);
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        done(call!(w, mmap, 0, bytes, PROT_NONE, flags, -1, 0))
    }),
    Attempt::refused(
        "take the host's huge pages (`MAP_HUGETLB`)",
        &[No(ENOMEM), No(EINVAL), No(EPERM)],
        |w| {
            let flags = MAP_PRIVATE | MAP_ANONYMOUS | libc::MAP_HUGETLB;
            let access = PROT_READ | PROT_WRITE;
            done(call!(w, mmap, 0, 2 << 20, access, flags, -1, 0))
        },
    ),
    Attempt::refused("lock memory (`mlock`)", &[No(ENOMEM), No(EPERM)], |w| {
        let bytes = 64u64 << 10;
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        let place = call!(w, mmap, 0, bytes, PROT_READ | PROT_WRITE, flags, -1, 0)?;
        done(call!(w, mlock, place, bytes))
    }),
    Attempt::refused("get ahead of all others (`SCHED_FIFO`)", FORBIDDEN, |w| {
        let priority = [1i32];
        done(call!(w, sched_setscheduler, 0, SCHED_FIFO, &priority))
    }),
    Attempt::refused("reserve a CPU (`SCHED_DEADLINE`)", FORBIDDEN, |w| {
        // struct sched_attr: size, policy, flags, nice, priority, then runtime, deadline, period.
        let settings = [48u64 | (6 << 32), 0, 0, 5_000_000, 10_000_000, 10_000_000];
        done(call!(w, sched_setattr, 0, &settings, 0))
    }),
    Attempt::refused(
        "raise its priority (`nice`)",
        &[No(EACCES), No(EPERM)],
        |w| done(call!(w, setpriority, PRIO_PROCESS, 0, -20)),
    ),
    Attempt::refused("get ahead at disks (`ioprio_set`)", FORBIDDEN, |w| {
        let (process, real_time) = (1, 1 << 13);
        done(call!(w, ioprio_set, process, 0, real_time))
    }),
    Attempt::harmless(
        "choose its CPUs",
        &[Works],
        "only among those of its cgroup",
        |w| {
            let cpus = [1usize];
            done(call!(w, sched_setaffinity, 0, 8, &cpus))
        },
    ),
    Attempt::refused("write beyond the scratch disk's end", TOO_LARGE, |w| {
        write_at(w, w.held.scratch, size(w, w.held.scratch)? + 4096)
    }),
    Attempt::refused("write far beyond the scratch disk's end", TOO_LARGE, |w| {
        write_at(w, w.held.scratch, FAR)
    }),
    Attempt::refused("enlarge the scratch disk (`ftruncate`)", TOO_LARGE, |w| {
        grow(w, w.held.scratch)
    }),
    Attempt::refused("enlarge the scratch disk (`fallocate`)", TOO_LARGE, |w| {
        let end = size(w, w.held.scratch)?;
        done(call!(w, fallocate, w.held.scratch, 0, end, 4096))
    }),
    Attempt::refused("enlarge the VMM's log", TOO_LARGE, |w| grow(w, w.held.log)),
    Attempt::refused("enlarge the console's log", TOO_LARGE, |w| {
        grow(w, w.held.console)
    }),
    Attempt::refused("write far into the console's log", TOO_LARGE, |w| {
        write_at(w, w.held.console, FAR)
    }),
    Attempt::harmless(
        "reserve space behind the scratch disk's end",
        &[Works, No(EFBIG), No(EINVAL), Signal(SIGXFSZ)],
        "**it costs the host's disk space**; only the lists stand before it, because the limit of files' sizes does not count \
         space behind the end",
        |w| {
            let end = size(w, w.held.scratch)?;
            done(call!(
                w,
                fallocate,
                w.held.scratch,
                FALLOC_FL_KEEP_SIZE,
                end,
                4096
            ))
        },
    ),
    Attempt::refused(
        "hold messages to the daemon without end",
        &[No(EAGAIN), No(libc::EPIPE)],
        |w| {
            let bytes = [0u8; 4096];
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            for _ in 0..times(w, MOST_DESCRIPTORS) {
                call!(w, sendto, w.held.ready, &bytes, bytes.len(), flags, 0, 0)?;
            }
            Ok(true)
        },
    )
    .heard(),
    Attempt::refused(
        "make a pipe larger than the host allows",
        &[No(EPERM), No(EBADF)],
        |w| {
            let mut pipe = [0i32; 2];
            call!(w, pipe2, &mut pipe, 0)?;
            done(call!(w, fcntl, pipe[0], libc::F_SETPIPE_SZ, 1 << 30))
        },
    ),
];
