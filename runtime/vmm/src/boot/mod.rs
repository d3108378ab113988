// SPDX-License-Identifier: Apache-2.0
//! Loads the kernel, the initramfs and the data of the 64-bit boot protocol into guest memory. Runs
//! once, before the vCPUs run.
//!
//! ```text
//! 0x500 GDT   0x7000 zero page   0x9000 page tables   0x20000 command line
//! 0x9fc00 MP table   0x100000 up: kernel   ...   initramfs at the end of memory below the gap
//! ```

mod mptable;

use std::fs::File;
use std::io::{self, Seek};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GAP_START, Memory, expect_use, ranges};

pub(crate) const GDT: u64 = 0x500;
const STACK: u64 = 0x6ff0;
const ZERO_PAGE: u64 = 0x7000;
pub(crate) const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
/// COMMAND_LINE_SIZE of Linux on x86.
const CMDLINE_BYTES: usize = 2048;
const MP_TABLE: u32 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;
const PAGE_BYTES: u64 = 4096;
/// Where a kernel is loaded by default (CONFIG_PHYSICAL_START). Only used to announce memory that
/// will soon be touched; a wrong value costs time, nothing else.
const KERNEL: u64 = 0x100_0000;
const KERNEL_MOST: u64 = 64 << 20;
/// Memory behind the kernel that it uses until the agent is ready: slab caches, requests of block devices, page tables.
const AFTER_KERNEL_BYTES: u64 = 8 << 20;
/// Memory that a kernel uses early, apart from its page structures, which take 1/64 of memory.
const EARLY_BYTES: u64 = 2 << 20;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why loading failed.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("load kernel")]
    Kernel(#[source] linux_loader::loader::Error),
    #[error("read the size of kernel or initramfs")]
    Measure(#[source] io::Error),
    #[error("load initramfs of {bytes} bytes")]
    Initramfs {
        bytes: u64,
        source: vm_memory::GuestMemoryError,
    },
    #[error(
        "kernel ({kernel_end:#x}) and initramfs ({initramfs} bytes) do not fit {memory} bytes of memory"
    )]
    NoRoom {
        kernel_end: u64,
        initramfs: u64,
        memory: u64,
    },
    #[error("command line has {0} bytes, must have fewer than {CMDLINE_BYTES}")]
    Cmdline(usize),
    #[error("write boot data")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// The state in which the first vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub rip: u64,
    pub zero_page: u64,
    pub stack: u64,
    pub gdt: u64,
    pub gdt_limit: u16,
    pub page_table: u64,
}

/// Loads everything. The files are read directly into guest memory. The kernel is told that its memory
/// has `memory_bytes`; `memory` may be larger, for memory that is added later.
pub fn load(
    memory: &Memory,
    memory_bytes: u64,
    kernel: &mut File,
    initramfs: &mut File,
    cmdline: &str,
    vcpus: u8,
) -> Result<Entry, BootError> {
    let low_end = memory_bytes.min(GAP_START);
    let size = initramfs.metadata().map_err(BootError::Measure)?.len();
    let kernel_size = kernel.metadata().map_err(BootError::Measure)?.len();
    let kernel_bytes = kernel_size.min(KERNEL_MOST);
    expect_use(memory, KERNEL, KERNEL + kernel_bytes + AFTER_KERNEL_BYTES);
    // The kernel allocates early memory from the end downwards, below the initramfs.
    let early = size
        .saturating_add(low_end / 64)
        .saturating_add(EARLY_BYTES);
    expect_use(memory, low_end.saturating_sub(early).max(KERNEL), low_end);
    let high = Some(GuestAddress(HIGH_MEMORY));
    let loaded = Elf::load(memory, None, kernel, high).map_err(BootError::Kernel)?;
    let no_room = BootError::NoRoom {
        kernel_end: loaded.kernel_end,
        initramfs: size,
        memory: low_end,
    };
    let address = low_end.checked_sub(size).map(|a| a - a % PAGE_BYTES);
    let Some(address) = address.filter(|&address| address >= loaded.kernel_end) else {
        return Err(no_room);
    };
    load_initramfs(memory, initramfs, address, size)?;
    if cmdline.len() >= CMDLINE_BYTES {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let write = |bytes: &[u8], at| memory.write_slice(bytes, GuestAddress(at));
    write(cmdline.as_bytes(), CMDLINE).map_err(BootError::Write)?;
    write(&[0], CMDLINE + cmdline.len() as u64).map_err(BootError::Write)?;
    write(&mptable::build(MP_TABLE, vcpus), MP_TABLE.into()).map_err(BootError::Write)?;
    let gdt_limit = write_gdt(memory).map_err(BootError::Write)?;
    write_page_tables(memory).map_err(BootError::Write)?;
    let params = zero_page(memory_bytes, cmdline.len(), address, size);
    memory
        .write_obj(params, GuestAddress(ZERO_PAGE))
        .map_err(BootError::Write)?;
    Ok(Entry {
        rip: loaded.kernel_load.0,
        zero_page: ZERO_PAGE,
        stack: STACK,
        gdt: GDT,
        gdt_limit,
        page_table: PAGE_TABLES,
    })
}

fn load_initramfs(
    memory: &Memory,
    file: &mut File,
    address: u64,
    bytes: u64,
) -> Result<(), BootError> {
    file.rewind().map_err(BootError::Measure)?;
    let count = usize::try_from(bytes).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(address), file, count)
        .map_err(|source| BootError::Initramfs { bytes, source })
}

