// SPDX-License-Identifier: Apache-2.0
//! The system calls that a running file server may make. Any other one ends it. Not allowed are, among others, calls about
//! mounts, namespaces, new sockets, signals to other processes, and files by handle, which could reach files outside the
//! shares. Set once for all threads.

use bulkhead_jail::syscalls::{List, Rule};
use syscalls::x86_64::Sysno;

const PROT_EXEC: u64 = 4;

pub const SERVER: List = List {
    name: "share",
    rules: &[
        // Files, by name and by descriptor.
        Rule::any(Sysno::openat),
        Rule::any(Sysno::close),
        Rule::any(Sysno::read),
        Rule::any(Sysno::readv),
        Rule::any(Sysno::pread64),
        Rule::any(Sysno::preadv),
        Rule::any(Sysno::preadv2),
        Rule::any(Sysno::write),
        Rule::any(Sysno::writev),
        Rule::any(Sysno::pwrite64),
        Rule::any(Sysno::pwritev),
        Rule::any(Sysno::pwritev2),
        Rule::any(Sysno::lseek),
        Rule::any(Sysno::fstat),
        Rule::any(Sysno::newfstatat),
        Rule::any(Sysno::statx),
        Rule::any(Sysno::statfs),
        Rule::any(Sysno::fstatfs),
        Rule::any(Sysno::getdents64),
        Rule::any(Sysno::readlinkat),
        Rule::any(Sysno::mkdirat),
        Rule::any(Sysno::mknodat),
        Rule::any(Sysno::unlinkat),
        Rule::any(Sysno::renameat2),
        Rule::any(Sysno::linkat),
        Rule::any(Sysno::symlinkat),
        Rule::any(Sysno::fchmod),
        Rule::any(Sysno::fchmodat),
        Rule::any(Sysno::fchmodat2),
        Rule::any(Sysno::fchown),
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
        // The VMM's socket.
        Rule::any(Sysno::recvfrom),
        Rule::any(Sysno::sendto),
        // Switching to a user of the guest.
        Rule::any(Sysno::setresuid),
        Rule::any(Sysno::setresgid),
        Rule::any(Sysno::capget),
        Rule::any(Sysno::capset),
        Rule::any(Sysno::umask),
        // Threads, memory, and the end of the process.
        Rule::any(Sysno::futex),
        Rule::without(Sysno::mmap, 2, PROT_EXEC),
        Rule::any(Sysno::munmap),
        Rule::any(Sysno::mremap),
        Rule::without(Sysno::mprotect, 2, PROT_EXEC),
        Rule::any(Sysno::madvise),
        Rule::any(Sysno::brk),
        Rule::any(Sysno::sched_yield),
        Rule::any(Sysno::sigaltstack),
        Rule::any(Sysno::rt_sigaction),
        Rule::any(Sysno::rt_sigprocmask),
        Rule::any(Sysno::rt_sigreturn),
        Rule::any(Sysno::restart_syscall),
        Rule::any(Sysno::gettid),
        Rule::any(Sysno::getpid),
        Rule::any(Sysno::getrandom),
        Rule::any(Sysno::clock_gettime),
        Rule::any(Sysno::exit),
        Rule::any(Sysno::exit_group),
    ],
};
