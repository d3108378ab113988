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
/// `_IO(KVMIO, 0x03)`
const KVM_CHECK_EXTENSION: u32 = 0xae03;
/// `_IOWR(KVMIO, 0x62, struct kvm_irqchip)`
const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
/// `_IOR(KVMIO, 0x7c, struct kvm_clock_data)`
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
/// `_IOR(KVMIO, 0x83, struct kvm_sregs)`
const KVM_GET_SREGS: u32 = 0x8138_ae83;
/// `_IOWR(KVMIO, 0x88, struct kvm_msrs)`
const KVM_GET_MSRS: u32 = 0xc008_ae88;
/// `_IOR(KVMIO, 0x8e, struct kvm_lapic_state)`
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
/// `_IOWR(KVMIO, 0x91, struct kvm_cpuid2)`
const KVM_GET_CPUID2: u32 = 0xc008_ae91;
/// `_IOR(KVMIO, 0x9f, struct kvm_vcpu_events)`
const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
/// `_IOR(KVMIO, 0xa1, struct kvm_debugregs)`
const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
/// `_IO(KVMIO, 0xa3)`
const KVM_GET_TSC_KHZ: u32 = 0xaea3;
/// `_IOR(KVMIO, 0xa4, struct kvm_xsave)`
const KVM_GET_XSAVE: u32 = 0x9000_aea4;
/// `_IOR(KVMIO, 0xa6, struct kvm_xcrs)`
const KVM_GET_XCRS: u32 = 0x8188_aea6;
/// `_IOR(KVMIO, 0xcf, struct kvm_xsave)`
const KVM_GET_XSAVE2: u32 = 0x9000_aecf;
/// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`
const KVM_GET_DEVICE_ATTR: u32 = 0x4018_aee2;
/// `_IO(KVMIO, 0xad)`
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
/// `_IOW('T', 208, unsigned int)`
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const FIONBIO: u32 = 0x5421;
/// `FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE`. Without the second, a file takes space behind its end, which no limit of
/// its size forbids.
const PUNCH_HOLE: u32 = 3;
const MADV_DONTNEED: u32 = 4;
const F_GETFD: u32 = 1;
const F_GETFL: u32 = 3;

const PROT_EXEC: u64 = 4;
/// What the C library asks for when it makes a thread: it shares all with the process.
const THREAD: u32 = 0x003d_0f00;

/// What every thread may need: memory, locks, the time, and to go on after it was stopped.
const COMMON: &[Rule] = &[
    Rule::any(Sysno::brk).seldom(HEAP),
    Rule::without(Sysno::mmap, 2, PROT_EXEC).seldom(HEAP),
    Rule::any(Sysno::munmap).seldom(HEAP),
    Rule::any(Sysno::mremap).seldom(HEAP),
    Rule::any(Sysno::futex).seldom(LOCK),
    Rule::any(Sysno::sched_yield).seldom(LOCK),
    Rule::any(Sysno::clock_gettime).seldom("the host's clock can be read without a call"),
    Rule::any(Sysno::restart_syscall).seldom("the process was not stopped in a wait"),
];
const HEAP: &str = "the heap seldom grows after the boot";
const LOCK: &str = "two threads seldom want a lock at once";

/// How a device's thread waits for work, and interrupts the guest.
const EVENTS: &[Rule] = &[
    Rule::any(Sysno::epoll_wait),
    Rule::any(Sysno::read),
    Rule::any(Sysno::write),
];

/// What a disk does with its files. Holes are what a guest discards.
const BLOCKS: &[Rule] = &[
    Rule::any(Sysno::preadv),
    Rule::any(Sysno::pwritev),
    Rule::one_of(Sysno::fallocate, 1, &[PUNCH_HOLE]),
];

/// How a thread makes a vCPU leave the guest: the C library's `pthread_kill`.
const KICK: &[Rule] = &[
    Rule::any(Sysno::rt_sigprocmask),
    Rule::any(Sysno::getpid),
    Rule::any(Sysno::tgkill),
];

