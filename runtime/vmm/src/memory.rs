// SPDX-License-Identifier: Apache-2.0
//! Guest memory, with a gap below 4 GiB for devices. Everything else in this crate builds on it.
//!
//! It is an anonymous file, mapped shared. The memory of a fork is its own, except that it begins with the pages of a
//! template, which is mapped privately: a page is copied when the fork first writes to it. A restored VM either has memory
//! as one that booted, into which the content of a checkpoint is copied, or maps the checkpoint as a fork its template.

pub mod ahead;
mod laid;

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::foreseen::PAGE_BYTES;
use crate::sparse::{self, Copier, CopyError};
use crate::sys;
pub use laid::{Laid, forked, mapped};

/// The memory that devices and vCPUs share.
pub type Memory = GuestMemoryMmap<()>;

/// Guest-physical addresses from here up to [`GAP_END`] belong to devices.
pub const GAP_START: u64 = 0xc000_0000;
pub const GAP_END: u64 = 1 << 32;
/// The name of the file behind memory that is a VM's own, by which others know it.
pub const FILE_NAME: &str = "guest-memory";

/// Why guest memory could not be created.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("open memory file")]
    Open(#[source] io::Error),
    #[error("set size of memory file to {bytes} bytes")]
    Resize { bytes: u64, source: io::Error },
    #[error("map {bytes} bytes of guest memory at {start:#x}")]
    Map {
        start: u64,
        bytes: u64,
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("{0} bytes of guest memory do not fit the address space")]
    TooLarge(u64),
    #[error("map the memory of the template")]
    Template(#[source] io::Error),
    #[error("the template has {template} bytes of memory, the VM may have {bytes}")]
    LargeTemplate { template: u64, bytes: u64 },
    #[error("look at the memory of the checkpoint")]
    Checkpoint(#[source] io::Error),
    #[error(
        "the checkpoint has {found} bytes of memory, the VM must have as many, and has {bytes}"
    )]
    OtherSize { found: u64, bytes: u64 },
    #[error("copy the memory of the checkpoint")]
    Copy(#[from] CopyError),
    #[error("map the memory of the checkpoint")]
    MapCheckpoint(#[source] io::Error),
    #[error("combine the regions of guest memory")]
    Arrange(#[source] vm_memory::GuestRegionCollectionError),
}

/// The guest-physical ranges of `bytes` of memory, as `(address, length)`, in order. Memory that is added
/// later follows: the ranges of less memory are a prefix of those of more.
#[must_use]
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= GAP_START {
        vec![(0, bytes)]
    } else {
        vec![(0, GAP_START), (GAP_END, bytes - GAP_START)]
    }
}

/// Creates and maps guest memory. The host allocates a page when it is first touched.
pub fn create(bytes: u64) -> Result<Memory, MemoryError> {
    shared(anonymous_file(FILE_NAME, bytes)?, bytes)
}

/// The memory of a template: a file of the caller's, which must have this many bytes.
pub fn of_template(file: &File, bytes: u64) -> Result<Memory, MemoryError> {
    let file = file.try_clone().map_err(MemoryError::Template)?;
    let measured = file.metadata().map_err(MemoryError::Template)?.len();
    match measured == bytes {
        true => shared(file, bytes),
        false => Err(MemoryError::LargeTemplate {
            template: measured,
            bytes,
        }),
    }
}

/// Maps a file as guest memory.
fn shared(file: File, bytes: u64) -> Result<Memory, MemoryError> {
    let file = Arc::new(file);
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, len) in ranges(bytes) {
        regions.push(map(&file, offset, start, len)?);
        offset += len;
    }
    Memory::from_regions(regions).map_err(MemoryError::Arrange)
}

/// Memory of its own with the content of a checkpoint, a regular file of this many bytes as [`save`] writes it. Nobody needs
/// the file afterwards.
pub fn restored(checkpoint: &File, bytes: u64) -> Result<Memory, MemoryError> {
    check_checkpoint(checkpoint, bytes)?;
    let file = anonymous_file(FILE_NAME, bytes)?;
    // The parent has a time limit, and ends this process.
    Copier::new(&file, None).file(checkpoint, bytes)?;
    shared(file, bytes)
}

fn check_checkpoint(checkpoint: &File, bytes: u64) -> Result<(), MemoryError> {
    let metadata = checkpoint.metadata().map_err(MemoryError::Checkpoint)?;
    if !metadata.is_file() {
        let what = io::Error::other("it is no regular file");
        return Err(MemoryError::Checkpoint(what));
    }
    match metadata.len() {
        found if found == bytes => Ok(()),
        found => Err(MemoryError::OtherSize { found, bytes }),
    }
}

/// Copies all memory into a file, in which its [`ranges`] follow one another. Call it while nobody writes to the memory.
///
/// Holes of the file behind memory are not read, because that would make their pages. What is `laid` over it is read.
pub fn save(memory: &Memory, laid: &Laid, copier: &mut Copier<'_>) -> Result<(), CopyError> {
    let mut first = 0;
    for region in memory.iter() {
        let read = |buffer: &mut [u8], at| {
            let done = region.read_slice(buffer, MemoryRegionAddress(at));
            done.map_err(io::Error::other)
        };
        let end = first + region.len();
        let mut at = first;
        while let Some(backing) = region.file_offset()
            && let Some(data) =
                sparse::next_data(backing.file(), at..end).map_err(CopyError::Find)?
        {
            at = data.end;
            copier.part(data.start - first..data.end - first, first, read)?;
        }
        let inside = laid
            .iter()
            .filter(|part| (first..end).contains(&part.start));
        for part in inside {
            copier.part(part.start - first..part.end - first, first, read)?;
        }
        first += region.len();
    }
    Ok(())
}

/// Creates and maps memory that is not RAM of the guest: register pages of devices.
pub fn create_at(start: u64, bytes: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    let file = Arc::new(anonymous_file("device-memory", bytes)?);
    map(&file, 0, start, bytes)
}

fn map(
    file: &Arc<File>,
    offset: u64,
    start: u64,
    bytes: u64,
) -> Result<GuestRegionMmap<()>, MemoryError> {
    let size = usize::try_from(bytes).map_err(|_| MemoryError::TooLarge(bytes))?;
    let mapping = sys::map_memory(file, offset, size);
    let mapping = mapping.map_err(|source| MemoryError::Map {
        start,
        bytes,
        source,
    })?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::TooLarge(bytes))
}

