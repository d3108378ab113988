// SPDX-License-Identifier: Apache-2.0
//! A vCPU thread: runs the guest, hands its exits to the [`Bus`], and parks when it is told to.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_EXIT_X86_BUS_LOCK;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, clear_signal};

use crate::bus::{Bus, Effect};
use crate::halt::Halts;
use crate::report::{ExitReason, Outcome};
use crate::statistics::ExitCounters;
use crate::surface::rest_after;
use crate::sys;

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// The signal that interrupts KVM_RUN. All threads block it, except while they are in KVM_RUN.
#[must_use]
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Tells all vCPUs to run, park or end.
#[derive(Debug, Default)]
pub struct Gate {
    /// The wanted state. A vCPU reads it before every entry into the guest.
    wanted: AtomicU8,
    /// How many vCPUs are parked or have ended.
    parked: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// A gate before which vCPUs park from the start.
    pub fn closed() -> Self {
        Self {
            wanted: AtomicU8::new(PAUSE),
            ..Self::default()
        }
    }

    /// Waits until vCPUs are to run for the first time, or the VM ends.
    pub fn wait_open(&self) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        while self.wanted.load(Ordering::SeqCst) == PAUSE {
            let wait = self.changed.wait(parked);
            parked = wait.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether vCPUs are to run.
    pub fn is_open(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) == RUN
    }

    fn set(&self, wanted: u8) {
        // A stop is final.
        if self.wanted.load(Ordering::SeqCst) != STOP {
            self.wanted.store(wanted, Ordering::SeqCst);
        }
        // Notify under the lock, otherwise a vCPU could miss it between its check and its wait.
        let _parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }

    /// Tells the vCPUs to park. The caller then kicks the threads and calls [`Self::wait_parked`].
    pub fn pause(&self) {
        self.set(PAUSE);
    }

    pub fn resume(&self) {
        self.set(RUN);
    }

    pub fn stop(&self) {
        self.set(STOP);
    }

    /// Waits until `count` vCPUs are parked or have ended. False if that takes longer than `limit`.
    pub fn wait_parked(&self, count: usize, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        while *parked < count {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let wait = self.changed.wait_timeout(parked, left);
            parked = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// A vCPU asks this before it enters the guest.
    fn pass(&self) -> Pass {
        match self.wanted.load(Ordering::SeqCst) {
            RUN => Pass::Run,
            STOP => Pass::Stop,
            _ => Pass::Park,
        }
    }

    /// A vCPU waits here while it is parked.
    fn park(&self) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked += 1;
        self.changed.notify_all();
        while self.wanted.load(Ordering::SeqCst) == PAUSE {
            parked = self
                .changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
    }

    fn leave(&self) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked += 1;
        self.changed.notify_all();
    }
}

/// What a vCPU has to do at the gate.
enum Pass {
    Run,
    Park,
    Stop,
}

/// One vCPU. Not `Debug`: the bus is not.
#[allow(missing_debug_implementations)]
pub struct Vcpu {
    pub fd: VcpuFd,
    pub id: u8,
    pub bus: Arc<Bus>,
    pub gate: Arc<Gate>,
    pub halts: Arc<Halts>,
    pub counters: Arc<ExitCounters>,
}

/// What to do after an exit, once the exit is no longer borrowed from the vCPU.
enum Next {
    Continue,
    Interrupted,
    End(End),
}

/// Why a vCPU ends.
enum End {
    Known(Outcome),
    FailedEntry(u64),
    InternalError,
}

impl Vcpu {
    /// Runs until the guest ends, or until the gate says stop; then it returns `None`.
    pub fn run(mut self) -> Option<Outcome> {
        let outcome = self.run_guest();
        self.gate.leave();
        outcome
    }

    fn run_guest(&mut self) -> Option<Outcome> {
        if let Err(e) = sys::unblock_signal_in_guest(&self.fd, kick_signal()) {
            return Some(self.failure(&format!("set signal mask: {e}")));
        }
        loop {
            match self.gate.pass() {
                Pass::Run => {}
                Pass::Stop => return None,
                Pass::Park => {
                    if let Some(outcome) = self.finish_exit() {
                        return Some(outcome);
                    }
                    self.gate.park();
                    // Tells the guest's watchdogs about the pause. Fails for a guest without kvm-clock.
                    let _ = self.fd.kvmclock_ctrl();
                    continue;
                }
            }
            let next = self.run_once();
            if let Some(pause) = rest_after(self.fd.get_kvm_run().flags) {
                std::thread::sleep(pause);
            }
            match next {
                Next::Continue => {}
                Next::Interrupted => {
                    // The thread blocks the signal, so it is still pending and has to be cleared.
                    drop(clear_signal(kick_signal()));
                    self.halts.note(self.id, &self.fd);
                }
                Next::End(end) => return Some(self.outcome(end)),
            }
        }
    }