/// What a debug build does before it closes a descriptor: it looks whether it is open.
#[cfg(debug_assertions)]
const CLOSE_CHECK: &[Rule] = &[Rule::any(Sysno::fcntl)];
#[cfg(not(debug_assertions))]
const CLOSE_CHECK: &[Rule] = &[];

/// Runs the guest, and what its writes to device registers start: the reset of a device closes streams.
pub const VCPU: List = List {
    name: "vcpu",
    rules: &[
        &[
            Rule::one_of(
                Sysno::ioctl,
                1,
                &[
                    KVM_RUN,
                    KVM_GET_REGS,
                    KVM_GET_MP_STATE,
                    KVM_SET_SIGNAL_MASK,
                    KVM_KVMCLOCK_CTRL,
                    TUNSETOFFLOAD,
                ],
            ),
            Rule::any(Sysno::write),
            Rule::any(Sysno::rt_sigtimedwait),
            Rule::any(Sysno::rt_sigpending),
            Rule::any(Sysno::shutdown).seldom("a guest that restarts seldom has a stream open"),
            Rule::any(Sysno::clock_nanosleep).seldom("the host does not notice bus locks"),
            Rule::any(Sysno::close),
        ],
        CLOSE_CHECK,
        COMMON,
    ],
};

/// The image disk and the scratch disk.
pub const DISKS: List = List {
    name: "disks",
    rules: &[
        &[Rule::any(Sysno::fdatasync).seldom("a guest need not flush what does not outlive it")],
        BLOCKS,
        EVENTS,
        COMMON,
    ],
};

/// vsock, network, random numbers and balloon.
pub const IO: List = List {
    name: "io",
    rules: &[
        &[
            Rule::any(Sysno::epoll_ctl),
            Rule::any(Sysno::readv),
            Rule::any(Sysno::writev),
            Rule::any(Sysno::accept4),
            Rule::any(Sysno::recvfrom),
            Rule::any(Sysno::sendto),
            Rule::any(Sysno::sendmsg),
            Rule::any(Sysno::shutdown),
            Rule::one_of(Sysno::ioctl, 1, &[FIONBIO]),
            Rule::any(Sysno::close),
            Rule::any(Sysno::timerfd_settime),
            Rule::any(Sysno::getrandom),
            Rule::one_of(Sysno::fallocate, 1, &[PUNCH_HOLE]),
            // What a fork's guest gives back.
            Rule::one_of(Sysno::madvise, 2, &[MADV_DONTNEED]),
        ],
        EVENTS,
        CLOSE_CHECK,
        COMMON,
    ],
};

/// Shared directories.
pub const FILES: List = List {
    name: "files",
    rules: &[
        &[
            Rule::any(Sysno::readv),
            Rule::any(Sysno::recvfrom),
            Rule::any(Sysno::sendto),
            Rule::any(Sysno::close),
        ],
        EVENTS,
        CLOSE_CHECK,
        COMMON,
    ],
};

/// The volume disk.
pub const VOLUMES: List = List {
    name: "volumes",
    rules: &[&[Rule::any(Sysno::fdatasync)], BLOCKS, EVENTS, COMMON],
};

/// Looks whether the guest has halted for good.
pub const HALTS: List = List {
    name: "halts",
    rules: &[
        &[
            Rule::any(Sysno::clock_nanosleep),
            Rule::any(Sysno::pread64),
            Rule::any(Sysno::write),
        ],
        KICK,
        COMMON,
    ],
};

/// The control socket and the end of the VM.
const CONTROL: &[Rule] = &[
    Rule::any(Sysno::ppoll),
    Rule::any(Sysno::accept4),
    Rule::any(Sysno::recvmsg),
    Rule::any(Sysno::sendto),
    Rule::one_of(Sysno::ioctl, 1, &[FIONBIO]),
    Rule::any(Sysno::pread64),
    Rule::any(Sysno::write),
    Rule::any(Sysno::fdatasync),
    Rule::any(Sysno::close),
    Rule::any(Sysno::exit_group),
];

