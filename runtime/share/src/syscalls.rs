// SPDX-License-Identifier: Apache-2.0
//! The system calls that a running file server may make. Any other one ends it. Not allowed are, among others, calls about
//! mounts, namespaces, new sockets, signals to other processes, and files by handle, which could reach files outside the
//! shares. Set once for all threads.

use bulkhead_jail::syscalls::{List, Rule};
use syscalls::x86_64::Sysno;

const PROT_EXEC: u64 = 4;

pub const SERVER: List = List {
    name: "bulkhead-share",
    rules: &[
        // Files, by name and by descriptor.
        &[
            Rule::any(Sysno::openat),
            Rule::any(Sysno::close),
            Rule::any(Sysno::read),
            Rule::any(Sysno::preadv),
            Rule::any(Sysno::write),
            Rule::any(Sysno::pwritev),
            Rule::any(Sysno::lseek),
            Rule::any(Sysno::newfstatat),
            Rule::any(Sysno::statx),
            Rule::any(Sysno::fstatfs),
            Rule::any(Sysno::getdents64),
            Rule::any(Sysno::readlinkat),
            Rule::any(Sysno::mkdirat),
            Rule::any(Sysno::mknodat),
            Rule::any(Sysno::unlinkat),
            Rule::any(Sysno::renameat2),
            Rule::any(Sysno::linkat),
            Rule::any(Sysno::symlinkat),
            Rule::any(Sysno::fchmodat),
            Rule::any(Sysno::fchownat),
            Rule::any(Sysno::ftruncate),
            Rule::any(Sysno::fallocate),
            Rule::any(Sysno::utimensat),
            Rule::any(Sysno::fsync),
            Rule::any(Sysno::fdatasync),
            Rule::any(Sysno::setxattr),
            Rule::any(Sysno::getxattr),
            Rule::any(Sysno::listxattr),
            Rule::any(Sysno::removexattr),
            Rule::any(Sysno::fcntl),
            Rule::any(Sysno::dup),
        ],
        // Switching to a user of the guest.
        &[
            Rule::any(Sysno::setresuid),
            Rule::any(Sysno::setresgid),
            Rule::any(Sysno::capget),
            Rule::any(Sysno::capset),
            Rule::any(Sysno::umask),
        ],
        // Memory, locks, time, and the end of the process.
        &[
            Rule::any(Sysno::brk).seldom(HEAP),
            Rule::without(Sysno::mmap, 2, PROT_EXEC).seldom(HEAP),
            Rule::any(Sysno::munmap).seldom(HEAP),
            Rule::any(Sysno::mremap).seldom(HEAP),
            Rule::any(Sysno::futex),
            Rule::any(Sysno::sched_yield).seldom("two threads seldom want a lock at once"),
            Rule::any(Sysno::clock_gettime).seldom("the host's clock can be read without a call"),
            Rule::any(Sysno::restart_syscall).seldom("the process was not stopped in a wait"),
            Rule::any(Sysno::getrandom),
            Rule::any(Sysno::sigaltstack),
            Rule::any(Sysno::pause)
                .seldom("of workers that end at once, all but one wait for the end of the process"),
            Rule::any(Sysno::exit_group),
        ],
    ],
};

const HEAP: &str = "large pieces of memory are seldom asked for";
