// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this crate: system calls on guest memory, and KVM requests that have no safe
//! wrapper.

mod ahead;

pub use ahead::{Singly, map_for_guest, populate};

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_READONLY, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Xsave, kvm_device_attr,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, Error, Kvm, VcpuFd, VmFd};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, VolatileSlice};

/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;
/// `_IO(KVMIO, 0xce)`
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
/// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
/// `_IOW('T', 208, unsigned int)`
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
/// `_IOW('T', 216, int)`
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// A huge page. Guest memory is mapped at a multiple of this, otherwise the host could not use huge pages.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;
/// `MADV_COLLAPSE` (Linux 6.1). The libc crate does not define it for this target.
const MADV_COLLAPSE: libc::c_int = 25;
/// The most buffers that `preadv` and similar calls accept.
const IOV_MAX: usize = 1024;

fn check(ret: isize) -> io::Result<usize> {
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// KVM by an open `/dev/kvm`.
pub fn kvm(device: File) -> Kvm {
    // SAFETY: the descriptor is open and owned, and is handed over here.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

/// What the guest may do with a memory region. A write to a read-only region is an MMIO exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    ReadOnly,
}

/// Gives memory to KVM. The caller must keep `region` mapped as long as the VM exists.
pub fn set_memory_region(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionMmap<()>,
    access: Access,
) -> io::Result<()> {
    let flags = match access {
        Access::ReadWrite => 0,
        Access::ReadOnly => KVM_MEM_READONLY,
    };
    let kvm_region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the region is a live mapping of `memory_size` bytes; the `Vm` that calls this owns
    // both the memory and the VM and drops the VM first.
    unsafe { vm.set_user_memory_region(kvm_region) }
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Memory that belongs to this process alone, and for which nothing is set aside before it is touched.
const OWN: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Reserves `size` bytes at an address where huge pages are possible, until the process ends.
fn reserve(size: usize, protection: libc::c_int) -> Result<*mut libc::c_void, MmapRegionError> {
    let more = size.checked_add(HUGE_PAGE_BYTES);
    let more = more.ok_or(MmapRegionError::InvalidOffsetLength)?;
    // SAFETY: asks for new addresses, which nothing else uses.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), more, protection, OWN, -1, 0) };
    match base {
        libc::MAP_FAILED => Err(MmapRegionError::Mmap(io::Error::last_os_error())),
        // The first such address is less than a huge page behind, so `size` bytes from there on are reserved.
        base => Ok(base.wrapping_byte_add(base.align_offset(HUGE_PAGE_BYTES))),
    }
}

/// Maps `size` bytes of `file`, shared, at an address where huge pages are possible. The mapping stays
/// until the process ends.
pub fn map_memory(
    file: &Arc<File>,
    offset: u64,
    size: usize,
) -> Result<MmapRegion<()>, MmapRegionError> {
    let file_position = position(offset).map_err(|_| MmapRegionError::InvalidOffsetLength)?;
    let aligned = reserve(size, libc::PROT_NONE)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let fixed = flags | libc::MAP_FIXED;
    let fd = file.as_raw_fd();
    // SAFETY: `[aligned, aligned + size)` lies in the reservation that was just made and that nothing else knows.
    let address = unsafe { libc::mmap(aligned, size, protection, fixed, fd, file_position) };
    if address == libc::MAP_FAILED {
        return Err(MmapRegionError::Mmap(io::Error::last_os_error()));
    }
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(protection)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
    // SAFETY: `address` is a mapping of `size` bytes that is never unmapped.
    unsafe { builder.with_raw_mmap_pointer(address.cast()) }.build()
}

/// Leaves a region without huge pages. A kernel that has none is no error.
pub fn avoid_huge_pages(region: &GuestRegionMmap<()>) {
    let Ok((address, len)) = part(region, 0, region.len()) else {
        return;
    };
    // SAFETY: the range is the region's mapping; only how it is backed changes.
    unsafe { libc::madvise(address, len, libc::MADV_NOHUGEPAGE) };
}

/// Puts a private mapping of `[offset, offset + len)` of a file over a part of a region.
pub fn lay_over(
    region: &GuestRegionMmap<()>,
    start: u64,
    len: u64,
    file: &File,
    offset: u64,
) -> io::Result<()> {
    let (address, len) = part(region, start, len)?;
    let offset = position(offset)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let fd = file.as_raw_fd();
    // SAFETY: the range lies in a mapping of this process that nothing has used yet, and stays mapped.
    let mapped = unsafe { libc::mmap(address, len, protection, flags, fd, offset) };
    match mapped {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Drops the private pages of a part of a region. Whole pages. What a shared file has there stays in it.
pub fn forget(region: &GuestRegionMmap<()>, start: u64, len: u64) -> io::Result<()> {
    let (address, len) = part(region, start, len)?;
    // SAFETY: the range lies in the guest's memory, whose content the guest does not need any more; it stays mapped.
    let done = unsafe { libc::madvise(address, len, libc::MADV_DONTNEED) };
    check(done as isize).map(drop)
}

/// The address and the length of a part of a region.
fn part(
    region: &GuestRegionMmap<()>,
    start: u64,
    len: u64,
) -> io::Result<(*mut libc::c_void, usize)> {
    let bad = || io::Error::from(io::ErrorKind::InvalidInput);
    if start.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(bad());
    }
    let start = usize::try_from(start).map_err(|_| bad())?;
    let len = usize::try_from(len).map_err(|_| bad())?;
    Ok((region.as_ptr().wrapping_add(start).cast(), len))
}

/// Another descriptor of a vCPU, for a thread that reads its state while its own thread has it parked.
pub fn another_vcpu(vm: &VmFd, vcpu: &VcpuFd) -> io::Result<VcpuFd> {
    // SAFETY: the vCPU's descriptor is open for the whole call because it is borrowed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let raw = borrowed.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: the descriptor is of a vCPU of this VM, and was just made; nothing else owns it.
    unsafe { vm.create_vcpu_from_rawfd(raw) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Backs `[start, start + len)` of a region, which consists of whole huge pages, with huge pages. If the
/// host cannot do that, the small pages stay.
pub fn use_huge_pages(region: &GuestRegionMmap<()>, start: usize, len: usize) {
    if start.checked_add(len).is_none_or(|end| end > region.size()) {
        return;
    }
    let address = region.as_ptr().wrapping_add(start);
    // SAFETY: the range lies in the mapping; its content stays what it is.
    unsafe { libc::madvise(address.cast(), len, MADV_COLLAPSE) };
}

fn iovecs(slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(IOV_MAX)
        .map(|s| libc::iovec {
            iov_base: s.ptr_guard_mut().as_ptr().cast(),
            iov_len: s.len(),
        })
        .collect()
}

fn count(iov: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iov.len()).unwrap_or(0)
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Reads from `file` at `offset` directly into guest memory.
pub fn read_at(file: &File, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let iov = iovecs(slices);
    let offset = position(offset)?;
    // SAFETY: every iovec describes a `VolatileSlice`, which is mapped for the lifetime of the
    // borrow; the kernel may write there at any time, as the guest may.
    check(unsafe { libc::preadv(file.as_raw_fd(), iov.as_ptr(), count(&iov), offset) })
}

/// Writes to `file` at `offset` directly from guest memory.
pub fn write_at(file: &File, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let iov = iovecs(slices);
    let offset = position(offset)?;
    // SAFETY: as in `read_at`; the kernel only reads.
    check(unsafe { libc::pwritev(file.as_raw_fd(), iov.as_ptr(), count(&iov), offset) })
}

/// Reads from a stream or a TAP directly into guest memory.
pub fn read(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let iov = iovecs(slices);
    // SAFETY: as in `read_at`.
    check(unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), count(&iov)) })
}

/// Writes to a TAP directly from guest memory.
pub fn write(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let iov = iovecs(slices);
    // SAFETY: as in `write_at`.
    check(unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), count(&iov)) })
}

