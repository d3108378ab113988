// SPDX-License-Identifier: Apache-2.0
//! Tests on KVM: guests that are stopped in the middle of something and go on in another VM with the same memory.

use std::sync::Arc;

use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;

use super::refusal::Refusal;
use super::vcpu::VcpuState;
use super::{Host, State, TransferError, msrs};
use crate::bus::DeviceStates;
use crate::config::KernelSum;
use crate::cpu::MSR_MTRR_DEF_TYPE;
use crate::devices::serial::SerialRegisters;
use crate::guest::{ANSWER, Guest, Left, enter, enter_until_halted, finish};
use crate::sys;

const KERNEL: KernelSum = [3; 32];
/// To which programs report.
const PORT: u16 = 0x601;
/// What a program says when the other interrupt line may be lowered.
const LOWER: u16 = 0x602;

/// Arms the timer for RBX ticks from now and waits. Reports how many ticks after that it went off.
#[rustfmt::skip]
const TIMER: [u8; 0x92] = [
    0x31, 0xd2, // xor edx,edx
    0xb9, 0x0f, 0x08, 0x00, 0x00, // mov ecx,0x80f: spurious interrupts, and the APIC's switch
    0xb8, 0xff, 0x01, 0x00, 0x00, // mov eax,0x1ff
    0x0f, 0x30, // wrmsr
    0xb9, 0x32, 0x08, 0x00, 0x00, // mov ecx,0x832: the timer's mode
    0xb8, 0x40, 0x00, 0x04, 0x00, // mov eax,0x40040: a deadline, vector 0x40
    0x0f, 0x30, // wrmsr
    0x0f, 0x31, // rdtsc
    0x48, 0xc1, 0xe2, 0x20, // shl rdx,32
    0x48, 0x09, 0xd0, // or rax,rdx
    0x48, 0x01, 0xd8, // add rax,rbx
    0x48, 0x89, 0xc7, // mov rdi,rax
    0x48, 0x89, 0xc2, // mov rdx,rax
    0x48, 0xc1, 0xea, 0x20, // shr rdx,32
    0xb9, 0xe0, 0x06, 0x00, 0x00, // mov ecx,0x6e0: the deadline
    0x0f, 0x30, // wrmsr
    0xfb, // sti
    // 0x38: again
    0xf4, // hlt
    0xeb, 0xfd, // jmp again
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    // 0x80: vector 0x40
    0x0f, 0x31, // rdtsc
    0x48, 0xc1, 0xe2, 0x20, // shl rdx,32
    0x48, 0x09, 0xd0, // or rax,rdx
    0x48, 0x29, 0xf8, // sub rax,rdi
    0x66, 0xba, 0x01, 0x06, // mov dx,0x601
    0xef, // out dx,eax
    0xf4, // hlt
];

/// Connects line 5 by edges, and line 6 by its level but masked. Reports, and takes what both have sent meanwhile.
#[rustfmt::skip]
const INTERRUPTS: [u8; 0xab] = [
    0xb0, 0xff, // mov al,0xff
    0xe6, 0x21, // out 0x21,al: the PICs have all lines masked
    0xe6, 0xa1, // out 0xa1,al
    0x31, 0xd2, // xor edx,edx
    0xb9, 0x0f, 0x08, 0x00, 0x00, // mov ecx,0x80f
    0xb8, 0xff, 0x01, 0x00, 0x00, // mov eax,0x1ff
    0x0f, 0x30, // wrmsr
    0xbf, 0x00, 0x00, 0xc0, 0xfe, // mov edi,0xfec00000: the IO-APIC
    0xc7, 0x07, 0x1a, 0x00, 0x00, 0x00, // mov dword ptr [rdi],0x1a
    0xc7, 0x47, 0x10, 0x50, 0x00, 0x00, 0x00, // mov dword ptr [rdi+0x10],0x50
    0xc7, 0x07, 0x1c, 0x00, 0x00, 0x00, // mov dword ptr [rdi],0x1c
    0xc7, 0x47, 0x10, 0x51, 0x80, 0x01, 0x00, // mov dword ptr [rdi+0x10],0x18051
    0x31, 0xdb, // xor ebx,ebx
    0xba, 0x01, 0x06, 0x00, 0x00, // mov edx,0x601
    0xef, // out dx,eax
    0xfb, // sti
    0xc7, 0x07, 0x1c, 0x00, 0x00, 0x00, // mov dword ptr [rdi],0x1c
    0xc7, 0x47, 0x10, 0x51, 0x80, 0x00, 0x00, // mov dword ptr [rdi+0x10],0x8051
    // 0x49: spin
    0x83, 0xfb, 0x03, // cmp ebx,3
    0x75, 0xfb, // jne spin
    0x89, 0xd8, // mov eax,ebx
    0xef, // out dx,eax
    0xf4, // hlt
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    // 0x80: vector 0x50
    0x83, 0xcb, 0x01, // or ebx,1
    // 0x83: end of the interrupt
    0xb9, 0x0b, 0x08, 0x00, 0x00, // mov ecx,0x80b
    0x31, 0xc0, // xor eax,eax
    0x31, 0xd2, // xor edx,edx
    0x0f, 0x30, // wrmsr
    0xba, 0x01, 0x06, 0x00, 0x00, // mov edx,0x601
    0x48, 0xcf, // iretq
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    // 0xa0: vector 0x51
    0x83, 0xcb, 0x02, // or ebx,2
    0xba, 0x02, 0x06, 0x00, 0x00, // mov edx,0x602
    0xef, // out dx,eax
    0xeb, 0xd8, // jmp 0x83
];

