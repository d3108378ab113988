// SPDX-License-Identifier: Apache-2.0
//! System calls that map pages before they are touched, or let each touch be seen.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestRegionMmap;

use super::{check, part};

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)` (Linux 6.10)
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// The version of that interface.
const UFFD_API: u64 = 0xaa;
/// Pages of files may be watched for writes (Linux 5.19).
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// Needs no privilege.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Maps a part of a region as if each page were written to, without changing any (Linux 5.14). A page of a file that is mapped
/// privately is copied.
pub fn populate(region: &GuestRegionMmap<()>, start: u64, len: u64) -> io::Result<()> {
    let (address, len) = part(region, start, len)?;
    // SAFETY: the range lies in the region's mapping; its content stays what it is.
    let done = unsafe { libc::madvise(address, len, libc::MADV_POPULATE_WRITE) };
    check(done as isize).map(drop)
}

/// Maps guest memory for the vCPUs of a VM as if one of them had read it. Returns how many bytes at the end are left.
pub fn map_for_guest(vcpu: &VcpuFd, start: u64, len: u64) -> io::Result<u64> {
    let mut range = kvm_pre_fault_memory {
        gpa: start,
        size: len,
        ..Default::default()
    };
    // SAFETY: KVM reads and writes `range`, which lives until after the call.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut range) };
    check(done as isize)?;
    Ok(range.size)
}

/// Mappings in which the host maps only the page that is touched, and none around it.
#[derive(Debug)]
pub struct Singly(OwnedFd);

impl Singly {
    /// None yet.
    pub fn new() -> io::Result<Self> {
        #[repr(C)]
        struct Api {
            api: u64,
            features: u64,
            ioctls: u64,
        }
        let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
        // SAFETY: this call takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = match i32::try_from(fd) {
            Ok(fd) if fd >= 0 => fd,
            _ => return Err(io::Error::last_os_error()),
        };
        // SAFETY: the call has just returned `fd`; nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = Api {
            api: UFFD_API,
            features: UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `api`, which has the layout of `struct uffdio_api` and lives until after the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } as isize)?;
        Ok(Self(fd))
    }

    /// Adds a part of a region, for as long as `self` is there. It is watched for writes to pages that are protected, of which
    /// there is none: Linux maps no pages around the touched one where it watches.
    pub fn add(&self, region: &GuestRegionMmap<()>, start: u64, len: u64) -> io::Result<()> {
        #[repr(C)]
        struct Register {
            start: u64,
            len: u64,
            mode: u64,
            ioctls: u64,
        }
        let (address, len) = part(region, start, len)?;
        let mut register = Register {
            start: address as u64,
            len: len as u64,
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `register`, which has the layout of `struct uffdio_register` and lives until after
        // the call. The range lies in the region's mapping; its content stays what it is.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        check(done as isize).map(drop)
    }
}
