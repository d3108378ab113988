// SPDX-License-Identifier: Apache-2.0
//! KVM and the TAP: devices with many requests, of which each thread needs few.

use libc::{EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, ENOTTY, ENXIO, EOPNOTSUPP, EPERM};

use super::calls::{done, ioctl, ioctl_on};
use crate::attempt::Answer::{No, Works};
use crate::attempt::{Answer, Attempt};
use crate::world::{Tried, World, call};

/// Requests of linux/kvm.h.
const KVM_CREATE_VM: u32 = 0xae01;
const KVM_CHECK_EXTENSION: u32 = 0xae03;
const KVM_CREATE_VCPU: u32 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;
const KVM_X86_SET_MSR_FILTER: u32 = 0x4188_aec6;
const KVM_MEMORY_ENCRYPT_OP: u32 = 0xc008_aeba;
const KVM_SET_REGS: u32 = 0x4090_ae82;
const KVM_GET_STATS_FD: u32 = 0xaece;
const KVM_DEV_TYPE_VFIO: u8 = 4;
/// Requests of linux/if_tun.h and sockios.h.
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETPERSIST: u32 = 0x4004_54cb;
const TUNSETOWNER: u32 = 0x4004_54cc;
const TUNSETGROUP: u32 = 0x4004_54ce;
const TUNSETLINK: u32 = 0x4004_54cd;
const TUNSETSNDBUF: u32 = 0x4004_54d4;
const TUNATTACHFILTER: u32 = 0x4010_54d5;
const TUNSETQUEUE: u32 = 0x4004_54d9;
const TUNSETSTEERINGEBPF: u32 = 0x8004_54e0;
const TUNSETCARRIER: u32 = 0x4004_54e2;
const SIOCSIFHWADDR: u32 = 0x8924;
const SIOCGIFHWADDR: u32 = 0x8927;

const TAP_REFUSED: &[Answer] = &[
    No(EINVAL),
    No(EEXIST),
    No(EBUSY),
    No(EPERM),
    No(ENXIO),
    No(libc::EBADFD),
];
const OWN_VM: &str = "it is a VM of its own, within its cgroup";
const OWN_TAP: &str = "the TAP is in its pod's network namespace, which ends with the pod";

/// Gives its VM a page at this address of its own memory, in slot 9, at 1 GiB.
fn give_memory(world: &World, address: u64) -> Tried {
    let region = [9u64, 1 << 30, 4096, address];
    done(call!(
        world,
        ioctl,
        world.held.vm,
        KVM_SET_USER_MEMORY_REGION,
        &region
    ))
}

fn tap(world: &World, request: u32, argument: i64) -> Tried {
    ioctl(world, world.held.tap, request, argument)
}

/// A request about an interface, with what the rest of `ifreq` says.
fn interface(world: &World, request: u32, name: &[u8], rest: &[u8]) -> Tried {
    let mut about = [0u8; 40];
    for (to, from) in about.iter_mut().zip(name) {
        *to = *from;
    }
    for (to, from) in about.iter_mut().skip(16).zip(rest) {
        *to = *from;
    }
    ioctl_on(world, world.held.tap, request, &mut about)
}

fn number(world: &World, request: u32, number: i32) -> Tried {
    ioctl_on(world, world.held.tap, request, &mut number.to_ne_bytes())
}

