// SPDX-License-Identifier: Apache-2.0
//! Tests whether this host's /dev/kvm really runs guests. Its existence proves nothing: a software KVM for
//! paravirtualized guests can be opened and creates vCPUs, but then delivers the first `syscall` of user
//! space with the wrong privilege level. So the probe runs a few instructions in a guest and checks them.

use std::fmt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use bulkhead_text::chain;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::signal::{Killable, block_signal};

use crate::memory::{self, Memory};
use crate::vcpu::kick_signal;
use crate::{cpu, sys};

const TIME_LIMIT: Duration = Duration::from_secs(2);
/// How long an interrupted vCPU may take to leave the guest.
const KICK_LIMIT: Duration = Duration::from_secs(1);
const MEMORY_BYTES: u64 = 2 << 20;

const GDT: u64 = 0x1000;
const IDT: u64 = 0x1800;
const PAGE_TABLES: u64 = 0x2000;
const TSS: u64 = 0x5000;
const CODE: u64 = 0x8000;
const STACK: u64 = 0xa000;
/// Offsets of handlers in [`PROGRAM`]. The addresses of its user stack (0xb000) and its 16 bytes of data
/// (0x9000) are in its machine code.
const BREAKPOINT: u64 = CODE + 0x50;
const SYSCALL: u64 = CODE + 0x60;

const PORT: u16 = 0x600;
/// The steps of the program. Each one that works sets its bit; otherwise the text says what failed.
const STEPS: [(u32, &str); 4] = [
    (1, "an int3 did not reach its handler"),
    (2, "a cmpxchg16b did not work"),
    (4, "ring 3 was not entered"),
    (8, "a syscall did not arrive in ring 0"),
];

const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;