/// How the state of a VM is taken. It is written with what [`CONTROL`] has.
const CAPTURE: &[Rule] = &[
    Rule::one_of(
        Sysno::ioctl,
        1,
        &[
            KVM_CHECK_EXTENSION,
            KVM_GET_CLOCK,
            KVM_GET_CPUID2,
            KVM_GET_DEBUGREGS,
            KVM_GET_DEVICE_ATTR,
            KVM_GET_IRQCHIP,
            KVM_GET_LAPIC,
            KVM_GET_MP_STATE,
            KVM_GET_MSRS,
            KVM_GET_REGS,
            KVM_GET_SREGS,
            KVM_GET_TSC_KHZ,
            KVM_GET_VCPU_EVENTS,
            KVM_GET_XCRS,
        ],
    ),
    Rule::one_of(Sysno::ioctl, 1, &[KVM_GET_XSAVE, KVM_GET_XSAVE2])
        .seldom("the host's kernel knows one of the two"),
    Rule::any(Sysno::clock_nanosleep)
        .seldom("a device's turn, and the last request to a volume, seldom have to be waited for"),
];

/// The main thread of a VM. Short threads that close volumes inherit this list.
pub const MAIN: List = List {
    name: "bulkhead-vm",
    rules: &[
        CONTROL,
        &[
            Rule::one_of(Sysno::fcntl, 1, &[F_GETFD, F_GETFL]),
            Rule::any(Sysno::statx),
            Rule::any(Sysno::lseek),
            Rule::any(Sysno::getsockopt),
            Rule::any(Sysno::epoll_ctl),
            Rule::any(Sysno::read)
                .seldom("the daemon asks a VM to end by its control socket, not by a signal"),
        ],
        CAPTURE,
        // The rest of a checkpoint: the lengths of its files, and copies of memory and disk.
        &[Rule::any(Sysno::ftruncate), Rule::any(Sysno::pwrite64)],
        // Threads that close volumes.
        &[
            Rule::one_of(Sysno::clone, 0, &[THREAD]),
            Rule::without(Sysno::mprotect, 2, PROT_EXEC),
            Rule::any(Sysno::madvise),
            Rule::any(Sysno::sigaltstack),
            Rule::any(Sysno::set_robust_list),
            Rule::any(Sysno::rseq),
            Rule::any(Sysno::gettid),
            Rule::any(Sysno::sched_getaffinity),
            Rule::any(Sysno::exit),
        ],
        KICK,
        COMMON,
    ],
};

/// The main thread of a template, which nobody asks for anything but its state.
pub const TEMPLATE: List = List {
    name: "template",
    rules: &[CONTROL, CAPTURE, CLOSE_CHECK, KICK, COMMON],
};

/// All lists.
pub const ALL: [&List; 8] = [
    &VCPU, &DISKS, &IO, &FILES, &VOLUMES, &HALTS, &MAIN, &TEMPLATE,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bulkhead_jail::syscalls::When;

    use super::*;

    #[test]
    fn a_vcpu_has_at_most_20_calls_and_a_call_has_several_rules_only_for_its_values() {
        for list in ALL {
            let mut calls = BTreeMap::<_, Vec<_>>::new();
            for rule in list.all() {
                calls.entry(rule.call.name()).or_default().push(rule.when);
            }
            assert!(list.name != "vcpu" || calls.len() <= 20, "{}", calls.len());
            for (call, conditions) in calls {
                let of_values = |when: &When| matches!(when, When::OneOf(..));
                let is_good = conditions.len() == 1 || conditions.iter().all(of_values);
                assert!(is_good, "{}: {call}: {conditions:?}", list.name);
            }
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
            for rule in list.all() {
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
