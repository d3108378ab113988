// SPDX-License-Identifier: Apache-2.0
//! Memory that begins with the pages of a file, which other VMs have, too: a fork's with those of its template, and that
//! of a restored VM which maps its checkpoint. On the main thread, before there are others.
//!
//! Only where the file has data is it mapped, privately, over a file of the VM's own: a page is copied when the VM first
//! writes to it. A page of a hole that is read through a mapping would be made in the file, or in the page cache.
//!
//! Nobody may change the file as long as VMs map it. A template is sealed. A checkpoint's file is in a directory to which
//! only root can write. If root truncates it all the same, or its disk fails, the VMs that need the lost pages end
//! (SIGBUS), and nothing else does.

use std::fs::File;
use std::io;
use std::ops::Range;

use vm_memory::GuestMemoryBackend;

use super::{Memory, MemoryError, check_checkpoint, create, ranges};
use crate::foreseen::PAGE_BYTES;
use crate::{sparse, sys};

/// How many parts of a region are mapped at most. Each takes two mappings, its own and that of the hole behind it, and
/// Linux lets a process have 65530 (vm.max_map_count). How scattered a checkpoint's data is, a guest has decided.
const MOST_PARTS: usize = 4096;

/// The parts of memory that are mapped from a template or a checkpoint: whole pages, by their places in the file of
/// [`super::save`].
pub type Laid = Vec<Range<u64>>;

/// The memory of a fork: `bytes`, of which the first are those of `template`. Nobody writes to the template any more. Also
/// returns which parts are the template's.
pub fn forked(template: &File, bytes: u64) -> Result<(Memory, Laid), MemoryError> {
    let measured = template.metadata().map_err(MemoryError::Template)?.len();
    if measured > bytes {
        return Err(MemoryError::LargeTemplate {
            template: measured,
            bytes,
        });
    }
    let memory = create(bytes)?;
    let laid = lay(&memory, template, measured).map_err(MemoryError::Template)?;
    Ok((memory, laid))
}

/// Memory with the content of a checkpoint, as [`super::restored`] makes it, but mapped from the file. Nobody writes to
/// the file any more; it may be unlinked. Also returns which parts are mapped.
pub fn mapped(checkpoint: &File, bytes: u64) -> Result<(Memory, Laid), MemoryError> {
    check_checkpoint(checkpoint, bytes)?;
    let memory = create(bytes)?;
    let laid = lay(&memory, checkpoint, bytes).map_err(MemoryError::MapCheckpoint)?;
    Ok((memory, laid))
}

/// Lays the data of a file over the first `bytes` of memory that nothing has used yet.
fn lay(memory: &Memory, file: &File, bytes: u64) -> io::Result<Laid> {
    let (mut laid, mut first) = (Laid::new(), 0);
    // Few of its pages are touched.
    memory.iter().for_each(sys::avoid_huge_pages);
    for ((_, len), region) in ranges(bytes).into_iter().zip(memory.iter()) {
        let end = first + len;
        for part in parts(data_of(file, first..end)?, MOST_PARTS) {
            let length = part.end - part.start;
            sys::lay_over(region, part.start - first, length, file, part.start)?;
            laid.push(part);
        }
        first = end;
    }
    Ok(laid)
}

/// Where a range of a file has data, in order.
fn data_of(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let (mut found, mut at) = (Vec::new(), range.start);
    while let Some(data) = sparse::next_data(file, at..range.end)? {
        at = data.end;
        found.push(data);
    }
    Ok(found)
}

/// The pages with this data, which is in order, and of which a file system with small blocks may have several parts in
/// one page. If there are more than `most` parts, holes between them are covered, too, the smallest first.
fn parts(data: Vec<Range<u64>>, most: usize) -> Laid {
    let pages = data.into_iter().map(|data| {
        let first = data.start / PAGE_BYTES * PAGE_BYTES;
        first..data.end.next_multiple_of(PAGE_BYTES)
    });
    let (mut parts, mut hole) = (joined(pages, 0), PAGE_BYTES);
    while parts.len() > most.max(1) {
        parts = joined(parts, hole);
        hole = hole.saturating_mul(2);
    }
    parts
}

