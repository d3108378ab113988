// SPDX-License-Identifier: Apache-2.0
//! The life of one VM, on the main thread of a process in its jail: take what was passed, build, load, run, report.
//!
//! ```text
//! resources -> memory -> machine -> boot -> threads -> control socket -> report
//! ```
//! Each step up to the threads may fail with a [`SetupError`], which names the step.

mod beginning;
mod checkpoint;
mod closing;
pub mod devices;
pub mod machine;
pub mod observed;
mod requests;
pub mod resources;
mod saver;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_jail::JailError;
use bulkhead_jail::syscalls::{List, SyscallsError};
use bulkhead_text::chain;
use kvm_ioctls::{VcpuFd, VmFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::signal::{Killable, block_signal};

use crate::boot::{self, BootError};
use crate::bus::Bus;
use crate::config::VmConfig;
use crate::control::server;
use crate::devices::worker::Worker;
use crate::halt::{self, Halts, Looks};
use crate::jail;
use crate::memory::{Memory, MemoryError};
use crate::report::{ExitReason, ExitReport, Outcome};
use crate::slot::{Slot, Thread};
use crate::state::refusal::Refusal;
use crate::statistics::KvmExits;
use crate::syscalls;
use crate::vcpu::{Gate, Vcpu, kick_signal};
use beginning::Begun;
use devices::Devices;
use machine::{Machine, MachineError, Parts};
use observed::Observed;
use resources::{BootImage, Origin, ResourceError, Resources};
use saver::Saver;

/// Stack of each thread, more than any of them needs.
const STACK_BYTES: usize = 256 << 10;
/// How long vCPUs may take to leave the guest.
const KICK_TIME: Duration = Duration::from_secs(2);
/// Chosen so that the boot has few VM exits: no probing for devices that do not exist, and only errors
/// on the console. Memory for each CPU is allocated in pages (`percpu_alloc`), not in units of 2 MiB: for each such
/// unit the kernel keeps 4 MiB of who pays for which part of it.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 reboot=k 8250.nr_uarts=1 percpu_alloc=page \
    no_timer_check noreplace-smp tsc=reliable random.trust_cpu=on pci=off acpi=off rdinit=/init";

/// Why a VM never ran.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("give up privileges")]
    Jail(#[from] JailError),
    #[error("take over resources")]
    Resources(#[from] ResourceError),
    #[error("create guest memory")]
    Memory(#[from] MemoryError),
    #[error("build machine")]
    Machine(#[from] MachineError),
    #[error("load guest")]
    Boot(#[from] BootError),
    #[error("read the state to go on from")]
    State(#[from] Refusal),
    #[error("prepare to take the VM's state")]
    Saver(#[source] io::Error),
    #[error("start threads")]
    Threads(#[source] io::Error),
    #[error("filter system calls")]
    Syscalls(#[from] SyscallsError),
}

/// Runs a VM to its end, in a process that is in its jail. `origin` is the time at which the process began.
pub fn run(config: &VmConfig, origin: Instant) -> Result<ExitReport, SetupError> {
    let mut observed = Observed::new(origin);
    observed.jailed.reached();
    let Resources {
        kvm,
        origin,
        console,
        control,
        backends,
    } = Resources::take(config)?;
    jail::bound_files(config, backends.scratch.bytes());
    let Begun {
        memory,
        laid,
        shown: _shown,
    } = beginning::memory_of(&origin, config.memory_max_bytes())?;
    let parts = Parts {
        kvm,
        memory: Arc::new(memory),
        console,
        backends,
    };
    let machine = Machine::build(config, parts, &mut observed)?;
    // A template's files, if it is one, and whether the VM waits until it is resumed.
    let (template, gate) = match origin {
        Origin::Boot { image, template } => {
            load(config, &machine, image)?;
            (template, Gate::default())
        }
        Origin::Fork { template, foreseen } => {
            beginning::go_on(&machine, &template)?;
            beginning::map_ahead(&machine, foreseen.as_ref());
            (None, Gate::default())
        }
        Origin::Restore { checkpoint, .. } => {
            beginning::go_on(&machine, &checkpoint)?;
            (None, Gate::closed())
        }
    };
    let calls = match template {
        Some(_) => &syscalls::TEMPLATE,
        None => &syscalls::MAIN,
    };
    let saver = Saver::new(&machine, template, config.memory_max_bytes(), laid)?;
    let signals = block_signals().map_err(SetupError::Threads)?;
    let running = Running::start(machine, gate, saver, observed).map_err(SetupError::Threads)?;
    bulkhead_jail::syscalls::apply(calls, None)?;
    let ended = server::serve(&control, &running.ended, &signals, &running);
    Ok(running.finish(ended))
}

/// Loads the kernel, and lets the first vCPU start there.
fn load(config: &VmConfig, machine: &Machine, image: BootImage) -> Result<(), SetupError> {
    let BootImage {
        mut kernel,
        mut initramfs,
    } = image;
    let entry = boot::load(
        &machine.memory,
        config.memory_bytes(),
        &mut kernel,
        &mut initramfs,
        &cmdline(config),
        config.vcpus,
    )?;
    Ok(machine.set_entry(&entry)?)
}

fn cmdline(config: &VmConfig) -> String {
    let mut line = CMDLINE.to_owned();
    if (1..config.vcpus).contains(&config.boot_vcpus) {
        line.push_str(&format!(" maxcpus={}", config.boot_vcpus));
    }
    for slot in Slot::ALL {
        let (base, irq) = (slot.address(), slot.interrupt());
        line.push_str(&format!(" virtio_mmio.device=4K@{base:#x}:{irq}"));
    }
    if !config.extra_cmdline.is_empty() {
        line.push(' ');
        line.push_str(&config.extra_cmdline);
    }
    line
}

/// Blocks, in all threads that are created later, the kick signal and the signals that ask the process to
/// stop. The latter can be read from the returned descriptor.
fn block_signals() -> io::Result<SignalFd> {
    block_signal(kick_signal()).map_err(|e| io::Error::other(e.to_string()))?;
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.add(Signal::SIGINT);
    stop.thread_block()?;
    Ok(SignalFd::with_flags(
        &stop,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

/// A VM with its running threads.
struct Running {
    bus: Arc<Bus>,
    gate: Arc<Gate>,
    halts: Arc<Halts>,
    vcpus: Arc<Vec<JoinHandle<()>>>,
    devices: Devices,
    observed: Observed,
    outcomes: Receiver<Outcome>,
    ended: Arc<OwnedFd>,
    saver: Saver,
    /// Keeps the VM alive. The vCPUs hold it, too.
    vm: VmFd,
    memory: Arc<Memory>,
}

/// With this a thread tells that the VM has ended, and why.
#[derive(Clone)]
struct Announce {
    outcomes: Sender<Outcome>,
    ended: Arc<OwnedFd>,
}

impl Announce {
    fn tell(&self, outcome: Outcome) {
        // Fails only if the VM is being ended already.
        let _ = self.outcomes.send(outcome);
        let _ = rustix::io::write(&*self.ended, &1u64.to_ne_bytes());
    }
}

impl Running {
    /// Starts the threads of workers and vCPUs, which wait until the gate is open.
    fn start(machine: Machine, gate: Gate, saver: Saver, observed: Observed) -> io::Result<Self> {
        let Machine {
            vcpus,
            vm,
            memory,
            bus,
            devices,
            workers,
            ..
        } = machine;
        let (sender, outcomes) = mpsc::channel();
        let ended = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let announce = Announce {
            outcomes: sender,
            ended: Arc::new(ended),
        };
        let bus = Arc::new(bus);
        let gate = Arc::new(gate);
        let mut running = Self {
            bus,
            gate,
            halts: Arc::new(Halts::new(vcpus.len())),
            vcpus: Arc::default(),
            devices,
            observed,
            outcomes,
            ended: Arc::clone(&announce.ended),
            saver,
            vm,
            memory,
        };
        for (thread, worker) in workers {
            spawn_worker(thread, worker, Arc::clone(&running.gate), announce.clone())?;
        }
        running.observed.vcpus_started.reached();
        let threads = (0..).zip(vcpus);
        let threads = threads.map(|(id, fd)| running.spawn_vcpu(id, fd, announce.clone()));
        running.vcpus = Arc::new(threads.collect::<io::Result<_>>()?);
        running.watch_halts(announce)?;
        Ok(running)
    }

    /// Starts the thread that ends the VM when the guest has halted for good.
    fn watch_halts(&self, announce: Announce) -> io::Result<()> {
        let (gate, halts) = (Arc::clone(&self.gate), Arc::clone(&self.halts));
        let (vcpus, exits) = (
            Arc::clone(&self.vcpus),
            Arc::clone(&self.observed.kvm_exits),
        );
        let watch = move || {
            if !confined(&syscalls::HALTS, None, &announce) {
                rest();
            }
            let mut looks = Looks::default();
            loop {
                std::thread::sleep(halt::PERIOD);
                // A vCPU that is parked notes nothing, and is not halted.
                if !gate.is_open() {
                    continue;
                }
                match looks.look(KvmExits::sum(&exits), &halts) {
                    halt::Next::Wait => {}
                    halt::Next::Interrupt => kick(&vcpus),
                    halt::Next::End => {
                        let text = "all vCPUs have halted with interrupts off";
                        announce.tell(Outcome::new(ExitReason::GuestHalted, text));
                        rest();
                    }
                }
            }
        };
        thread("halts").spawn(watch).map(drop)
    }

    fn spawn_vcpu(&self, id: u8, fd: VcpuFd, announce: Announce) -> io::Result<JoinHandle<()>> {
        let vcpu = Vcpu {
            fd,
            id,
            bus: Arc::clone(&self.bus),
            gate: Arc::clone(&self.gate),
            halts: Arc::clone(&self.halts),
            counters: Arc::clone(&self.observed.exits),
        };
        thread(&format!("vcpu{id}")).spawn(move || {
            if confined(&syscalls::VCPU, Some(id), &announce)
                && let Some(outcome) = vcpu.run()
            {
                announce.tell(outcome);
            }
            rest();
        })
    }

    /// Stops the vCPUs and returns the report of how the VM ended.
    fn finish(self, ended: server::Ended) -> ExitReport {
        self.gate.stop();
        kick(&self.vcpus);
        self.gate.wait_parked(self.vcpus.len(), KICK_TIME);
        let panic = self.bus.finish_console();
        let mut outcome = match ended {
            server::Ended::Stopped => Outcome::new(ExitReason::StopRequested, ""),
            server::Ended::ByItself => self.outcomes.try_recv().unwrap_or_else(|_| {
                Outcome::new(ExitReason::VmmError, "a thread ended without a reason")
            }),
            server::Ended::Failed(e) => {
                Outcome::new(ExitReason::VmmError, format!("control socket: {e}"))
            }
        };
        if let (ExitReason::GuestReset, Some(line)) = (outcome.reason, panic) {
            outcome = Outcome::new(ExitReason::GuestPanic, line);
        }
        let statistics = self.observed.snapshot();
        let mut report = ExitReport::new(outcome.reason, outcome.detail);
        report.exits_userspace = statistics.exits_userspace.total();
        report.exits_total = statistics.exits_total.unwrap_or(report.exits_userspace);
        report.uptime_us = statistics.uptime_us;
        report
    }
}

/// Filters the system calls of the calling thread. If that fails, the VM ends.
fn confined(list: &'static List, number: Option<u8>, announce: &Announce) -> bool {
    let applied = bulkhead_jail::syscalls::apply(list, number);
    if let Err(e) = &applied {
        announce.tell(Outcome::new(ExitReason::SetupFailed, chain(e)));
    }
    applied.is_ok()
}

/// What a thread does when it has nothing more to do. Its end would take system calls that its list does not have, so it ends
/// with the process.
fn rest() -> ! {
    loop {
        std::thread::park();
    }
}

/// Makes the vCPUs leave the guest once.
fn kick(vcpus: &[JoinHandle<()>]) {
    for vcpu in vcpus {
        // Fails for a thread that has ended.
        let _ = vcpu.kill(kick_signal());
    }
}

/// A thread whose name says that it starts, until it has the name of its list of system calls.
fn thread(name: &str) -> std::thread::Builder {
    let builder = std::thread::Builder::new().name(format!("start {name}"));
    builder.stack_size(STACK_BYTES)
}

/// No device has a turn before the gate is open. The guest of a restored VM may have asked for what is yet to be attached.
fn spawn_worker(of: Thread, worker: Worker, gate: Arc<Gate>, announce: Announce) -> io::Result<()> {
    thread(of.syscalls().name).spawn(move || {
        if confined(of.syscalls(), None, &announce) {
            gate.wait_open();
            let error = worker.run();
            let detail = format!("device thread: {error}");
            announce.tell(Outcome::new(ExitReason::VmmError, detail));
        }
        rest();
    })?;
    Ok(())
}