/// The guest's program. It collects the bits of [`STEPS`] in R12 and writes them to [`PORT`].
#[rustfmt::skip]
const PROGRAM: [u8; 0x80] = [
    // ring 0 begins
    0x45, 0x31, 0xe4, // xor r12d,r12d
    0xcc, // int3
    0x31, 0xc0, // xor eax,eax
    0x31, 0xd2, // xor edx,edx
    0xbb, 0x01, 0x00, 0x00, 0x00, // mov ebx,0x1
    0x31, 0xc9, // xor ecx,ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x00, 0x90, 0x00, 0x00, // lock cmpxchg16b OWORD PTR ds:0x9000
    0x75, 0x4f, // jne 6a <done>
    0x41, 0x83, 0xcc, 0x02, // or r12d,0x2
    0x6a, 0x23, // push 0x23
    0x68, 0x00, 0xb0, 0x00, 0x00, // push 0xb000
    0x6a, 0x02, // push 0x2
    0x6a, 0x2b, // push 0x2b
    0x68, 0x40, 0x80, 0x00, 0x00, // push 0x8040
    0x48, 0xcf, // iretq
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    // 0x40: ring 3
    0x41, 0x83, 0xcc, 0x04, // or r12d,0x4
    0x0f, 0x05, // syscall
    0xeb, 0xfe, // jmp 46 <spin>
    0, 0, 0, 0, 0, 0, 0, 0,
    // 0x50: int3
    0x41, 0x83, 0xcc, 0x01, // or r12d,0x1
    0x48, 0xcf, // iretq
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    // 0x60: syscall
    0x8c, 0xc8, // mov eax,cs
    0xa8, 0x03, // test al,0x3
    0x75, 0x04, // jne 6a <done>
    0x41, 0x83, 0xcc, 0x08, // or r12d,0x8
    // report
    0x44, 0x89, 0xe0, // mov eax,r12d
    0x66, 0xba, 0x00, 0x06, // mov dx,0x600
    0xef, // out dx,eax
    0xf4, // hlt
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// The result of the probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub usable: bool,
    /// Why KVM is not usable. Empty if it is.
    pub cause: String,
    pub remedy: String,
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    #[error("/dev/kvm has API version {0}, expected 12")]
    Version(i32),
    #[error("KVM lacks {0}")]
    Lacks(&'static str),
    #[error("{what}")]
    Kvm {
        what: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("prepare probe guest: {0}")]
    Prepare(String),
    #[error("the probe guest did not finish within {TIME_LIMIT:?}")]
    Slow,
    #[error("the probe guest did not finish, and its vCPU cannot be interrupted")]
    Stuck,
    #[error("in the probe guest, {0}")]
    Wrong(&'static str),
    #[error("the probe guest ended with {0}")]
    Ended(String),
}

impl ProbeError {
    fn remedy(&self) -> &'static str {
        match self {
            Self::Open(e) if e.errno() == libc::ENOENT => {
                "switch on virtualization in the firmware, or nested virtualization if this is a \
                 virtual machine, and load kvm_intel or kvm_amd"
            }
            Self::Open(e) if matches!(e.errno(), libc::EACCES | libc::EPERM) => {
                "run as root or as a member of the group that owns /dev/kvm"
            }
            Self::Open(_) | Self::Version(_) | Self::Prepare(_) => {
                "check /dev/kvm and the kernel's log"
            }
            Self::Lacks(_) => "use a newer kernel",
            _ => {
                "this KVM cannot run ordinary guests (a software KVM?): use a machine with \
                 hardware or nested virtualization, or scripts/kvm-host"
            }
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.usable {
            f.write_str("/dev/kvm runs guests")
        } else {
            write!(
                f,
                "/dev/kvm cannot be used: {}\nremedy: {}",
                self.cause, self.remedy
            )
        }
    }
}

/// Runs the probe guest. Takes a few seconds at most.
#[must_use]
pub fn probe() -> Verdict {
    match run() {
        Ok(()) => Verdict {
            usable: true,
            cause: String::new(),
            remedy: String::new(),
        },
        Err(e) => Verdict {
            usable: false,
            cause: chain(&e),
            remedy: e.remedy().to_owned(),
        },
    }
}

fn run() -> Result<(), ProbeError> {
    let kvm = Kvm::new().map_err(ProbeError::Open)?;
    if kvm.get_api_version() != 12 {
        return Err(ProbeError::Version(kvm.get_api_version()));
    }
    let needed = [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::UserMemory, "user memory"),
        (Cap::ReadonlyMem, "read-only memory"),
        (Cap::X86MsrFilter, "a filter of MSRs (Linux 5.10)"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(ProbeError::Lacks(name));
        }
    }
    let failed = |what| move |source| ProbeError::Kvm { what, source };
    let vm = kvm.create_vm().map_err(failed("create VM"))?;
    let memory = guest_memory()?;
    for (slot, region) in (0..).zip(memory.iter()) {
        sys::set_memory_region(&vm, slot, region, sys::Access::ReadWrite)
            .map_err(|e| ProbeError::Prepare(e.to_string()))?;
    }
    let vcpu = make_vcpu(&kvm, &vm)?;
    run_limited(vcpu, &vm, &memory)
}

/// Runs the vCPU on a thread of its own and interrupts it when the time is over.
fn run_limited(vcpu: VcpuFd, _vm: &VmFd, _memory: &Memory) -> Result<(), ProbeError> {
    let prepare = |e: String| ProbeError::Prepare(e);
    block_signal(kick_signal()).map_err(|e| prepare(e.to_string()))?;
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(move || {
            // This fails only if the receiver has given up waiting.
            let _ = sender.send(observe(vcpu));
        })
        .map_err(|e| prepare(e.to_string()))?;
    match receiver.recv_timeout(TIME_LIMIT) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err(ProbeError::Ended("a lost thread".to_owned())),
        Err(RecvTimeoutError::Timeout) => {
            let _ = thread.kill(kick_signal());
            match receiver.recv_timeout(KICK_LIMIT) {
                Ok(_) => Err(ProbeError::Slow),
                // The thread cannot be ended. The process ends soon, and the thread with it.
                Err(_) => Err(ProbeError::Stuck),
            }
        }
    }
}

