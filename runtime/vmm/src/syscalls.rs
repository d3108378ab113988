// SPDX-License-Identifier: Apache-2.0
//! The system calls that each kind of thread of a VMM may make. A test compares the lists with what threads called in all
//! end-to-end tests: a call that is missing ends the VM, and a rule that nothing used fails the test.

use bulkhead_jail::syscalls::{List, Rule};
use syscalls::x86_64::Sysno;

/// `_IO(KVMIO, 0x80)`
const KVM_RUN: u32 = 0xae80;
/// `_IOR(KVMIO, 0x81, struct kvm_regs)`
const KVM_GET_REGS: u32 = 0x8090_ae81;
/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`
const KVM_SET_SIGNAL_MASK: u32 = 0x4004_ae8b;
/// `_IOR(KVMIO, 0x98, struct kvm_mp_state)`
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
/// `_IO(KVMIO, 0xad)`
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
/// `_IOW('T', 208, unsigned int)`
const TUNSETOFFLOAD: u32 = 0x4004_54d0;

const PROT_EXEC: u64 = 4;
/// What the C library asks for when it makes a thread: it shares all with the process.
const THREAD: u32 = 0x003d_0f00;

/// Runs the guest, and what its writes to device registers start: the reset of a device closes streams.
pub const VCPU: List = List {
    name: "vcpu",
    rules: &[
        Rule::one_of(
            Sysno::ioctl,
            1,
            &[
                KVM_RUN,
                KVM_GET_REGS,
                KVM_GET_MP_STATE,
                KVM_KVMCLOCK_CTRL,
                KVM_SET_SIGNAL_MASK,
                TUNSETOFFLOAD,
            ],
        ),
        Rule::any(Sysno::write),
        Rule::any(Sysno::futex),
        Rule::any(Sysno::rt_sigtimedwait),
        Rule::any(Sysno::rt_sigpending),
        Rule::any(Sysno::clock_nanosleep),
        Rule::any(Sysno::close),
        Rule::any(Sysno::epoll_ctl),
        Rule::any(Sysno::madvise),
        Rule::any(Sysno::brk),
        Rule::without(Sysno::mmap, 2, PROT_EXEC),
        Rule::any(Sysno::munmap),
    ],
};

/// The image disk and the scratch disk.
pub const DISKS: List = List {
    name: "disks",
    rules: &[
        Rule::any(Sysno::epoll_wait),
        Rule::any(Sysno::read),
        Rule::any(Sysno::write),
        Rule::any(Sysno::preadv),
        Rule::any(Sysno::pwritev),
        Rule::any(Sysno::fdatasync),
        Rule::any(Sysno::fallocate),
        Rule::any(Sysno::futex),
        Rule::any(Sysno::madvise),
        Rule::any(Sysno::brk),
        Rule::without(Sysno::mmap, 2, PROT_EXEC),
        Rule::any(Sysno::munmap),
    ],
};

/// vsock, network, random numbers and balloon.
pub const IO: List = List {
    name: "io",
    rules: &[
        Rule::any(Sysno::epoll_wait),
        Rule::any(Sysno::epoll_ctl),
        Rule::any(Sysno::read),
        Rule::any(Sysno::write),
        Rule::any(Sysno::readv),
        Rule::any(Sysno::writev),
        Rule::any(Sysno::accept4),
        Rule::any(Sysno::recvfrom),
        Rule::any(Sysno::sendto),
        Rule::any(Sysno::sendmsg),
        Rule::any(Sysno::shutdown),
        Rule::any(Sysno::ioctl),
        Rule::any(Sysno::close),
        Rule::any(Sysno::timerfd_settime),
        Rule::any(Sysno::getrandom),
        Rule::any(Sysno::fallocate),
        Rule::any(Sysno::futex),
        Rule::any(Sysno::madvise),
        Rule::any(Sysno::brk),
        Rule::without(Sysno::mmap, 2, PROT_EXEC),
        Rule::any(Sysno::munmap),
        Rule::any(Sysno::mremap),
    ],
};

/// Shared directories.
pub const FILES: List = List {
    name: "files",
    rules: &[
        Rule::any(Sysno::epoll_wait),
        Rule::any(Sysno::epoll_ctl),
        Rule::any(Sysno::read),
        Rule::any(Sysno::write),
        Rule::any(Sysno::readv),
        Rule::any(Sysno::recvfrom),
        Rule::any(Sysno::sendmsg),
        Rule::any(Sysno::sendto),
        Rule::any(Sysno::close),
        Rule::any(Sysno::futex),
        Rule::any(Sysno::madvise),
        Rule::any(Sysno::brk),
        Rule::without(Sysno::mmap, 2, PROT_EXEC),
        Rule::any(Sysno::munmap),
        Rule::any(Sysno::mremap),
    ],
};

/// The volume disk.
pub const VOLUMES: List = List {
    name: "volumes",
    rules: &[
        Rule::any(Sysno::epoll_wait),
        Rule::any(Sysno::read),
        Rule::any(Sysno::write),
        Rule::any(Sysno::preadv),
        Rule::any(Sysno::pwritev),
        Rule::any(Sysno::fdatasync),
        Rule::any(Sysno::fallocate),
        Rule::any(Sysno::close),
        Rule::any(Sysno::futex),
        Rule::any(Sysno::madvise),
        Rule::any(Sysno::brk),
        Rule::without(Sysno::mmap, 2, PROT_EXEC),
        Rule::any(Sysno::munmap),
    ],
};

/// Looks whether the guest has halted for good.
pub const HALTS: List = List {
    name: "halts",
    rules: &[
        Rule::any(Sysno::clock_nanosleep),
        Rule::any(Sysno::pread64),
        Rule::any(Sysno::tgkill),
        Rule::any(Sysno::write),
        Rule::any(Sysno::futex),
        Rule::any(Sysno::brk),
    ],
};

/// The control socket, the end of the VM, and threads that close volumes, which inherit this list.
pub const MAIN: List = List {
    name: "main",
    rules: &[
        Rule::any(Sysno::poll),
        Rule::any(Sysno::accept4),
        Rule::any(Sysno::recvmsg),
        Rule::any(Sysno::sendto),
        Rule::any(Sysno::ioctl),
        Rule::any(Sysno::fcntl),
        Rule::any(Sysno::fstat),
        Rule::any(Sysno::statx),
        Rule::any(Sysno::lseek),
        Rule::any(Sysno::getsockopt),
        Rule::any(Sysno::pread64),
        Rule::any(Sysno::epoll_ctl),
        Rule::any(Sysno::read),
        Rule::any(Sysno::write),
        Rule::any(Sysno::fdatasync),
        Rule::any(Sysno::close),
        Rule::any(Sysno::futex),
        Rule::any(Sysno::tgkill),
        Rule::any(Sysno::madvise),
        Rule::any(Sysno::brk),
        Rule::without(Sysno::mmap, 2, PROT_EXEC),
        Rule::without(Sysno::mprotect, 2, PROT_EXEC),
        Rule::any(Sysno::munmap),
        Rule::one_of(Sysno::clone, 0, &[THREAD]),
        Rule::any(Sysno::rt_sigprocmask),
        Rule::any(Sysno::sigaltstack),
        Rule::any(Sysno::set_robust_list),
        Rule::any(Sysno::rseq),
        Rule::any(Sysno::prctl),
        Rule::any(Sysno::gettid),
        Rule::any(Sysno::sched_getaffinity),
        Rule::any(Sysno::clock_nanosleep),
        Rule::any(Sysno::exit),
        Rule::any(Sysno::exit_group),
    ],
};

/// All lists.
pub const ALL: [&List; 7] = [&VCPU, &DISKS, &IO, &FILES, &VOLUMES, &HALTS, &MAIN];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_vcpu_has_at_most_20_calls_and_each_list_has_a_call_once() {
        assert!(VCPU.rules.len() <= 20);
        for list in ALL {
            let calls: BTreeSet<_> = list.rules.iter().map(|rule| rule.call.id()).collect();
            assert_eq!(calls.len(), list.rules.len(), "{}", list.name);
        }
    }

    #[test]
    fn no_list_has_a_call_that_opens_starts_or_reaches_anything() {
        let never = [
            Sysno::open,
            Sysno::openat,
            Sysno::openat2,
            Sysno::execve,
            Sysno::execveat,
            Sysno::socket,
            Sysno::connect,
            Sysno::bind,
            Sysno::fork,
            Sysno::vfork,
            Sysno::clone3,
            Sysno::ptrace,
            Sysno::mount,
            Sysno::unshare,
            Sysno::setns,
            Sysno::keyctl,
            Sysno::bpf,
            Sysno::kill,
            Sysno::process_vm_readv,
            Sysno::io_uring_setup,
            Sysno::perf_event_open,
            Sysno::userfaultfd,
        ];
        for list in ALL {
            for rule in list.rules {
                assert!(
                    !never.contains(&rule.call),
                    "{}: {}",
                    list.name,
                    rule.call.name()
                );
            }
        }
    }
}