/// The GDT of the boot protocol: two null entries, 64-bit code at 0x10, data at 0x18. Returns its limit.
pub(crate) fn write_gdt(memory: &Memory) -> Result<u16, vm_memory::GuestMemoryError> {
    const ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (at, entry) in (GDT..).step_by(8).zip(ENTRIES) {
        memory.write_obj(entry, GuestAddress(at))?;
    }
    Ok(31)
}

/// Maps the first 4 GiB to themselves, in pages of 2 MiB. The kernel soon replaces these tables.
pub(crate) fn write_page_tables(memory: &Memory) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const DIRECTORIES: u64 = 4;
    let pointers = PAGE_TABLES + PAGE_BYTES;
    memory.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    for gib in 0..DIRECTORIES {
        let directory = pointers + (gib + 1) * PAGE_BYTES;
        let pointer = GuestAddress(pointers + gib * 8);
        memory.write_obj(directory | PRESENT_WRITABLE, pointer)?;
        for index in 0..512 {
            let page = gib << 30 | index << 21 | LARGE | PRESENT_WRITABLE;
            memory.write_obj(page, GuestAddress(directory + index * 8))?;
        }
    }
    Ok(())
}

/// The boot parameters ("zero page"): loader type, command line, initramfs and the map of memory (e820).
fn zero_page(memory_bytes: u64, cmdline: usize, initramfs: u64, size: u64) -> boot_params {
    let mut params = boot_params::default();
    let low = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    params.hdr.type_of_loader = 0xff;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.version = 0x20f;
    params.hdr.loadflags = 1;
    params.hdr.cmd_line_ptr = low(CMDLINE);
    params.hdr.cmdline_size = low(cmdline as u64);
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.ramdisk_image = low(initramfs);
    params.hdr.ramdisk_size = low(size);
    let mp_table = u64::from(MP_TABLE);
    let mut map = vec![
        (0, mp_table, E820_RAM),
        (mp_table, HIGH_MEMORY - mp_table, E820_RESERVED),
    ];
    for (start, len) in ranges(memory_bytes) {
        let end = start + len;
        let start = start.max(HIGH_MEMORY);
        map.push((start, end - start, E820_RAM));
    }
    for (to, &(addr, size, r#type)) in params.e820_table.iter_mut().zip(&map) {
        *to = boot_e820_entry { addr, size, r#type };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        let memory = crate::memory::create(32 << 20).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 4096]).unwrap();
        let mut other = tempfile::tempfile().unwrap();
        let result = load(&memory, 32 << 20, &mut file, &mut other, "", 1);
        assert!(matches!(result, Err(BootError::Kernel(_))));
    }

    #[test]
    fn the_memory_map_goes_around_the_gap() {
        let params = zero_page(4 << 30, 0, 0, 0);
        let last = params.e820_table[3];
        assert_eq!(params.e820_entries, 4);
        assert_eq!(({ last.addr }, { last.size }), (1 << 32, 1 << 30));
    }
}
