// SPDX-License-Identifier: Apache-2.0
//! The host's kernel: its modules, clocks, names, logs, and the parts of it that were attacked most.

use libc::{
    EACCES, EBADF, EBUSY, EFAULT, EINVAL, EMFILE, ENODEV, ENOENT, ENOSYS, ENOTBLK, EOPNOTSUPP,
    EPERM, ESRCH, MADV_COLD, O_NONBLOCK,
};
use syscalls::x86_64::Sysno;

use super::calls::done;
use crate::attempt::Answer::{No, Works};
use crate::attempt::{Answer, Attempt};
use crate::world::{Word, World, call};

const FORBIDDEN: &[Answer] = &[No(EPERM)];
const FORBIDDEN_OR_MISSING: &[Answer] = &[No(EPERM), No(ENOSYS)];
const SURFACE: &str = "only the lists keep it from this part of the kernel";
const MEMFD_SECRET: &[Answer] = &[No(ENOSYS), No(libc::EAGAIN), No(libc::ENOMEM), No(EPERM)];
const REBOOT_MAGIC: (u32, u32) = (0xfee1_dead, 672_274_793);
/// Only says what Ctrl-Alt-Del does.
const CAD_ON: u32 = 0x89ab_cdef;
const FAN_CLASS_CONTENT: i32 = 4;
const Q_SYNC: i32 = 0x80_0001 << 8;
/// `SYSLOG_ACTION_READ_ALL` and `SYSLOG_ACTION_CLEAR`
const READ_LOG: i32 = 3;
const CLEAR_LOG: i32 = 5;