/// Runs the guest's program to its report and checks that.
fn observe(mut vcpu: VcpuFd) -> Result<(), ProbeError> {
    sys::unblock_signal_in_guest(&vcpu, kick_signal())
        .map_err(|e| ProbeError::Prepare(e.to_string()))?;
    let steps = match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, data)) => u32::from_le_bytes(data.try_into().unwrap_or_default()),
        Ok(VcpuExit::Shutdown) => {
            return Err(ProbeError::Ended("a triple fault".to_owned()));
        }
        Ok(VcpuExit::InternalError) => {
            return Err(ProbeError::Ended("a KVM internal error".to_owned()));
        }
        Ok(other) => return Err(ProbeError::Ended(format!("{other:?}"))),
        Err(e) => return Err(ProbeError::Ended(format!("KVM_RUN: {e}"))),
    };
    for (bit, missing) in STEPS {
        if steps & bit == 0 {
            return Err(ProbeError::Wrong(missing));
        }
    }
    // The guest has reported success. Check that KVM agrees about the privilege level.
    let sregs = vcpu.get_sregs().map_err(|source| ProbeError::Kvm {
        what: "read registers",
        source,
    })?;
    if sregs.cs.selector & 3 != 0 || sregs.ss.dpl != 0 {
        return Err(ProbeError::Wrong("a syscall left the CPU in ring 3"));
    }
    Ok(())
}

/// Memory with descriptor tables, page tables and the program.
fn guest_memory() -> Result<Memory, ProbeError> {
    let memory = memory::create(MEMORY_BYTES).map_err(|e| ProbeError::Prepare(chain(&e)))?;
    // A 64-bit interrupt gate into the kernel's code segment, which ring 0 may call.
    let gate = BREAKPOINT & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e00 << 32;
    let words = [
        (GDT + 0x08, 0x00af_9b00_0000_ffff), // kernel code
        (GDT + 0x10, 0x00cf_9300_0000_ffff), // kernel data
        (GDT + 0x20, 0x00cf_f300_0000_ffff), // user data
        (GDT + 0x28, 0x00af_fb00_0000_ffff), // user code
        (IDT + 3 * 16, gate),
        // Present, writable, also for user mode. The last one is a page of 2 MiB.
        (PAGE_TABLES, (PAGE_TABLES + 0x1000) | 7),
        (PAGE_TABLES + 0x1000, (PAGE_TABLES + 0x2000) | 7),
        (PAGE_TABLES + 0x2000, 0x87),
    ];
    let write = || {
        for (address, word) in words {
            memory.write_obj::<u64>(word, GuestAddress(address))?;
        }
        memory.write_slice(&PROGRAM, GuestAddress(CODE))
    };
    write().map_err(|e: vm_memory::GuestMemoryError| ProbeError::Prepare(e.to_string()))?;
    Ok(memory)
}

/// A vCPU in long mode, about to execute the program in ring 0.
fn make_vcpu(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd, ProbeError> {
    let failed = |what| move |source| ProbeError::Kvm { what, source };
    let vcpu = vm.create_vcpu(0).map_err(failed("create vCPU"))?;
    let cpuid = cpu::host_cpuid(kvm).map_err(failed("read supported CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("set CPUID"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("read registers"))?;
    sregs.cs = cpu::segment(KERNEL_CODE, 11, 0, true);
    let data = cpu::segment(KERNEL_DATA, 3, 0, false);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 0x2f;
    sregs.idt.base = IDT;
    sregs.idt.limit = 0x3f;
    // PE, ET, NE, PG; PAE; SCE, LME, LMA.
    sregs.cr0 = 0x8000_0031;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20;
    sregs.efer = 0x501;
    vcpu.set_sregs(&sregs).map_err(failed("enter long mode"))?;
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    // SYSCALL loads KERNEL_CODE. SYSRET would load the segments at 0x18 + 8 and 0x18 + 16.
    let star = u64::from(KERNEL_CODE) << 32 | 0x18 << 48;
    let msrs = [
        msr(MSR_STAR, star),
        msr(MSR_LSTAR, SYSCALL),
        msr(MSR_FMASK, 0),
    ];
    let msrs = Msrs::from_entries(&msrs).map_err(|e| ProbeError::Prepare(format!("{e:?}")))?;
    vcpu.set_msrs(&msrs).map_err(failed("set MSRs"))?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    })
    .map_err(failed("set registers"))?;
    Ok(vcpu)
}