/// Makes one of parts that overlap, touch, or have no more than a hole of this size between them.
fn joined(parts: impl IntoIterator<Item = Range<u64>>, hole: u64) -> Laid {
    let mut joined = Laid::new();
    for part in parts {
        match joined.last_mut() {
            Some(last) if part.start <= last.end.saturating_add(hole) => {
                last.end = last.end.max(part.end);
            }
            _ => joined.push(part),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::tests::{blocks, first_bytes, saved, template};
    use crate::memory::{GAP_END, GAP_START, release, restored};

    const PAGES: u64 = 4;

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// The memory file of a checkpoint, in memory and on a disk. It has what [`template`] has.
    fn checkpoints() -> [File; 2] {
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.set_len(PAGES * PAGE_BYTES).unwrap();
        for page in [0, 2, 3] {
            let at = usize::try_from(page * PAGE_BYTES).unwrap();
            let bytes = &content(&template())[at..][..4096];
            on_disk.write_all_at(bytes, page * PAGE_BYTES).unwrap();
        }
        // Some file systems choose blocks only then.
        on_disk.sync_all().unwrap();
        [template(), on_disk]
    }

    #[test]
    fn forks_begin_with_the_template_and_change_nothing_but_their_own() {
        let template = template();
        let taken = template.metadata().unwrap().blocks();
        let forks = [1, 2].map(|_| forked(&template, 8 * PAGE_BYTES).unwrap().0);
        for fork in &forks {
            assert_eq!(first_bytes(fork, 8), [1, 0, 3, 4, 0, 0, 0, 0]);
        }
        for page in 0..8 {
            forks[0]
                .write_obj(9u8, GuestAddress(page * PAGE_BYTES))
                .unwrap();
        }
        assert_eq!(first_bytes(&forks[0], 8), [9; 8]);
        assert_eq!(first_bytes(&forks[1], 8), [1, 0, 3, 4, 0, 0, 0, 0]);
        let third = forked(&template, 4 * PAGE_BYTES).unwrap().0;
        assert_eq!(first_bytes(&third, 4), [1, 0, 3, 4]);
        assert_eq!(
            template.metadata().unwrap().blocks(),
            taken,
            "holes stay holes"
        );
    }

    #[test]
    fn what_a_fork_gives_back_is_the_templates_again() {
        let template = template();
        let (fork, _) = forked(&template, 8 * PAGE_BYTES).unwrap();
        for page in 0..8 {
            fork.write_obj(9u8, GuestAddress(page * PAGE_BYTES))
                .unwrap();
        }
        assert_eq!(
            release(&fork, PAGE_BYTES, 4 * PAGE_BYTES).unwrap(),
            4 * PAGE_BYTES
        );
        assert_eq!(first_bytes(&fork, 8), [9, 0, 3, 4, 0, 9, 9, 9]);
        assert!(release(&fork, 7 * PAGE_BYTES, 2 * PAGE_BYTES).is_err());
    }

    #[test]
    fn a_fork_is_saved_with_the_pages_of_its_template_and_its_own() {
        let template = template();
        let taken = template.metadata().unwrap().blocks();
        let (fork, laid) = forked(&template, 8 * PAGE_BYTES).unwrap();
        fork.write_obj(9u8, GuestAddress(2 * PAGE_BYTES)).unwrap();
        fork.write_obj(8u8, GuestAddress(5 * PAGE_BYTES)).unwrap();
        let own = blocks(&fork);
        let (file, written) = saved(&fork, &laid);
        assert_eq!(written, 4 * PAGE_BYTES);
        assert_eq!(template.metadata().unwrap().blocks(), taken);
        assert_eq!(blocks(&fork), own, "what it never had is not made");
        let again = restored(&file, 8 * PAGE_BYTES).unwrap();
        assert_eq!(first_bytes(&again, 8), [1, 0, 9, 4, 0, 8, 0, 0]);
    }

    #[test]
    fn vms_that_map_a_checkpoint_begin_with_it_and_change_nothing_but_their_own() {
        for file in checkpoints() {
            let (taken, before) = (file.metadata().unwrap().blocks(), content(&file));
            let vms = [1, 2].map(|_| mapped(&file, PAGES * PAGE_BYTES).unwrap().0);
            for vm in &vms {
                let mut bytes = vec![7; before.len()];
                vm.read_slice(&mut bytes, GuestAddress(0)).unwrap();
                assert_eq!(bytes, before);
            }
            let nines = vec![9; before.len()];
            vms[0].write_slice(&nines, GuestAddress(0)).unwrap();
            assert_eq!(first_bytes(&vms[0], PAGES), [9; 4]);
            assert_eq!(first_bytes(&vms[1], PAGES), [1, 0, 3, 4]);
            assert_eq!(content(&file), before);
            let taken_now = file.metadata().unwrap().blocks();
            assert_eq!(taken_now, taken, "holes stay holes");
        }
    }

    #[test]
    fn what_a_vm_gives_back_that_maps_a_checkpoint_is_the_checkpoints_again() {
        for file in checkpoints() {
            let (vm, _) = mapped(&file, PAGES * PAGE_BYTES).unwrap();
            // The file may be closed, and unlinked: it is.
            drop(file);
            for page in 0..PAGES {
                vm.write_obj(9u8, GuestAddress(page * PAGE_BYTES)).unwrap();
            }
            let released = release(&vm, PAGE_BYTES, 2 * PAGE_BYTES).unwrap();
            assert_eq!(released, 2 * PAGE_BYTES);
            assert_eq!(first_bytes(&vm, PAGES), [9, 0, 3, 9]);
        }
    }

    #[test]
    fn a_vm_that_maps_a_checkpoint_is_saved_with_its_pages_and_its_own() {
        const BYTES: u64 = GAP_START + 8 * PAGE_BYTES;
        let first = create(BYTES).unwrap();
        let places = [1, GAP_START - 1, GAP_END, GAP_END + 8 * PAGE_BYTES - 1];
        for (value, at) in (1u8..).zip(places) {
            first.write_obj(value, GuestAddress(at)).unwrap();
        }
        let (checkpoint, _) = saved(&first, &Laid::new());
        let (vm, laid) = mapped(&checkpoint, BYTES).unwrap();
        let hole = 8 << 20;
        let changes = [(9u8, GAP_END), (8, hole)];
        for (value, at) in changes {
            vm.write_obj(value, GuestAddress(at)).unwrap();
        }
        let own = blocks(&vm);
        let (file, written) = saved(&vm, &laid);
        assert_eq!(written, 5 * PAGE_BYTES);
        assert_eq!(blocks(&vm), own, "what it never had is not made");

        let again = restored(&file, BYTES).unwrap();
        let byte = |memory: &Memory, at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        let at_places = |memory: &Memory| places.map(|at| byte(memory, at));
        assert_eq!(at_places(&again), [1, 2, 9, 4]);
        assert_eq!(byte(&again, hole), 8);
        let unchanged = restored(&checkpoint, BYTES).unwrap();
        assert_eq!(at_places(&unchanged), [1, 2, 3, 4]);
        assert_eq!(byte(&unchanged, hole), 0);
    }

    const KIB: u64 = 1 << 10;
    /// Starts and ends, in KiB.
    type Ranges<'a> = &'a [(u64, u64)];

    #[test]
    fn parts_are_whole_pages_that_neither_overlap_nor_touch() {
        let table: [(&str, Ranges<'_>, Ranges<'_>); 8] = [
            ("no data", &[], &[]),
            ("whole pages", &[(4, 8), (12, 20)], &[(4, 8), (12, 20)]),
            ("outwards", &[(1, 2), (9, 15)], &[(0, 4), (8, 16)]),
            ("touch after that", &[(0, 1), (6, 7)], &[(0, 8)]),
            ("overlap after that", &[(3, 5), (7, 9)], &[(0, 12)]),
            ("all in one page", &[(0, 1), (2, 3)], &[(0, 4)]),
            ("a page between", &[(3, 4), (8, 9)], &[(0, 4), (8, 12)]),
            ("all of it", &[(0, 1 << 30)], &[(0, 1 << 30)]),
        ];
        let bytes = |ranges: Ranges<'_>| {
            let ranges = ranges.iter().map(|&(start, end)| start * KIB..end * KIB);
            ranges.collect::<Vec<_>>()
        };
        for (case, data, expected) in table {
            assert_eq!(parts(bytes(data), MOST_PARTS), bytes(expected), "{case}");
        }
    }

    #[test]
    fn for_all_files_of_small_blocks_parts_are_the_pages_with_data_or_few() {
        const BLOCKS: u64 = 16;
        for file in 0_u32..1 << BLOCKS {
            let has = |block: u64| file >> block & 1 == 1;
            let data = (0..BLOCKS).filter(|&block| has(block));
            let data: Vec<_> = data.map(|at| at * KIB..(at + 1) * KIB).collect();
            let page_has = |page: u64| (4 * page..4 * page + 4).any(has);
            for most in 1..4 {
                let parts = parts(data.clone(), most);
                assert!(parts.len() <= most, "{file:b} {parts:?}");
                let apart = parts.windows(2).all(|two| two[0].end < two[1].start);
                assert!(apart, "{file:b} {parts:?}");
                for page in 0..BLOCKS / 4 {
                    let is_in = parts.iter().any(|part| part.contains(&(page * PAGE_BYTES)));
                    assert!(is_in || !page_has(page), "{file:b} {parts:?}");
                    // Four pages are never more than two parts.
                    assert!(most == 1 || is_in == page_has(page), "{file:b} {parts:?}");
                }
            }
        }
    }

    #[test]
    fn small_holes_are_covered_before_large_ones() {
        let page = |page: u64| page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
        let data = [0, 2, 10, 13, 100].map(page).to_vec();
        let covered = |most| {
            let parts = parts(data.clone(), most).into_iter();
            let pages = parts.map(|part| (part.start / PAGE_BYTES, part.end / PAGE_BYTES));
            pages.collect::<Vec<_>>()
        };
        let each = [(0, 1), (2, 3), (10, 11), (13, 14), (100, 101)];
        assert_eq!(covered(5), each);
        assert_eq!(covered(4), [(0, 3), (10, 11), (13, 14), (100, 101)]);
        assert_eq!(covered(3), [(0, 3), (10, 14), (100, 101)]);
        assert_eq!(covered(2), [(0, 14), (100, 101)]);
        assert_eq!(covered(1), [(0, 101)]);
    }
}