/// Fills registers of several kinds from RSI, RDI and R8, reads from a device, and reports all of them together.
#[rustfmt::skip]
const REGISTERS: [u8; 0x42] = [
    0x66, 0x48, 0x0f, 0x6e, 0xfe, // movq xmm7,rsi
    0x0f, 0x23, 0xc7, // mov dr0,rdi
    0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx,0xc0000102: KERNEL_GS_BASE
    0x44, 0x89, 0xc0, // mov eax,r8d
    0x31, 0xd2, // xor edx,edx
    0x0f, 0x30, // wrmsr
    0xbb, 0x00, 0x00, 0x00, 0xd0, // mov ebx,0xd0000000
    0x48, 0x8b, 0x1b, // mov rbx,[rbx]
    0x66, 0x48, 0x0f, 0x7e, 0xf8, // movq rax,xmm7
    0x48, 0x31, 0xd8, // xor rax,rbx
    0x0f, 0x21, 0xc1, // mov rcx,dr0
    0x48, 0x31, 0xc8, // xor rax,rcx
    0x48, 0x89, 0xc3, // mov rbx,rax
    0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx,0xc0000102
    0x0f, 0x32, // rdmsr
    0x48, 0x31, 0xd8, // xor rax,rbx
    0x66, 0xba, 0x01, 0x06, // mov dx,0x601
    0xef, // out dx,eax
    0x48, 0xc1, 0xe8, 0x20, // shr rax,32
    0xef, // out dx,eax
    0xf4, // hlt
];
const DEVICE: u64 = 0xd000_0000;

fn captured(guest: &Guest) -> State {
    let host = Host::of(&guest.kvm).unwrap();
    let devices = DeviceStates {
        serial: SerialRegisters::default(),
        transports: Vec::new(),
    };
    State::capture(&host, KERNEL, &guest.vm, &guest.vcpus, devices).unwrap()
}

/// The guest in another VM, by way of the bytes of its state. The first VM is gone.
fn moved(guest: Guest) -> Guest {
    let before = captured(&guest);
    let bytes = before.write().unwrap();
    let (memory, count) = (Arc::clone(&guest.memory), guest.vcpus.len());
    drop(guest);
    let guest = Guest::with(memory, u8::try_from(count).unwrap());
    let host = Host::of(&guest.kvm).unwrap();
    let state = State::read(bytes.as_slice()).unwrap();
    state
        .restore(&host, KERNEL, &guest.vm, &guest.vcpus)
        .unwrap();
    let after = captured(&guest);
    for (before, after) in before.vcpus.iter().zip(&after.vcpus) {
        assert_same(before, after);
    }
    // Both clocks stood still, and have gone on since.
    let ticks = [&before, &after].map(|state| msr(state, msrs::TSC));
    assert_went_on(
        ticks,
        u64::from(before.vcpus[0].tsc_khz).saturating_mul(1000),
    );
    assert_went_on([before.vm.clock, after.vm.clock], 1_000_000_000);
    guest
}

fn assert_went_on([before, after]: [u64; 2], per_second: u64) {
    let passed = after.checked_sub(before).expect("a clock went back");
    assert!(passed < per_second.saturating_mul(30), "{passed}");
}

