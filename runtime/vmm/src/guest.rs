// SPDX-License-Identifier: Apache-2.0
//! Tiny guests for tests on KVM: a few instructions in 64-bit mode, ring 0, with interrupts off and an x2APIC.
//!
//! A test that has one is `#[ignore = "needs KVM..."]`, so a run of the unit tests says that it was left out. `scripts/test`
//! runs these tests on a KVM host.

use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::signal::{self, Killable, block_signal, clear_signal};

use crate::boot::{self, Entry};
use crate::cpu;
use crate::memory::{self, Memory};
use crate::probe::{self, Verdict};
use crate::sys::{self, Access};
use crate::vcpu::kick_signal;
use crate::vm::machine::create_vm;

/// Where a program is.
pub const CODE: u64 = 0x1_0000;
/// How long a guest may take for a few instructions on a slow host.
pub const LIMIT: Duration = Duration::from_secs(30);
/// The first bytes of what a guest reads from a device.
pub const ANSWER: [u8; 8] = *b"answered";

const IDT: u64 = 0x1000;
const STACK: u64 = 0x8000;
const MEMORY_BYTES: u64 = 2 << 20;
const CODE_SEGMENT: u64 = 0x10;

/// A VM without devices.
#[allow(missing_debug_implementations)]
pub struct Guest {
    // Fields are dropped in this order: the VM before its memory.
    pub vcpus: Vec<VcpuFd>,
    pub vm: VmFd,
    pub kvm: Kvm,
    pub memory: Arc<Memory>,
}

/// How a vCPU left the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Left {
    Out { port: u16, value: u32 },
    Read { address: u64 },
}

impl Guest {
    /// A VM with this memory. Its vCPUs are not set up.
    pub fn with(memory: Arc<Memory>, vcpus: u8) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = create_vm(&kvm).unwrap();
        for (slot, region) in (0..).zip(memory.iter()) {
            sys::set_memory_region(&vm, slot, region, Access::ReadWrite).unwrap();
        }
        let vcpus = (0..vcpus).map(|id| vm.create_vcpu(id.into()).unwrap());
        Self {
            vcpus: vcpus.collect(),
            vm,
            kvm,
            memory,
        }
    }

    /// A VM that is about to run `program`.
    pub fn new(vcpus: u8, program: &[u8]) -> Self {
        static VERDICT: OnceLock<Verdict> = OnceLock::new();
        let verdict = VERDICT.get_or_init(probe::probe);
        assert!(verdict.usable, "this test needs KVM: {verdict}");
        let memory = Arc::new(memory::create(MEMORY_BYTES).unwrap());
        let gdt_limit = boot::write_gdt(&memory).unwrap();
        boot::write_page_tables(&memory).unwrap();
        memory.write_slice(program, GuestAddress(CODE)).unwrap();
        let entry = Entry {
            rip: CODE,
            zero_page: 0,
            stack: STACK,
            gdt: boot::GDT,
            gdt_limit,
            page_table: boot::PAGE_TABLES,
        };
        let guest = Self::with(memory, vcpus);
        let cpuid = cpu::host_cpuid(&guest.kvm).unwrap();
        for (id, vcpu) in (0..vcpus).zip(&guest.vcpus) {
            cpu::set_up(vcpu, &cpuid, id, vcpus, &entry).unwrap();
        }
        let mut special = guest.vcpus[0].get_sregs().unwrap();
        special.idt.base = IDT;
        special.idt.limit = 0xfff;
        // OSFXSR, for vector registers.
        special.cr4 |= 1 << 9;
        // EXTD: the local APIC's registers are MSRs.
        special.apic_base |= 1 << 10;
        guest.vcpus[0].set_sregs(&special).unwrap();
        guest
    }

    /// Lets an interrupt start the code at `offset` of the program.
    pub fn handle(&self, vector: u8, offset: u64) {
        let handler = CODE + offset;
        // A 64-bit interrupt gate.
        let low = handler & 0xffff | CODE_SEGMENT << 16 | 0x8e00 << 32 | handler >> 16 << 48;
        let gate = GuestAddress(IDT + u64::from(vector) * 16);
        self.memory.write_obj(low, gate).unwrap();
    }
}

/// Enters the guest until an access to a device. A read is answered with [`ANSWER`].
pub fn enter(mut vcpu: VcpuFd) -> (VcpuFd, Left) {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let left = match vcpu.run().unwrap() {
            VcpuExit::IoOut(port, data) => {
                let mut value = [0; 4];
                value[..data.len()].copy_from_slice(data);
                let value = u32::from_le_bytes(value);
                Left::Out { port, value }
            }
            VcpuExit::MmioRead(address, data) => {
                data.copy_from_slice(&ANSWER[..data.len()]);
                Left::Read { address }
            }
            other => panic!("the guest ended with {other:?}"),
        };
        sender.send((vcpu, left)).unwrap();
    });
    receiver.recv_timeout(LIMIT).expect("the guest hangs")
}

/// Finishes the access for which the vCPU left the guest, without running the guest.
pub fn finish(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    let ended = vcpu.run().map(|exit| format!("{exit:?}"));
    assert_eq!(ended.unwrap_err().errno(), libc::EINTR);
    vcpu.set_kvm_immediate_exit(0);
}

/// Blocks the signal that interrupts KVM_RUN, in this thread and in those that it makes.
pub fn block_kicks() {
    match block_signal(kick_signal()) {
        // The probe has done it.
        Ok(()) | Err(signal::Error::SignalAlreadyBlocked(_)) => {}
        Err(e) => panic!("{e}"),
    }
}

/// Runs the guest until it waits for an interrupt.
pub fn enter_until_halted(mut vcpu: VcpuFd) -> VcpuFd {
    block_kicks();
    sys::unblock_signal_in_guest(&vcpu, kick_signal()).unwrap();
    let started = Instant::now();
    while vcpu.get_mp_state().unwrap().mp_state != KVM_MP_STATE_HALTED {
        assert!(started.elapsed() < LIMIT, "the guest does not halt");
        let thread = std::thread::spawn(move || {
            let ended = vcpu.run().map(|exit| format!("{exit:?}"));
            assert_eq!(ended.unwrap_err().errno(), libc::EINTR);
            clear_signal(kick_signal()).unwrap();
            vcpu
        });
        std::thread::sleep(Duration::from_millis(10));
        thread.kill(kick_signal()).unwrap();
        vcpu = thread.join().unwrap();
    }
    vcpu
}

/// Waits for a condition.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LIMIT, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