fn set_len(file: &File, bytes: u64) -> Result<(), MemoryError> {
    file.set_len(bytes)
        .map_err(|source| MemoryError::Resize { bytes, source })
}

fn anonymous_file(name: &str, bytes: u64) -> Result<File, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(name, flags).map_err(|e| MemoryError::Open(e.into()))?;
    let file = File::from(file);
    set_len(&file, bytes)?;
    // Nobody can shrink the file under the mapping, after which every access would be a SIGBUS.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(|e| MemoryError::Open(e.into()))?;
    Ok(file)
}

/// Backs the part of memory around `[start, end)` with huge pages of the host, if possible. Otherwise the
/// guest's first access to each small page costs a VM exit. For memory that a kernel uses for sure, those
/// are most of the exits of a boot.
pub fn expect_use(memory: &Memory, start: u64, end: u64) {
    let Some(region) = memory.find_region(GuestAddress(start)) else {
        return;
    };
    let huge = sys::HUGE_PAGE_BYTES as u64;
    let first = (start - region.start_addr().0) / huge * huge;
    let end = end.saturating_sub(region.start_addr().0).min(region.len());
    let last = end.next_multiple_of(huge).min(region.len() / huge * huge);
    let len = last.saturating_sub(first);
    // Touch one small page in each huge page: Linux takes an empty range for a truncated file and fails.
    for at in (first..last).step_by(sys::HUGE_PAGE_BYTES) {
        let _ = region.read_obj::<u8>(MemoryRegionAddress(at));
    }
    if let (Ok(first), Ok(len)) = (usize::try_from(first), usize::try_from(len)) {
        sys::use_huge_pages(region, first, len);
    }
}