/// Compares all that does not change by itself.
fn assert_same(before: &VcpuState, after: &VcpuState) {
    let steady = |state: &VcpuState| {
        let msrs = state.msrs.iter().copied();
        msrs.filter(|msr| msr.index != msrs::TSC)
            .collect::<Vec<_>>()
    };
    assert_eq!(before.run_state, after.run_state);
    assert_eq!(before.registers, after.registers);
    assert_eq!(before.special, after.special);
    assert_eq!(before.xsave, after.xsave);
    assert_eq!(before.xcrs, after.xcrs);
    assert_eq!(before.debug, after.debug);
    assert_eq!(before.apic.regs.to_vec(), after.apic.regs.to_vec());
    assert_eq!(before.tsc_khz, after.tsc_khz);
    assert_eq!(before.leaves, after.leaves);
    assert_eq!(steady(before), steady(after));
    assert_eq!(before.events, after.events);
}

fn msr(state: &State, index: u32) -> u64 {
    let msrs = &state.vcpus[0].msrs;
    let found = msrs.iter().find(|msr| msr.index == index);
    found.expect("a register in the state").data
}

#[test]
#[ignore = "needs KVM: scripts/test runs it on a KVM host"]
fn a_timer_that_was_armed_goes_off_after_a_restore_and_not_before_its_time() {
    let mut guest = Guest::new(1, &TIMER);
    guest.handle(0x40, 0x80);
    let mut registers = guest.vcpus[0].get_regs().unwrap();
    registers.rbx = u64::from(guest.vcpus[0].get_tsc_khz().unwrap()) * 3000;
    guest.vcpus[0].set_regs(&registers).unwrap();
    let vcpu = enter_until_halted(guest.vcpus.remove(0));
    let deadline = vcpu.get_regs().unwrap().rdi;
    guest.vcpus.push(vcpu);
    let state = captured(&guest);
    assert_eq!(msr(&state, msrs::TSC_DEADLINE), deadline);
    assert_eq!(msr(&state, MSR_MTRR_DEF_TYPE), 0x806);

    let mut guest = moved(guest);
    let (_vcpu, left) = enter(guest.vcpus.remove(0));
    let Left::Out { port: PORT, value } = left else {
        panic!("{left:?}");
    };
    let late = value.cast_signed();
    assert!(late >= 0, "{} ticks too early", late.unsigned_abs());
}

#[test]
#[ignore = "needs KVM: scripts/test runs it on a KVM host"]
fn a_read_that_was_answered_and_not_finished_reaches_the_guest_once_and_its_registers_are_kept() {
    let (vector, debug, base) = (0x0123_4567_89ab_cdef, 0x7654_3210_u64, 0x5a5a_a5a5_u64);
    let mut guest = Guest::new(1, &REGISTERS);
    let mut registers = guest.vcpus[0].get_regs().unwrap();
    (registers.rsi, registers.rdi, registers.r8) = (vector, debug, base);
    guest.vcpus[0].set_regs(&registers).unwrap();
    let (mut vcpu, left) = enter(guest.vcpus.remove(0));
    assert_eq!(left, Left::Read { address: DEVICE });
    finish(&mut vcpu);
    guest.vcpus.push(vcpu);

    let mut guest = moved(guest);
    let mut reports = Vec::new();
    let mut vcpu = guest.vcpus.remove(0);
    for _ in 0..2 {
        let left;
        (vcpu, left) = enter(vcpu);
        let Left::Out { port: PORT, value } = left else {
            panic!("{left:?}");
        };
        reports.push(u64::from(value));
    }
    let expected = vector ^ debug ^ base ^ u64::from_le_bytes(ANSWER);
    assert_eq!(reports[0] | reports[1] << 32, expected);
}

#[test]
#[ignore = "needs KVM: scripts/test runs it on a KVM host"]
fn interrupts_that_are_pending_in_the_local_apic_and_in_the_io_apic_arrive_after_a_restore() {
    let mut guest = Guest::new(1, &INTERRUPTS);
    guest.handle(0x50, 0x80);
    guest.handle(0x51, 0xa0);
    let (mut vcpu, left) = enter(guest.vcpus.remove(0));
    assert!(matches!(left, Left::Out { port: PORT, .. }), "{left:?}");
    finish(&mut vcpu);
    guest.vcpus.push(vcpu);
    guest.vm.set_irq_line(5, true).unwrap();
    guest.vm.set_irq_line(5, false).unwrap();
    guest.vm.set_irq_line(6, true).unwrap();
    let requested = captured(&guest).vcpus[0].apic.regs[0x220 + 2];
    assert_eq!(requested, 1, "vector 0x50 and no other");

    let mut guest = moved(guest);
    let (vcpu, left) = enter(guest.vcpus.remove(0));
    assert!(matches!(left, Left::Out { port: LOWER, .. }), "{left:?}");
    guest.vm.set_irq_line(6, false).unwrap();
    let (_vcpu, left) = enter(vcpu);
    let (port, value) = (PORT, 3);
    assert_eq!(left, Left::Out { port, value });
}