    /// Finishes the access to a device for which the vCPU left the guest last, without running the guest any further.
    ///
    /// KVM puts what was read into the guest's register, and goes to the next instruction, when the vCPU is entered again.
    /// Until then this is in no state that can be saved: a guest that went on from there would make the access once more,
    /// print a character twice or take a second byte from a queue. An instruction with several accesses has an exit for
    /// each, so this ends when KVM says that it would run the guest now.
    fn finish_exit(&mut self) -> Option<Outcome> {
        self.fd.set_kvm_immediate_exit(1);
        let end = loop {
            match self.run_once() {
                Next::Continue => {}
                Next::Interrupted => break None,
                Next::End(end) => break Some(self.outcome(end)),
            }
        };
        self.fd.set_kvm_immediate_exit(0);
        end
    }

    fn outcome(&mut self, end: End) -> Outcome {
        match end {
            End::Known(outcome) => outcome,
            End::FailedEntry(reason) => self.failure(&format!(
                "KVM cannot enter the guest, hardware reason {reason:#x}"
            )),
            End::InternalError => {
                let suberror = sys::internal_suberror(&mut self.fd);
                self.failure(&format!("KVM internal error, suberror {suberror}"))
            }
        }
    }

    fn failure(&self, what: &str) -> Outcome {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let detail = format!("vCPU {} at {rip:#x}: {what}", self.id);
        Outcome::new(ExitReason::VmmError, detail)
    }