pub const ALL: &[Attempt] = &[
    Attempt::harmless("create another VM", &[Works], OWN_VM, |w| {
        ioctl(w, w.held.kvm, KVM_CREATE_VM, 0)
    }),
    Attempt::harmless(
        "ask what KVM can do",
        &[Works],
        "every user of KVM may",
        |w| {
            let user_memory = 3;
            ioctl(w, w.held.kvm, KVM_CHECK_EXTENSION, user_memory)
        },
    ),
    Attempt::harmless("create another vCPU", &[Works], OWN_VM, |w| {
        ioctl(w, w.held.vm, KVM_CREATE_VCPU, 1)
    })
    .with_vm(),
    Attempt::harmless("give its VM memory of its own", &[Works], OWN_VM, |w| {
        let page = call!(
            w,
            mmap,
            0,
            4096,
            3,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0
        )?;
        give_memory(w, page as u64)
    })
    .with_vm(),
    Attempt::refused(
        "give its VM memory of the kernel",
        &[No(EINVAL), No(EFAULT)],
        |w| give_memory(w, 0xffff_8880_0000_0000),
    )
    .with_vm(),
    Attempt::refused(
        "have its VM interrupted by a file",
        &[No(EINVAL), No(EBADF)],
        |w| {
            let about = [u64::from(w.held.layer.cast_unsigned()), 0, 0, 0];
            done(call!(w, ioctl, w.held.vm, KVM_IRQFD, &about))
        },
    )
    .with_vm(),
    Attempt::harmless(
        "allow its guest all MSRs",
        &[Works, No(EINVAL)],
        OWN_VM,
        |w| {
            // No ranges: everything is allowed again.
            let mut filter = [0u8; 392];
            ioctl_on(w, w.held.vm, KVM_X86_SET_MSR_FILTER, &mut filter)
        },
    )
    .with_vm(),
    Attempt::harmless(
        "create a device for a host's PCI device (VFIO)",
        &[Works, No(ENODEV), No(EINVAL)],
        "it holds no such device",
        |w| {
            let mut device = [0u8; 12];
            device[0] = KVM_DEV_TYPE_VFIO;
            ioctl_on(w, w.held.vm, KVM_CREATE_DEVICE, &mut device)
        },
    )
    .with_vm(),
    Attempt::refused(
        "use the host's memory encryption",
        &[
            No(ENOTTY),
            No(EINVAL),
            No(EBADF),
            No(EFAULT),
            No(ENODEV),
            No(EPERM),
            No(EOPNOTSUPP),
        ],
        |w| {
            // KVM_SEV_INIT.
            let mut command = [0u8; 24];
            command[20..24].copy_from_slice(&(-1i32).to_ne_bytes());
            ioctl_on(w, w.held.vm, KVM_MEMORY_ENCRYPT_OP, &mut command)
        },
    )
    .with_vm(),
    Attempt::harmless("set registers of its vCPU", &[Works], OWN_VM, |w| {
        let mut registers = [0u8; 144];
        registers[136] = 2;
        ioctl_on(w, w.held.vcpu, KVM_SET_REGS, &mut registers)
    })
    .with_vm(),
    Attempt::harmless(
        "read KVM's counters of its VM",
        &[Works, No(ENOTTY)],
        OWN_VM,
        |w| ioctl(w, w.held.vm, KVM_GET_STATS_FD, 0),
    )
    .with_vm(),
    Attempt::refused("ask a file for what KVM does", &[No(ENOTTY)], |w| {
        ioctl(w, w.held.layer, KVM_CREATE_VM, 0)
    }),
    Attempt::refused("make its TAP another interface", TAP_REFUSED, |w| {
        let flags = u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap_or(0);
        interface(w, TUNSETIFF, b"taken0", &flags.to_ne_bytes())
    }),
    Attempt::harmless("keep its TAP (`TUNSETPERSIST`)", &[Works], OWN_TAP, |w| {
        tap(w, TUNSETPERSIST, 1)
    }),
    Attempt::harmless(
        "give its TAP to another user",
        &[Works, No(EINVAL)],
        OWN_TAP,
        |w| tap(w, TUNSETOWNER, 0),
    ),
    Attempt::harmless(
        "give its TAP to another group",
        &[Works, No(EINVAL)],
        OWN_TAP,
        |w| tap(w, TUNSETGROUP, 0),
    ),
    Attempt::harmless(
        "change its TAP's kind of link",
        &[Works, No(EBUSY), No(EINVAL), No(EOPNOTSUPP)],
        OWN_TAP,
        |w| tap(w, TUNSETLINK, 1),
    ),
    Attempt::harmless(
        "change its TAP's address",
        &[Works, No(EBUSY), No(EPERM), No(EOPNOTSUPP)],
        OWN_TAP,
        |w| {
            let address = [1, 0, 2, 0, 0, 0xaa, 0xbb, 0xcc];
            interface(w, SIOCSIFHWADDR, b"", &address)
        },
    ),
    Attempt::harmless("read its TAP's address", &[Works], OWN_TAP, |w| {
        interface(w, SIOCGIFHWADDR, b"", &[])
    }),
    Attempt::harmless("take its TAP's carrier away", &[Works], OWN_TAP, |w| {
        number(w, TUNSETCARRIER, 0)?;
        number(w, TUNSETCARRIER, 1)
    }),
    Attempt::harmless(
        "enlarge its TAP's buffer",
        &[Works, No(EINVAL)],
        OWN_TAP,
        |w| number(w, TUNSETSNDBUF, i32::MAX),
    ),
    Attempt::refused("add a queue to its TAP", &[No(EINVAL)], |w| {
        let attach = 0x200u16;
        interface(w, TUNSETQUEUE, b"", &attach.to_ne_bytes())
    }),
    Attempt::harmless(
        "filter its TAP's frames",
        &[Works, No(EINVAL)],
        OWN_TAP,
        |w| {
            // `ret -1`: keep all.
            let code = [0x06u64 | (u64::from(u32::MAX) << 32)];
            let program = [1usize, crate::world::Word::from(&code).bits()];
            done(call!(w, ioctl, w.held.tap, TUNATTACHFILTER, &program))
        },
    ),
    Attempt::refused(
        "steer its TAP by a program that is none",
        &[No(EINVAL), No(EBADF), No(EPERM)],
        |w| number(w, TUNSETSTEERINGEBPF, w.held.layer),
    ),
];
