// SPDX-License-Identifier: Apache-2.0
//! Which pages of its template's memory a fork has used, as the page tables of its VMM say.
//!
//! A page that is present where the template is mapped was read; if it is not the file's, it was written to and copied. A page
//! that is present in memory of the fork's own, where the template has a hole, was made at its first use.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use bulkhead_vmm::foreseen::{Foreseen, PAGE_BYTES, runs};
use bulkhead_vmm::memory;

/// The mappings of a VMM take less. More is not read.
const MAPS_BYTES: u64 = 16 << 20;
const ENTRY_BYTES: usize = 8;
/// So much of the page tables is read at once.
const ENTRIES: u64 = 8192;
/// Bits of an entry, see Linux's `admin-guide/mm/pagemap.rst`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE_OR_SHARED: u64 = 1 << 61;

/// A file as `/proc/PID/maps` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub major: u32,
    pub minor: u32,
    pub inode: u64,
}

/// A mapping of a template, or of the memory beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    /// The numbers of its first page and of the page behind it, in the process and in the file.
    first: u64,
    end: u64,
    offset: u64,
    is_template: bool,
}

/// What process `pid` has used of its template, which has so many pages.
pub(super) fn used(pid: i32, template: Identity, pages: u64) -> io::Result<Foreseen> {
    let mut maps = String::new();
    let file = File::open(format!("/proc/{pid}/maps"))?;
    file.take(MAPS_BYTES).read_to_string(&mut maps)?;
    let own = format!("/memfd:{} (deleted)", memory::FILE_NAME);
    let page_tables = File::open(format!("/proc/{pid}/pagemap"))?;
    let (mut written, mut read) = (Vec::new(), Vec::new());
    for mapping in maps
        .lines()
        .filter_map(|line| mapping(line, template, &own))
    {
        look(&page_tables, &mapping, pages, |page, entry| {
            let is_copy = entry & OF_FILE_OR_SHARED == 0;
            match (mapping.is_template && !is_copy, entry & PRESENT != 0) {
                (true, true) => read.push(page),
                (true, false) => {}
                (false, _) => written.push(page),
            }
        })?;
    }
    let ordered = |mut pages: Vec<u64>| {
        pages.sort_unstable();
        pages.dedup();
        runs(pages)
    };
    Ok(Foreseen {
        written: ordered(written),
        read: ordered(read),
    })
}

/// Tells of each page that has content: its place in the file, and its entry in the page tables.
fn look(
    page_tables: &File,
    mapping: &Mapping,
    pages: u64,
    mut tell: impl FnMut(u64, u64),
) -> io::Result<()> {
    let count = mapping.end.saturating_sub(mapping.first);
    let count = count.min(pages.saturating_sub(mapping.offset));
    let mut at = 0;
    while at < count {
        let some = (count - at).min(ENTRIES);
        let mut entries = vec![0; usize::try_from(some).unwrap_or(0) * ENTRY_BYTES];
        let place = (mapping.first + at).saturating_mul(ENTRY_BYTES as u64);
        page_tables.read_exact_at(&mut entries, place)?;
        for (page, entry) in (mapping.offset + at..).zip(entries.as_chunks().0) {
            let entry = u64::from_ne_bytes(*entry);
            if entry & (PRESENT | SWAPPED) != 0 {
                tell(page, entry);
            }
        }
        at += some;
    }
    Ok(())
}

/// Parses a line of `/proc/PID/maps`: `FIRST-END PERMISSIONS OFFSET MAJOR:MINOR INODE NAME`. `None` if it is another mapping.
fn mapping(line: &str, template: Identity, own: &str) -> Option<Mapping> {
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut words = line.splitn(6, ' ');
    let (first, end) = words.next()?.split_once('-')?;
    let mut words = words.skip(1);
    let offset = hexadecimal(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let file = Identity {
        major: hexadecimal(major)?.try_into().ok()?,
        minor: hexadecimal(minor)?.try_into().ok()?,
        inode: words.next()?.parse().ok()?,
    };
    let is_template = file == template;
    (is_template || words.next()?.trim_start() == own).then_some(Mapping {
        first: hexadecimal(first)? / PAGE_BYTES,
        end: hexadecimal(end)? / PAGE_BYTES,
        offset: offset / PAGE_BYTES,
        is_template,
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm::foreseen::Run;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::anonymous;
    use super::*;

    const TEMPLATE: Identity = Identity {
        major: 0,
        minor: 1,
        inode: 42,
    };
    const OWN: &str = "/memfd:guest-memory (deleted)";

    #[test]
    fn the_mappings_of_a_template_and_of_the_memory_beside_it_are_found() {
        let found = |line: &str| {
            let found = mapping(line, TEMPLATE, OWN)?;
            Some((found.first, found.end, found.offset, found.is_template))
        };
        let template = "7f0000200000-7f0000300000 rw-p 00001000 00:01 42      /memfd:template-memory (deleted)";
        assert_eq!(
            found(template),
            Some((0x7_f000_0200, 0x7_f000_0300, 1, true))
        );
        let own =
            "7f0000300000-7f0000400000 rw-s 00100000 00:01 43      /memfd:guest-memory (deleted)";
        assert_eq!(
            found(own),
            Some((0x7_f000_0300, 0x7_f000_0400, 0x100, false))
        );
        for other in [
            "",
            "7f0000300000-7f0000400000 rw-s 00100000 00:01 43      /memfd:device-memory (deleted)",
            "7f0000300000-7f0000400000 rw-p 00000000 00:00 0 ",
            "7f0000300000-7f0000400000 rw-p 00000000 00:00 0",
            "7f0000300000-7f0000400000 rw-s 00100000 00:01 x       /memfd:guest-memory (deleted)",
            "7f0000300000 rw-s 00100000 00:01 43                   /memfd:guest-memory (deleted)",
        ] {
            assert_eq!(found(other), None, "{other}");
        }
    }

    fn pages(first: u64, count: u64) -> Run {
        Run { first, count }
    }

    #[test]
    fn what_this_process_has_read_and_written_of_a_template_is_found() {
        const PAGES: u64 = 64;
        let template = anonymous("template-memory").unwrap();
        let identity = super::super::identity(&template).unwrap();
        let template = File::from(template);
        template.set_len(PAGES * PAGE_BYTES).unwrap();
        // A hole in the middle.
        for half in [0, 48] {
            let bytes = vec![1; 16 * usize::try_from(PAGE_BYTES).unwrap()];
            template.write_all_at(&bytes, half * PAGE_BYTES).unwrap();
        }
        let (fork, laid) = memory::forked(&template, 2 * PAGES * PAGE_BYTES).unwrap();
        let _shown = memory::ahead::show(&fork, &laid).unwrap();
        let look = || {
            let pid = std::process::id().cast_signed();
            used(pid, identity, PAGES).unwrap()
        };
        assert_eq!(look(), Foreseen::default());
        for page in [1, 2, 50] {
            fork.read_obj::<u8>(GuestAddress(page * PAGE_BYTES))
                .unwrap();
        }
        for page in [2, 3, 30, 31, 63, 64, 127] {
            fork.write_obj(7_u8, GuestAddress(page * PAGE_BYTES))
                .unwrap();
        }
        let expected = Foreseen {
            written: vec![pages(2, 2), pages(30, 2), pages(63, 1)],
            read: vec![pages(1, 1), pages(50, 1)],
        };
        assert_eq!(look(), expected);
    }
}