/// Gives the whole pages inside `[start, start + len)` back to the host. They read as zeroes from now on, or as in the
/// template or checkpoint that they are mapped from. Returns how many bytes were released. The numbers may come from the
/// guest and be wrong.
pub fn release(memory: &Memory, start: u64, len: u64) -> io::Result<u64> {
    let bad = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = memory.find_region(GuestAddress(start)).ok_or_else(bad)?;
    let in_region = start.checked_sub(region.start_addr().0).ok_or_else(bad)?;
    let end = in_region.checked_add(len).ok_or_else(bad)?;
    if end > region.len() {
        return Err(bad());
    }
    let first = in_region.next_multiple_of(PAGE_BYTES);
    let last = end - end % PAGE_BYTES;
    let Some(bytes) = last.checked_sub(first).filter(|&b| b > 0) else {
        return Ok(0);
    };
    // Copies of pages that are mapped from a template or a checkpoint are not in the VM's own file. The original is seen
    // again then: what a guest gave back has no content.
    sys::forget(region, first, bytes)?;
    let backing = region.file_offset().ok_or_else(bad)?;
    let offset = backing.start().checked_add(first).ok_or_else(bad)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(backing.file(), flags, offset, bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses around the limits of pages and of memory.
    fn edges(bytes: u64) -> impl Iterator<Item = u64> + Clone {
        let pages = (0..=bytes / PAGE_BYTES + 1).map(|page| page * PAGE_BYTES);
        let near = |at: u64| [at.wrapping_sub(1), at, at + 1, at + PAGE_BYTES / 2];
        let far = [1 << 32, u64::MAX - PAGE_BYTES, u64::MAX];
        pages.flat_map(near).chain(far)
    }

    #[test]
    fn for_all_edges_only_whole_pages_inside_the_range_are_released() {
        const BYTES: u64 = 4 * PAGE_BYTES;
        let memory = create(BYTES).unwrap();
        let of = |byte: u8, bytes: u64| vec![byte; usize::try_from(bytes).unwrap()];
        for (start, len) in edges(BYTES).flat_map(|start| edges(BYTES).map(move |len| (start, len)))
        {
            memory.write_slice(&of(1, BYTES), GuestAddress(0)).unwrap();
            let end = u128::from(start) + u128::from(len);
            let released = release(&memory, start, len);
            assert_eq!(
                released.is_ok(),
                start < BYTES && end <= u128::from(BYTES),
                "{start} {len}"
            );
            let is_inside = |page: u64| {
                let first = u128::from(page * PAGE_BYTES);
                first >= u128::from(start) && first + u128::from(PAGE_BYTES) <= end
            };
            let mut zeroed = 0;
            for page in 0..BYTES / PAGE_BYTES {
                let mut bytes = of(7, PAGE_BYTES);
                let at = GuestAddress(page * PAGE_BYTES);
                memory.read_slice(&mut bytes, at).unwrap();
                let is_gone = released.is_ok() && is_inside(page);
                assert_eq!(bytes, of(u8::from(!is_gone), PAGE_BYTES), "{start} {len}");
                zeroed += u64::from(is_gone) * PAGE_BYTES;
            }
            assert_eq!(released.unwrap_or(0), zeroed, "{start} {len}");
        }
    }

    #[test]
    fn for_all_sizes_the_ranges_of_less_memory_begin_those_of_more() {
        let sizes = [
            1,
            4096,
            GAP_START - 1,
            GAP_START,
            GAP_START + 1,
            GAP_END,
            1 << 40,
        ];
        for (less, more) in sizes
            .into_iter()
            .flat_map(|less| sizes.map(|more| (less, more)))
        {
            if less > more {
                continue;
            }
            let (small, large) = (ranges(less), ranges(more));
            let total: u64 = small.iter().map(|(_, len)| len).sum();
            assert_eq!(total, less);
            for ((start, len), (same, longer)) in small.iter().zip(&large) {
                assert!(start == same && len <= longer, "{less} {more}");
                assert!(start + len <= GAP_START || *start >= GAP_END, "{less}");
            }
        }
    }

    #[test]
    fn large_memory_goes_around_the_gap() {
        assert_eq!(ranges(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ranges(GAP_START), [(0, GAP_START)]);
        assert_eq!(
            ranges(1 << 40),
            [(0, GAP_START), (GAP_END, (1 << 40) - GAP_START)]
        );
        let memory = create(5 << 30).unwrap();
        memory.write_obj(7u8, GuestAddress(GAP_END)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(GAP_START)).is_err());
        assert_eq!(release(&memory, GAP_END, 4096).unwrap(), 4096);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(GAP_END)).unwrap(), 0);
    }

    /// A template of four pages: one with data, a hole, and two with data.
    pub(super) fn template() -> File {
        use std::os::unix::fs::FileExt;
        let file = anonymous_file("test", 4 * PAGE_BYTES).unwrap();
        for page in [0, 2, 3] {
            let bytes = vec![u8::try_from(page).unwrap() + 1; PAGE];
            file.write_all_at(&bytes, page * PAGE_BYTES).unwrap();
        }
        file
    }

    const PAGE: usize = 4096;

    pub(super) fn first_bytes(memory: &Memory, pages: u64) -> Vec<u8> {
        let byte = |page| memory.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap();
        (0..pages).map(byte).collect()
    }

    #[test]
    fn a_template_that_is_larger_than_its_fork_is_refused() {
        let refused = forked(&template(), 3 * PAGE_BYTES);
        assert!(matches!(refused, Err(MemoryError::LargeTemplate { .. })));
        let refused = of_template(&template(), 5 * PAGE_BYTES);
        assert!(matches!(refused, Err(MemoryError::LargeTemplate { .. })));
    }

    /// A file that [`save`] has written, and how many bytes it wrote.
    pub(super) fn saved(memory: &Memory, laid: &Laid) -> (File, u64) {
        let file = tempfile::tempfile().unwrap();
        let bytes = memory.iter().map(GuestMemoryRegion::len).sum();
        file.set_len(bytes).unwrap();
        let mut copier = Copier::new(&file, None);
        save(memory, laid, &mut copier).unwrap();
        let written = copier.written();
        (file, written)
    }

    pub(super) fn blocks(memory: &Memory) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let region = memory.iter().next().unwrap();
        let backing = region.file_offset().unwrap();
        backing.file().metadata().unwrap().blocks()
    }

    #[test]
    fn what_is_saved_is_restored_on_both_sides_of_the_gap_and_holes_stay_holes() {
        const BYTES: u64 = GAP_START + 8 * PAGE_BYTES;
        let memory = create(BYTES).unwrap();
        let places = [1, GAP_START - 1, GAP_END, GAP_END + 8 * PAGE_BYTES - 1];
        for (value, at) in (1u8..).zip(places) {
            memory.write_obj(value, GuestAddress(at)).unwrap();
        }
        memory.write_obj(0u8, GuestAddress(8 << 20)).unwrap();
        let taken = blocks(&memory);
        let (file, written) = saved(&memory, &Laid::new());
        assert_eq!(
            written,
            4 * PAGE_BYTES,
            "neither holes nor a page of zeroes"
        );
        assert_eq!(blocks(&memory), taken);

        let again = restored(&file, BYTES).unwrap();
        for (value, at) in (1u8..).zip(places) {
            let found = again.read_obj::<u8>(GuestAddress(at)).unwrap();
            assert_eq!(found, value, "{at:#x}");
        }
        assert!(blocks(&again) < taken);
        // It is memory as any other: pages go back to the host, and the file is not written to.
        assert_eq!(release(&again, GAP_END, PAGE_BYTES).unwrap(), PAGE_BYTES);
        again.write_obj(9u8, GuestAddress(1)).unwrap();
        assert_eq!(saved(&again, &Laid::new()).1, 3 * PAGE_BYTES);
        let copy = restored(&file, BYTES).unwrap();
        assert_eq!(saved(&copy, &Laid::new()).1, written);
    }

    #[test]
    fn what_is_no_memory_of_this_size_is_neither_copied_nor_mapped() {
        use std::os::fd::OwnedFd;
        let either = |file: &File, bytes| {
            let mapped = mapped(file, bytes).map(|(memory, _)| memory);
            [restored(file, bytes), mapped].map(Result::unwrap_err)
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * PAGE_BYTES).unwrap();
        for bytes in [PAGE_BYTES, 3 * PAGE_BYTES] {
            for refused in either(&file, bytes) {
                assert!(matches!(refused, MemoryError::OtherSize { .. }));
            }
        }
        let device = File::open("/dev/zero").unwrap();
        let directory = File::open("/").unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        for no_file in [device, directory, OwnedFd::from(pipe).into()] {
            for refused in either(&no_file, 0) {
                assert!(matches!(refused, MemoryError::Checkpoint(_)));
            }
        }
    }

    #[test]
    fn release_checks_what_the_guest_says() {
        let memory = create(32 << 20).unwrap();
        assert!(release(&memory, 32 << 20, 4096).is_err());
        assert!(release(&memory, 4096, u64::MAX).is_err());
        assert!(release(&memory, (32 << 20) - 4096, 8192).is_err());
        assert_eq!(release(&memory, 4096, 100).unwrap(), 0);
        assert_eq!(release(&memory, 1, 8191).unwrap(), 4096);
    }
}