/// A new page of memory.
fn page(world: &World) -> Result<usize, i32> {
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    call!(world, mmap, 0, 4096, access, flags, -1, 0)
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("load a module", FORBIDDEN_OR_MISSING, |w| {
        let module = [0u8; 64];
        done(call!(w, init_module, &module, 64, c""))
    }),
    Attempt::refused(
        "load a file that it holds as a module",
        FORBIDDEN_OR_MISSING,
        |w| done(call!(w, finit_module, w.held.kernel, c"", 0)),
    ),
    Attempt::refused("remove a module", FORBIDDEN_OR_MISSING, |w| {
        done(call!(w, delete_module, c"no_such_module", O_NONBLOCK))
    }),
    Attempt::refused(
        "load another kernel (`kexec_load`)",
        FORBIDDEN_OR_MISSING,
        |w| done(call!(w, kexec_load, 0, 0, 0, 0)),
    ),
    Attempt::refused(
        "load another kernel (`kexec_file_load`)",
        FORBIDDEN_OR_MISSING,
        |w| {
            let (kernel, initramfs) = (w.held.kernel, w.held.initramfs);
            done(call!(w, kexec_file_load, kernel, initramfs, 1, c"", 0))
        },
    ),
    Attempt::refused("reboot", FORBIDDEN, |w| {
        let (first, second) = REBOOT_MAGIC;
        done(call!(w, reboot, first, second, CAD_ON, 0))
    }),
    Attempt::refused("swap to a file", FORBIDDEN, |w| {
        done(call!(w, swapon, c"/", 0))
    }),
    Attempt::refused("end swapping", FORBIDDEN, |w| done(call!(w, swapoff, c"/"))),
    Attempt::refused("end the host's accounting", FORBIDDEN_OR_MISSING, |w| {
        done(call!(w, acct, 0))
    }),
    Attempt::refused(
        "change the host's quotas",
        &[No(EPERM), No(ENOSYS), No(ENOENT), No(ENOTBLK), No(EACCES)],
        |w| done(call!(w, quotactl, Q_SYNC, c"/dev/vda", 0, 0)),
    ),
    Attempt::refused(
        "change the host's quotas by a layer (`quotactl_fd`)",
        &[No(EPERM), No(ENOSYS), No(libc::ESRCH), No(EINVAL)],
        |w| {
            // Turns quotas on.
            let on = 0x80_0002 << 8;
            done(call!(w, quotactl_fd, w.held.layer, on, 0, 0))
        },
    ),
    Attempt::refused("rename the host", FORBIDDEN, |w| {
        done(call!(w, sethostname, c"taken", 5))
    }),
    Attempt::refused("change the host's domain", FORBIDDEN, |w| {
        done(call!(w, setdomainname, c"taken", 5))
    }),
    Attempt::refused("set the clock (`settimeofday`)", FORBIDDEN, |w| {
        let now = [1_800_000_000u64, 0];
        done(call!(w, settimeofday, &now, 0))
    }),
    Attempt::refused("set the clock (`clock_settime`)", FORBIDDEN, |w| {
        let now = [1_800_000_000u64, 0];
        done(call!(w, clock_settime, libc::CLOCK_REALTIME, &now))
    }),
    Attempt::refused("bend the clock (`adjtimex`)", FORBIDDEN, |w| {
        let mut change = [0u64; 26];
        // ADJ_TICK: the length of a tick, which is the usual one.
        change[0] = 0x4000;
        change[11] = 10_000;
        done(call!(w, adjtimex, &mut change))
    }),
    Attempt::refused(
        "wake the machine up",
        &[No(EPERM), No(EOPNOTSUPP), No(EINVAL)],
        |w| done(call!(w, timerfd_create, libc::CLOCK_REALTIME_ALARM, 0)),
    ),
    Attempt::refused(
        "use all ports of the machine (`iopl`)",
        FORBIDDEN_OR_MISSING,
        |w| done(call!(w, iopl, 3)),
    ),
    Attempt::refused(
        "use a port of the machine (`ioperm`)",
        FORBIDDEN_OR_MISSING,
        |w| done(call!(w, ioperm, 0x80, 1, 1)),
    ),
    Attempt::harmless(
        "read the kernel's log",
        &[No(EPERM), Works],
        "where `kernel.dmesg_restrict` is 0, everybody may",
        |w| {
            let mut log = [0u8; 4096];
            done(call!(w, syslog, READ_LOG, &mut log, 4096))
        },
    ),
    Attempt::refused("clear the kernel's log", FORBIDDEN, |w| {
        done(call!(w, syslog, CLEAR_LOG, 0, 0))
    }),
    Attempt::refused("hang the terminal up", FORBIDDEN, |w| {
        done(call!(w, vhangup))
    }),
    Attempt::harmless(
        "load a BPF map",
        &[No(EPERM), No(ENOSYS), Works],
        "where `kernel.unprivileged_bpf_disabled` is 0, everybody may; only the lists keep it from this part of the kernel",
        |w| {
            // An array of one value of 4 bytes.
            let map = [2u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            done(call!(w, bpf, 0, &map, 72))
        },
    ),
    Attempt::refused("load a BPF program for traces", FORBIDDEN_OR_MISSING, |w| {
        // `r0 = 0; exit`, of the kind kprobe.
        let code = [0xb7u64, 0x95];
        let license = c"GPL";
        let program = [
            2u64 << 32 | 2,
            Word::from(&code).bits() as u64,
            Word::from(license).bits() as u64,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        done(call!(w, bpf, 5, &program, 72))
    }),
    Attempt::refused(
        "watch all of a CPU (`perf_event_open`)",
        &[
            No(EACCES),
            No(EPERM),
            No(ENOENT),
            No(ENOSYS),
            No(EOPNOTSUPP),
        ],
        |w| {
            // A software event, the clock of the CPU.
            let mut event = [0u64; 16];
            event[0] = 1 | (128 << 32);
            done(call!(w, perf_event_open, &event, -1, 0, -1, 0))
        },
    ),
    Attempt::refused(
        "stop the kernel at page faults (`userfaultfd`)",
        FORBIDDEN_OR_MISSING,
        |w| done(call!(w, userfaultfd, O_NONBLOCK)),
    ),
    Attempt::harmless(
        "make calls by io_uring",
        &[Works, No(EPERM), No(ENOSYS), No(libc::ENOMEM)],
        SURFACE,
        |w| {
            let mut parameters = [0u32; 30];
            done(call!(w, io_uring_setup, 1, &mut parameters))
        },
    ),
    Attempt::harmless(
        "make asynchronous I/O",
        &[Works, No(ENOSYS), No(libc::EAGAIN)],
        SURFACE,
        |w| {
            let mut context = [0usize];
            done(call!(w, io_setup, 1, &mut context))
        },
    ),
    Attempt::refused(
        "see all opens of the host (`fanotify`)",
        FORBIDDEN_OR_MISSING,
        |w| done(call!(w, fanotify_init, FAN_CLASS_CONTENT, 0)),
    ),
    Attempt::refused(
        "watch the file system of a layer (`fanotify`)",
        &[No(EPERM), No(EBADF), No(ENOSYS), No(EINVAL)],
        |w| {
            let report_fid = 0x200;
            let events = call!(w, fanotify_init, report_fid, 0)?;
            let (add_file_system, opened) = (0x101, 0x20u64);
            done(call!(
                w,
                fanotify_mark,
                events,
                add_file_system,
                opened,
                w.held.layer,
                0
            ))
        },
    ),
    Attempt::refused(
        "watch a directory of the host (`inotify`)",
        &[No(ENOENT), No(EMFILE)],
        |w| {
            let events = call!(w, inotify_init1, 0)?;
            done(call!(
                w,
                inotify_add_watch,
                events,
                c"/etc",
                libc::IN_ALL_EVENTS
            ))
        },
    ),
    Attempt::refused(
        "pin memory that the host cannot swap (`memfd_secret`)",
        MEMFD_SECRET,
        |w| {
            let secret = call!(w, memfd_secret, 0)?;
            let bytes = 64 << 20;
            call!(w, ftruncate, secret, bytes)?;
            let access = libc::PROT_READ | libc::PROT_WRITE;
            done(call!(
                w,
                mmap,
                0,
                bytes,
                access,
                libc::MAP_SHARED,
                secret,
                0
            ))
        },
    ),
    Attempt::refused(
        "have the daemon's memory swapped (`process_madvise`)",
        &[No(ESRCH)],
        |w| {
            let pid = w.facts.daemon;
            let process = w.descriptor(Sysno::pidfd_open, &[Word::from(pid), Word::from(0)])?;
            let range = [0x0040_0000usize, 4096];
            done(call!(w, process_madvise, process, &range, 1, MADV_COLD, 0))
        },
    ),
    Attempt::refused(
        "have the kernel give up a page of memory (`MADV_HWPOISON`)",
        &[No(EPERM), No(EINVAL)],
        |w| {
            let page = page(w)?;
            done(call!(w, madvise, page, 4096, libc::MADV_HWPOISON))
        },
    ),
    Attempt::harmless(
        "have its memory merged with that of others (`MADV_MERGEABLE`)",
        &[Works, No(EINVAL)],
        "only where the host runs KSM, whose timing is a side channel",
        |w| {
            let page = page(w)?;
            done(call!(w, madvise, page, 4096, libc::MADV_MERGEABLE))
        },
    ),
    Attempt::refused(
        "hand pages to a pipe and keep them (`vmsplice`)",
        &[No(EBADF), No(EFAULT)],
        |w| {
            let page = [0u8; 64];
            let vector = [Word::from(&page).bits(), 64];
            done(call!(w, vmsplice, w.held.ready, &vector, 1, 0))
        },
    ),
    Attempt::refused(
        "read a CPU's registers by a driver",
        &[No(ENOENT), No(ENODEV), No(EBUSY)],
        |w| done(call!(w, openat, libc::AT_FDCWD, c"/dev/cpu/0/msr", 0)),
    ),
];