/// Sends to a socket directly from guest memory, without SIGPIPE.
pub fn send(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut iov = iovecs(slices);
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_mut_ptr();
    message.msg_iovlen = iov.len();
    // SAFETY: `message` points at `iov`, which lives until after the call and describes mapped
    // guest memory that the kernel only reads.
    check(unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) })
}

/// Lets `signal` interrupt KVM_RUN, although the thread blocks it everywhere else. So no signal is lost
/// between the check of a flag and the entry into the guest: a pending signal ends KVM_RUN at once.
pub fn unblock_signal_in_guest(vcpu: &VcpuFd, signal: libc::c_int) -> io::Result<()> {
    #[repr(C)]
    struct SignalMask {
        len: u32,
        set: [u8; 8],
    }
    let bit = u32::try_from(signal - 1).map_err(|_| io::ErrorKind::InvalidInput)?;
    let blocked = !(1u64.checked_shl(bit).ok_or(io::ErrorKind::InvalidInput)?);
    let mask = SignalMask {
        len: 8,
        set: blocked.to_ne_bytes(),
    };
    // SAFETY: `mask` has the layout of `struct kvm_signal_mask` with its eight bytes of set.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) } as isize)?;
    Ok(())
}

/// Opens the binary statistics of a vCPU (Linux 5.14 and later).
pub fn statistics_file(vcpu: &VcpuFd) -> io::Result<File> {
    // SAFETY: this request takes no argument.
    let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
    check(fd as isize)?;
    // SAFETY: the call has just returned `fd`; nothing else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// The suberror of KVM_EXIT_INTERNAL_ERROR. Call it directly after that exit.
pub fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    // SAFETY: every bit pattern is a valid integer, whichever member of the union is in use.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}

/// An empty XSAVE area as large as KVM wants it for this VM. What the kernel adds to one on demand (AMX) is in that size, and
/// no thread of a VMM asks for it.
fn empty_xsave(vm: &VmFd) -> Result<Xsave, Error> {
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    let extra = bytes.saturating_sub(size_of::<kvm_xsave>());
    Xsave::new(extra.div_ceil(size_of::<u32>())).map_err(|_| Error::new(libc::ENOMEM))
}

/// Reads the XSAVE area of a vCPU, which has floating-point and vector registers.
pub fn xsave(vm: &VmFd, vcpu: &VcpuFd) -> Result<Vec<u32>, Error> {
    if !vm.check_extension(Cap::Xsave2) {
        return vcpu.get_xsave().map(|area| area.region.to_vec());
    }
    let mut area = empty_xsave(vm)?;
    // SAFETY: `area` has the size that KVM has just told for this VM.
    unsafe { vcpu.get_xsave2(&mut area) }?;
    let region = &area.as_fam_struct_ref().xsave.region;
    Ok([region.as_slice(), area.as_slice()].concat())
}

/// Sets the XSAVE area of a vCPU. Fails if `words` is not as large as KVM wants it for this VM.
pub fn set_xsave(vm: &VmFd, vcpu: &VcpuFd, words: &[u32]) -> Result<(), Error> {
    let mut area = empty_xsave(vm)?;
    let invalid = Error::new(libc::EINVAL);
    let (region, extra) = words.split_first_chunk().ok_or(invalid)?;
    if extra.len() != area.as_slice().len() {
        return Err(invalid);
    }
    area.as_mut_slice().copy_from_slice(extra);
    // SAFETY: the length of the part behind the structure is not changed.
    unsafe { area.as_mut_fam_struct() }.xsave.region = *region;
    // SAFETY: `area` has the size that KVM has just told for this VM.
    unsafe { vcpu.set_xsave2(&area) }
}

/// What KVM adds to the host's TSC for a vCPU (Linux 5.16 and later).
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM writes eight bytes to `offset`, which lives until after the call.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attribute) } {
        0 => Ok(offset),
        _ => Err(Error::last()),
    }
}

/// Sets what KVM adds to the host's TSC for a vCPU.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM reads eight bytes from `offset`, which lives until after the call.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) } {
        0 => Ok(()),
        _ => Err(Error::last()),
    }
}

fn tsc_attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset as u64,
    }
}

/// Sets which work the TAP may leave to the guest (`TUN_F_*`).
pub fn set_tap_offload(tap: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: this request takes its flags by value.
    let ret = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    check(ret as isize).map(drop)
}

/// Sets the size of the header in front of every frame.
pub fn set_tap_header_size(tap: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    // SAFETY: the request reads one int, which lives until after the call.
    let ret = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) };
    check(ret as isize).map(drop)
}

/// Keeps malloc from creating an arena per thread, to save memory: there is one such process per VM.
pub fn use_one_malloc_arena() {
    // SAFETY: called before the first thread is made; takes no pointer.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
