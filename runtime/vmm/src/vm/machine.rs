// SPDX-License-Identifier: Apache-2.0
//! Builds the virtual machine: KVM's VM, memory, the devices at their addresses, the vCPUs.

use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::devices::{DeviceError, Devices};
use super::observed::Observed;
use super::resources::Backends;
use crate::boot::Entry;
use crate::bus::{Bus, RestoreError, SERIAL_IRQ};
use crate::config::{KernelSum, VmConfig};
use crate::cpu::{self, CpuError};
use crate::devices::mmio::{INTERRUPT_ACK, MmioTransport, QUEUE_NOTIFY};
use crate::devices::registers::{self, RegisterPage};
use crate::devices::ring::USED_RING;
use crate::devices::serial::SerialPort;
use crate::devices::worker::Worker;
use crate::foreseen::Foreseen;
use crate::memory::{Memory, ahead};
use crate::slot::{MMIO_BASE, Slot, Thread};
use crate::state::{Host, State, TransferError};
use crate::statistics::KvmExits;
use crate::surface::{self, SurfaceError};
use crate::sys::{self, Access};

/// Pages that KVM needs for itself on Intel, below the BIOS area.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// Which step failed to build the machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("{what}")]
    Kvm {
        what: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("give {bytes} bytes of memory at {start:#x} to KVM")]
    Memory {
        start: u64,
        bytes: u64,
        source: io::Error,
    },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("set up vCPUs")]
    Cpu(#[from] CpuError),
    #[error("leave out what the guest does not need of KVM")]
    Surface(#[from] SurfaceError),
    #[error("ask what this host's KVM can do")]
    Host(#[source] TransferError),
    #[error("go on from a state")]
    State(#[from] TransferError),
    #[error("go on from a state of devices")]
    Devices(#[from] RestoreError),
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

/// A machine that has not run yet.
#[allow(missing_debug_implementations)]
pub struct Machine {
    // Fields are dropped in this order: the VM before its memory.
    pub vcpus: Vec<VcpuFd>,
    pub vm: VmFd,
    host: Host,
    pub memory: Arc<Memory>,
    pub bus: Bus,
    pub devices: Devices,
    pub workers: Vec<(Thread, Worker)>,
}

/// The parts of a machine, apart from its configuration.
#[derive(Debug)]
pub struct Parts {
    pub kvm: File,
    pub memory: Arc<Memory>,
    pub console: File,
    pub backends: Backends,
}

impl Machine {
    /// Creates the VM, gives memory to KVM, connects the devices, and creates the vCPUs without setting them up.
    pub fn build(
        config: &VmConfig,
        parts: Parts,
        observed: &mut Observed,
    ) -> Result<Self, MachineError> {
        let Parts {
            kvm: device,
            memory,
            console,
            backends,
        } = parts;
        let kvm_fd = sys::kvm(device);
        let vm = create_vm(&kvm_fd)?;
        let registers = registers::create(MMIO_BASE, Slot::ALL.len());
        let registers = registers.map_err(DeviceError::of("device registers"))?;
        let ram = memory.iter().map(|region| (region, Access::ReadWrite));
        let all = ram.chain([(&*registers, Access::ReadOnly)]);
        for (number, (region, access)) in (0..).zip(all) {
            give_memory(&vm, number, region, access)?;
        }
        let devices = Devices::new(config, backends, observed)?;
        let unheard = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let unheard = unheard.map_err(DeviceError::of("an eventfd"))?;
        let mut transports = Vec::new();
        for slot in Slot::ALL {
            let page = RegisterPage::new(&registers, slot.number());
            let transport = page
                .and_then(|page| MmioTransport::new(devices.at(slot), Arc::clone(&memory), page));
            let transport = transport.map_err(DeviceError::of("virtio transport"))?;
            connect(&vm, &transport, slot, &unheard)?;
            transports.push(transport);
        }
        let workers = Thread::ALL.map(|thread| {
            let served = Slot::ALL.into_iter().zip(&transports);
            let served = served.filter(|(slot, _)| slot.thread() == thread);
            Worker::new(served.map(|(_, transport)| transport)).map(|worker| (thread, worker))
        });
        let workers: Result<Vec<_>, _> = workers.into_iter().collect();
        let workers = workers.map_err(DeviceError::of("worker"))?;

        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let line = line.map_err(DeviceError::of("serial port"))?;
        vm.register_irqfd(&line, SERIAL_IRQ)
            .map_err(kvm("connect serial interrupt"))?;
        let bus = Bus::new(SerialPort::new(line, console), transports);

        let host = Host::of(&kvm_fd).map_err(MachineError::Host)?;
        let (mut vcpus, mut kvm_exits) = (Vec::new(), Vec::new());
        for id in 0..config.vcpus {
            let fd = vm.create_vcpu(id.into()).map_err(kvm("create vCPU"))?;
            let exits = sys::statistics_file(&fd).ok().and_then(KvmExits::find);
            kvm_exits.extend(exits);
            vcpus.push(fd);
        }
        observed.kvm_exits = Arc::new(kvm_exits);
        Ok(Self {
            vcpus,
            vm,
            host,
            memory,
            bus,
            devices,
            workers,
        })
    }

    /// Sets up the vCPUs. Call it after the kernel has been loaded into guest memory.
    pub fn set_entry(&self, entry: &Entry) -> Result<(), MachineError> {
        let count = u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX);
        for (id, fd) in (0..count).zip(&self.vcpus) {
            cpu::set_up(fd, self.host.cpuid(), id, count, entry)?;
        }
        Ok(())
    }
}

impl Machine {
    /// What has to be known of this host's KVM to take the state of a machine, or to give it one.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Lets the machine go on where the VM was saved whose memory it has. Instead of [`Self::set_entry`].
    pub fn restore(&self, state: &State, kernel: KernelSum) -> Result<(), MachineError> {
        state.restore(&self.host, kernel, &self.vm, &self.vcpus)?;
        // After the interrupt controllers: the devices interrupt the guest, because an interrupt that was on its way is in no
        // state.
        Ok(self.bus.restore(state.devices())?)
    }

    /// Maps pages that the guest will use. Call it after [`Self::restore`].
    pub fn map_ahead(&self, foreseen: &Foreseen) -> io::Result<()> {
        match self.vcpus.first() {
            Some(vcpu) => ahead::map(&self.memory, foreseen, &self.vm, vcpu),
            None => Ok(()),
        }
    }
}

fn give_memory(
    vm: &VmFd,
    number: u32,
    region: &GuestRegionMmap<()>,
    access: Access,
) -> Result<(), MachineError> {
    let result = sys::set_memory_region(vm, number, region, access);
    result.map_err(|source| MachineError::Memory {
        start: region.start_addr().0,
        bytes: region.len(),
        source,
    })
}

/// Creates the VM: no memory and no vCPUs yet.
pub(crate) fn create_vm(kvm_fd: &Kvm) -> Result<VmFd, MachineError> {
    let vm = kvm_fd.create_vm().map_err(kvm("create VM"))?;
    vm.set_identity_map_address(IDENTITY_MAP)
        .map_err(kvm("place identity map"))?;
    vm.set_tss_address(TSS).map_err(kvm("place TSS"))?;
    // There is no PIT: the guest uses kvm-clock and the TSC deadline timer.
    vm.create_irq_chip()
        .map_err(kvm("create interrupt controllers"))?;
    surface::reduce(&vm)?;
    Ok(vm)
}

/// Connects a device to KVM, so that notifications and interrupts need no exit to this process.
fn connect(
    vm: &VmFd,
    transport: &MmioTransport,
    slot: Slot,
    unheard: &EventFd,
) -> Result<(), MachineError> {
    // Acknowledgements of used buffers go to an eventfd that nobody reads, see `Interrupt::acknowledge`.
    // KVM keeps a reference, so the eventfd may be closed here.
    let address = IoEventAddress::Mmio(slot.address() + INTERRUPT_ACK);
    vm.register_ioevent(unheard, &address, USED_RING)
        .map_err(kvm("connect acknowledgement"))?;
    let address = IoEventAddress::Mmio(slot.address() + QUEUE_NOTIFY);
    for (queue, notifier) in (0u32..).zip(transport.notifiers().iter()) {
        vm.register_ioevent(notifier, &address, queue)
            .map_err(kvm("connect queue notification"))?;
    }
    vm.register_irqfd(transport.interrupt().line(), slot.interrupt())
        .map_err(kvm("connect device interrupt"))
}