#[test]
#[ignore = "needs KVM: scripts/test runs it on a KVM host"]
fn the_tscs_of_vcpus_keep_their_distance() {
    for distance in [0, 1_000_000_000] {
        let guest = Guest::new(2, &TIMER);
        let [first, second] = guest.vcpus.as_slice() else {
            panic!("two vCPUs");
        };
        let offset = sys::tsc_offset(first).unwrap();
        sys::set_tsc_offset(second, offset.wrapping_add(distance)).unwrap();
        let guest = moved(guest);
        let offsets = guest
            .vcpus
            .iter()
            .map(|vcpu| sys::tsc_offset(vcpu).unwrap());
        let offsets: Vec<_> = offsets.collect();
        assert_eq!(offsets[1].wrapping_sub(offsets[0]), distance);
        let waits = guest.vcpus[1].get_mp_state().unwrap().mp_state;
        assert_eq!(waits, KVM_MP_STATE_UNINITIALIZED);
    }
}

#[test]
#[ignore = "needs KVM: scripts/test runs it on a KVM host"]
fn a_vm_with_fewer_vcpus_than_its_guest_was_told_of_is_saved_and_goes_on_once_more() {
    let guest = Guest::new(4, &TIMER);
    let memory = Arc::clone(&guest.memory);
    let mut state = captured(&guest);
    drop(guest);
    for vcpus in [2, 1] {
        let guest = Guest::with(Arc::clone(&memory), vcpus);
        let host = Host::of(&guest.kvm).unwrap();
        state
            .restore(&host, KERNEL, &guest.vm, &guest.vcpus)
            .unwrap();
        state = captured(&guest);
        assert_eq!(state.vcpus.len(), usize::from(vcpus));
        assert_eq!(super::told_vcpus(&state.vcpus), 4);
    }
}

#[test]
#[ignore = "needs KVM: scripts/test runs it on a KVM host"]
fn a_state_that_cannot_go_on_here_is_refused_before_anything_is_restored() {
    let guest = Guest::new(1, &TIMER);
    let host = Host::of(&guest.kvm).unwrap();
    let good = captured(&guest);
    let refused = |change: fn(&mut State), kernel, vcpus| {
        let mut state = good.clone();
        change(&mut state);
        let other = Guest::with(Arc::clone(&guest.memory), vcpus);
        let before = other.vcpus[0].get_regs().unwrap();
        let error = state.restore(&host, kernel, &other.vm, &other.vcpus);
        assert_eq!(other.vcpus[0].get_regs().unwrap(), before);
        match error {
            Err(TransferError::Refused(refusal)) => refusal,
            other => panic!("{other:?}"),
        }
    };
    let virtualization = |state: &mut State| {
        let leaves = state.vcpus[0].leaves.iter_mut();
        for leaf in leaves.filter(|leaf| leaf.function == 1) {
            leaf.registers[2] |= 1 << 5;
        }
    };
    let counter = |state: &mut State| state.vcpus[0].msrs[0].index = 0xc1;
    let twice = |state: &mut State| state.vm.chips[0] = state.vm.chips[2];
    let same = |_: &mut State| {};
    for (what, refusal, is_right) in [
        (
            "kernel",
            refused(same, [4; 32], 1),
            (|e| matches!(e, Refusal::Kernel { .. })) as fn(&Refusal) -> bool,
        ),
        ("vCPUs", refused(same, KERNEL, 2), |e| {
            matches!(
                e,
                Refusal::Vcpus {
                    found: 1,
                    least: 1,
                    here: 2
                }
            )
        }),
        ("nested", refused(virtualization, KERNEL, 1), |e| {
            matches!(e, Refusal::Features(_))
        }),
        ("counter", refused(counter, KERNEL, 1), |e| {
            matches!(e, Refusal::Foreign(None))
        }),
        ("chips", refused(twice, KERNEL, 1), |e| {
            matches!(e, Refusal::Foreign(None))
        }),
    ] {
        assert!(is_right(&refusal), "{what}: {refusal:?}");
    }
}