    /// Enters the guest once and handles the exit.
    fn run_once(&mut self) -> Next {
        let counters = &self.counters;
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                ExitCounters::count(&counters.io_out);
                match self.bus.port_out(port, data) {
                    Effect::None => Next::Continue,
                    Effect::End(outcome) => Next::End(End::Known(outcome)),
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                ExitCounters::count(&counters.io_in);
                self.bus.port_in(port, data);
                Next::Continue
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                ExitCounters::count(&counters.mmio_read);
                self.bus.read(address, data);
                Next::Continue
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                ExitCounters::count(&counters.mmio_write);
                self.bus.write(address, data);
                Next::Continue
            }
            Ok(VcpuExit::Shutdown) => {
                let text = format!("vCPU {}", self.id);
                Next::End(End::Known(Outcome::new(ExitReason::TripleFault, text)))
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                let text = format!("system event {kind}");
                Next::End(End::Known(Outcome::new(ExitReason::GuestReset, text)))
            }
            Ok(VcpuExit::FailEntry(reason, _)) => Next::End(End::FailedEntry(reason)),
            Ok(VcpuExit::InternalError) => Next::End(End::InternalError),
            Ok(
                VcpuExit::Intr
                | VcpuExit::Hlt
                | VcpuExit::IrqWindowOpen
                | VcpuExit::Unsupported(KVM_EXIT_X86_BUS_LOCK),
            ) => {
                ExitCounters::count(&counters.other);
                Next::Continue
            }
            Ok(other) => {
                let text = format!("unexpected exit {other:?}");
                Next::End(End::Known(Outcome::new(ExitReason::VmmError, text)))
            }
            Err(e) => match io::Error::from_raw_os_error(e.errno()).kind() {
                io::ErrorKind::Interrupted => {
                    ExitCounters::count(&counters.other);
                    Next::Interrupted
                }
                io::ErrorKind::WouldBlock => Next::Continue,
                kind => {
                    let text = format!("vCPU {}: KVM_RUN: {kind}", self.id);
                    Next::End(End::Known(Outcome::new(ExitReason::VmmError, text)))
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, pipe};
    use std::os::fd::OwnedFd;

    use rustix::fs::OFlags;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::serial::SerialPort;
    use crate::guest::{CODE, Guest, LIMIT, block_kicks, eventually};

    /// A vCPU that is about to run `program`, on a bus with nothing but a serial port.
    fn vcpu(guest: &mut Guest, console: File) -> Vcpu {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Vcpu {
            fd: guest.vcpus.remove(0),
            id: 0,
            bus: Arc::new(Bus::new(SerialPort::new(line, console), Vec::new())),
            gate: Arc::default(),
            halts: Arc::new(Halts::new(1)),
            counters: Arc::default(),
        }
    }

    /// Programs that access a device once, with RBX as the address and DX as the port, and then halt.
    #[rustfmt::skip]
    const ACCESSES: [(&str, &[u8]); 6] = [
        ("out", &[0xee, 0xf4]), // out dx,al; hlt
        ("in", &[0xec, 0xf4]), // in al,dx; hlt
        ("rep outsb", &[0xf3, 0x6e, 0xf4]), // rep outsb; hlt
        ("read", &[0x48, 0x8b, 0x03, 0xf4]), // mov rax,[rbx]; hlt
        ("write", &[0x48, 0x89, 0x03, 0xf4]), // mov [rbx],rax; hlt
        ("read across two pages", &[0x48, 0x8b, 0x43, 0xfc, 0xf4]), // mov rax,[rbx-4]; hlt
    ];
    const UNUSED_ADDRESS: u64 = 0xd800_0000;
    const UNUSED_PORT: u64 = 0x700;

    #[test]
    fn who_waits_at_a_closed_gate_goes_on_when_it_is_opened_and_when_the_vm_ends() {
        for open in [Gate::resume, Gate::stop] {
            let gate = Arc::new(Gate::closed());
            assert!(!gate.is_open());
            let waits = Arc::clone(&gate);
            let thread = std::thread::spawn(move || waits.wait_open());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!thread.is_finished());
            open(&gate);
            thread.join().unwrap();
        }
        Gate::default().wait_open();
    }

    #[test]
    #[ignore = "needs KVM: scripts/test runs it on a KVM host"]
    fn an_access_that_a_vcpu_has_begun_is_finished_without_another_instruction() {
        for (what, program) in ACCESSES {
            let mut guest = Guest::new(1, program);
            let mut registers = guest.vcpus[0].get_regs().unwrap();
            (registers.rbx, registers.rdx) = (UNUSED_ADDRESS, UNUSED_PORT);
            (registers.rcx, registers.rsi) = (5, CODE);
            guest.vcpus[0].set_regs(&registers).unwrap();
            let mut vcpu = vcpu(&mut guest, tempfile::tempfile().unwrap());
            assert!(matches!(vcpu.run_once(), Next::Continue), "{what}");
            assert!(vcpu.finish_exit().is_none(), "{what}");
            let after = vcpu.fd.get_regs().unwrap();
            let halt = CODE + program.len() as u64 - 1;
            if what == "rep outsb" {
                // It may rest between two of its bytes, and goes on with those that are left.
                let is_between = after.rip == CODE && (1..5).contains(&after.rcx);
                assert!(
                    is_between || (after.rip, after.rcx) == (halt, 0),
                    "{after:x?}"
                );
            } else {
                assert_eq!(after.rip, halt, "{what}");
            }
            let expected = match what {
                "in" => 0xff,
                "read" | "read across two pages" => u64::MAX,
                _ => registers.rax,
            };
            assert_eq!(after.rax, expected, "{what}");
        }
    }

    #[test]
    #[ignore = "needs KVM: scripts/test runs it on a KVM host"]
    fn a_vcpu_that_is_told_to_park_while_a_device_works_for_it_parks_after_that_instruction() {
        // mov al,10; mov dx,0x3f8; out dx,al; hlt
        const PROGRAM: [u8; 8] = [0xb0, 0x0a, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xf4];
        // The console's reader is slow: the line that the guest prints waits until the pipe has room.
        let (mut reader, writer) = pipe().unwrap();
        let writer = File::from(OwnedFd::from(writer));
        let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
        rustix::fs::fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
        let mut filled = 0;
        while let Ok(more) = rustix::io::write(&writer, &[0; 4096]) {
            filled += more;
        }
        rustix::fs::fcntl_setfl(&writer, flags).unwrap();

        let mut guest = Guest::new(1, &PROGRAM);
        block_kicks();
        let mut vcpu = vcpu(&mut guest, writer);
        let (gate, counters) = (Arc::clone(&vcpu.gate), Arc::clone(&vcpu.counters));
        let thread = std::thread::spawn(move || {
            let outcome = vcpu.run_guest();
            (outcome, vcpu)
        });
        eventually("the guest prints", || counters.snapshot().io_out == 1);
        gate.pause();
        let mut printed = vec![0; filled + 1];
        reader.read_exact(&mut printed).unwrap();
        assert!(gate.wait_parked(1, LIMIT), "it does not park");
        gate.stop();
        let (outcome, vcpu) = thread.join().unwrap();
        assert_eq!(outcome, None);
        let halt = CODE + PROGRAM.len() as u64 - 1;
        assert_eq!(vcpu.fd.get_regs().unwrap().rip, halt);
        assert_eq!(counters.snapshot().io_out, 1);
    }
}
