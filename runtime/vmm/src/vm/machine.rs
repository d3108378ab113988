// SPDX-License-Identifier: Apache-2.0
//! Builds the virtual machine: KVM, memory, the devices in their fixed order, the vCPUs. Every VM
//! has the same devices at the same addresses, used or not.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::CpuId;
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemory, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::observed::Observed;
use super::resources::Resources;
use crate::boot::Entry;
use crate::bus::{Bus, DEVICE_IRQS, MMIO_BASE, SERIAL_IRQ};
use crate::config::{MacAddress, VmConfig};
use crate::cpu::{self, CpuError};
use crate::devices::balloon::Balloon;
use crate::devices::blk::Blk;
use crate::devices::blk::disk::{ImageDisk, VolumeDisk};
use crate::devices::fs::Fs;
use crate::devices::mmio::{INTERRUPT_ACK, MmioTransport, QUEUE_NOTIFY, SharedDevice};
use crate::devices::net::Net;
use crate::devices::registers::{self, RegisterPage, SLOT_BYTES};
use crate::devices::ring::USED_RING;
use crate::devices::rng::{HostRandom, Rng};
use crate::devices::serial::SerialPort;
use crate::devices::vsock::Vsock;
use crate::devices::vsock::muxer::Muxer;
use crate::devices::worker::Worker;
use crate::memory::Memory;
use crate::statistics::KvmExits;
use crate::sys::{self, Access};

/// Pages that KVM on Intel needs for itself, below the BIOS area.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;
/// Positions in the fixed order of devices, by the worker that serves them.
const DISKS: [usize; 2] = [2, 3];
const FILES: [usize; 1] = [6];
/// Alone, because a volume may be slow or hang.
const VOLUMES: [usize; 1] = [7];
const OTHERS: [usize; 4] = [0, 1, 4, 5];
const DEFAULT_MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const DEFAULT_MTU: u16 = 1500;

