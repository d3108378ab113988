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

    /// A vCPU calls this before it enters the guest. It waits here while it is parked.
    fn pass(&self) -> Pass {
        match self.wanted.load(Ordering::SeqCst) {
            RUN => return Pass::Run,
            STOP => return Pass::Stop,
            _ => {}
        }
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
        Pass::RunAfterPause
    }

    fn leave(&self) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked += 1;
        self.changed.notify_all();
    }
}

/// How a vCPU goes on after the gate.
enum Pass {
    Run,
    RunAfterPause,
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
    End(Outcome),
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
                // Tells the guest's watchdogs about the pause. Fails for a guest without kvm-clock.
                Pass::RunAfterPause => drop(self.fd.kvmclock_ctrl()),
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
                Next::End(outcome) => return Some(outcome),
                Next::FailedEntry(reason) => {
                    let text = format!("KVM cannot enter the guest, hardware reason {reason:#x}");
                    return Some(self.failure(&text));
                }
                Next::InternalError => {
                    let suberror = sys::internal_suberror(&mut self.fd);
                    let text = format!("KVM internal error, suberror {suberror}");
                    return Some(self.failure(&text));
                }
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
                    Effect::End(outcome) => Next::End(outcome),
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
                Next::End(Outcome::new(ExitReason::TripleFault, text))
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                let text = format!("system event {kind}");
                Next::End(Outcome::new(ExitReason::GuestReset, text))
            }
            Ok(VcpuExit::FailEntry(reason, _)) => Next::FailedEntry(reason),
            Ok(VcpuExit::InternalError) => Next::InternalError,
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
                Next::End(Outcome::new(ExitReason::VmmError, text))
            }
            Err(e) => match io::Error::from_raw_os_error(e.errno()).kind() {
                io::ErrorKind::Interrupted => {
                    ExitCounters::count(&counters.other);
                    Next::Interrupted
                }
                io::ErrorKind::WouldBlock => Next::Continue,
                kind => {
                    let text = format!("vCPU {}: KVM_RUN: {kind}", self.id);
                    Next::End(Outcome::new(ExitReason::VmmError, text))
                }
            },
        }
    }
}