/// What KVM or the host refused.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("open /dev/kvm")]
    OpenKvm(#[source] kvm_ioctls::Error),
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
    #[error("make {what}")]
    Device {
        what: &'static str,
        source: io::Error,
    },
    #[error("set up vCPUs")]
    Cpu(#[from] CpuError),
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

fn device(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Device { what, source }
}

/// A machine that has not run yet.
#[allow(missing_debug_implementations)]
pub struct Machine {
    // Dropped in this order: the VM before its memory.
    pub vcpus: Vec<VcpuFd>,
    pub vm: VmFd,
    cpuid: CpuId,
    pub memory: Arc<Memory>,
    pub bus: Bus,
    pub image: Arc<Mutex<Blk<ImageDisk>>>,
    pub files: Arc<Mutex<Fs>>,
    pub volumes: Arc<Mutex<Blk<VolumeDisk>>>,
    pub balloon: Arc<Mutex<Balloon>>,
    pub disk_worker: Worker,
    pub io_worker: Worker,
    pub files_worker: Worker,
    pub volume_worker: Worker,
}

/// What the machine takes from [`Resources`]; the rest is for others.
#[derive(Debug)]
pub struct Parts {
    pub resources: Resources,
    pub memory: Arc<Memory>,
}

impl Machine {
    /// Returns the machine, and the control socket and boot files that it does not need.
    pub fn build(
        config: &VmConfig,
        parts: Parts,
        observed: &mut Observed,
    ) -> Result<(Self, super::Remaining), MachineError> {
        let kvm_fd = Kvm::new().map_err(MachineError::OpenKvm)?;
        let vm = create_vm(&kvm_fd)?;
        let Parts { resources, memory } = parts;
        let registers = registers::create(MMIO_BASE, DEVICE_IRQS.len());
        let registers = registers.map_err(device("device registers"))?;
        let ram = memory.iter().map(|region| (region, Access::ReadWrite));
        let all = ram.chain([(&*registers, Access::ReadOnly)]);
        for (slot, (region, access)) in (0..).zip(all) {
            give_memory(&vm, slot, region, access)?;
        }
        let image = Blk::new(resources.image, "image", Arc::clone(&observed.image_disk));
        let image = Arc::new(Mutex::new(image));
        let scratch = Arc::clone(&observed.scratch_disk);
        let (mac, mtu) = match &config.net {
            Some(net) => (net.mac, net.mtu),
            None => (DEFAULT_MAC, DEFAULT_MTU),
        };
        let muxer = Muxer::new(
            config.vsock.guest_cid,
            config.vsock.socket.clone(),
            resources.vsock,
            Arc::clone(&observed.vsock),
            Arc::clone(&observed.first_stream),
        );
        let vsock = Vsock::new(
            config.vsock.guest_cid,
            muxer.map_err(device("vsock"))?,
            Arc::clone(&observed.vsock),
            Arc::clone(&observed.vsock_ready),
        );
        let files = Fs::new(Arc::clone(&observed.files)).map_err(device("shared directories"))?;
        let files = Arc::new(Mutex::new(files));
        let volumes = Arc::clone(&observed.volume_disk);
        let volumes = Blk::new(VolumeDisk::default(), "volumes", volumes);
        let volumes = Arc::new(Mutex::new(volumes));
        let balloon = Arc::new(Mutex::new(Balloon::new(Arc::clone(&observed.balloon))));
        // The order is part of the interface: the guest's /dev/vda is the image disk, vdb the scratch disk, vdc the volume disk.
        let devices: [SharedDevice; 8] = [
            Arc::new(Mutex::new(vsock)),
            Arc::new(Mutex::new(Net::new(
                resources.tap,
                mac,
                mtu,
                Arc::clone(&observed.net),
            ))),
            Arc::clone(&image) as SharedDevice,
            Arc::new(Mutex::new(Blk::new(resources.scratch, "scratch", scratch))),
            Arc::new(Mutex::new(Rng::new(HostRandom, Arc::clone(&observed.rng)))),
            Arc::clone(&balloon) as SharedDevice,
            Arc::clone(&files) as SharedDevice,
            Arc::clone(&volumes) as SharedDevice,
        ];
        let unheard = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let unheard = unheard.map_err(device("an eventfd"))?;
        let mut transports = Vec::new();
        for (slot, (shared, irq)) in devices.into_iter().zip(DEVICE_IRQS).enumerate() {
            let page = RegisterPage::new(&registers, slot);
            let transport =
                page.and_then(|page| MmioTransport::new(shared, Arc::clone(&memory), page));
            let transport = transport.map_err(device("virtio transport"))?;
            let base = MMIO_BASE + slot as u64 * SLOT_BYTES;
            connect(&vm, &transport, base, irq, &unheard)?;
            transports.push(transport);
        }
        let of = |positions: &[usize]| {
            let chosen = positions.iter().filter_map(|&at| transports.get(at));
            Worker::new(chosen).map_err(device("worker"))
        };
        let (disk_worker, io_worker, files_worker) = (of(&DISKS)?, of(&OTHERS)?, of(&FILES)?);
        let volume_worker = of(&VOLUMES)?;

        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let line = line.map_err(device("serial port"))?;
        vm.register_irqfd(&line, SERIAL_IRQ)
            .map_err(kvm("connect serial interrupt"))?;
        let bus = Bus::new(SerialPort::new(line, resources.console), transports);

        let cpuid = cpu::host_cpuid(&kvm_fd).map_err(kvm("read supported CPUID"))?;
        let mut vcpus = Vec::new();
        for id in 0..config.vcpus {
            let fd = vm.create_vcpu(id.into()).map_err(kvm("create vCPU"))?;
            let exits = sys::statistics_file(&fd).ok().and_then(KvmExits::find);
            observed.kvm_exits.extend(exits);
            vcpus.push(fd);
        }
        let machine = Self {
            vcpus,
            vm,
            cpuid,
            memory,
            bus,
            image,
            files,
            volumes,
            balloon,
            disk_worker,
            io_worker,
            files_worker,
            volume_worker,
        };
        let remaining = super::Remaining {
            control: resources.control,
            kernel: resources.kernel,
            initramfs: resources.initramfs,
        };
        Ok((machine, remaining))
    }

    /// Sets up the vCPUs; the guest's memory is loaded by now.
    pub fn set_entry(&self, entry: &Entry) -> Result<(), MachineError> {
        let count = u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX);
        for (id, fd) in (0..count).zip(&self.vcpus) {
            cpu::set_up(fd, &self.cpuid, id, count, entry)?;
        }
        Ok(())
    }
}

fn give_memory(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionMmap<()>,
    access: Access,
) -> Result<(), MachineError> {
    let result = sys::set_memory_region(vm, slot, region, access);
    result.map_err(|source| MachineError::Memory {
        start: region.start_addr().0,
        bytes: region.len(),
        source,
    })
}

fn create_vm(kvm_fd: &Kvm) -> Result<VmFd, MachineError> {
    let vm = kvm_fd.create_vm().map_err(kvm("create VM"))?;
    vm.set_identity_map_address(IDENTITY_MAP)
        .map_err(kvm("place identity map"))?;
    vm.set_tss_address(TSS).map_err(kvm("place TSS"))?;
    // No PIT: the kernel has kvm-clock and the TSC deadline timer.
    vm.create_irq_chip()
        .map_err(kvm("create interrupt controllers"))?;
    Ok(vm)
}

/// Lets notifications, interrupts and their acknowledgements pass without this process.
fn connect(
    vm: &VmFd,
    transport: &MmioTransport,
    base: u64,
    irq: u32,
    unheard: &EventFd,
) -> Result<(), MachineError> {
    // See `Interrupt::acknowledge`. KVM keeps what it writes to when we close it.
    let address = IoEventAddress::Mmio(base + INTERRUPT_ACK);
    vm.register_ioevent(unheard, &address, USED_RING)
        .map_err(kvm("connect acknowledgement"))?;
    let address = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
    for (queue, notifier) in (0u32..).zip(transport.notifiers().iter()) {
        vm.register_ioevent(notifier, &address, queue)
            .map_err(kvm("connect queue notification"))?;
    }
    vm.register_irqfd(transport.interrupt().line(), irq)
        .map_err(kvm("connect device interrupt"))
}
