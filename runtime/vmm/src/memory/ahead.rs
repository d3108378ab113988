// SPDX-License-Identifier: Apache-2.0
//! Maps pages of a fork before its guest runs, on the main thread. Otherwise the guest's first access to each is a VM exit, and
//! another one if it reads the page before it writes to it. The guest does not notice.
//!
//! Which pages these are, another fork has shown: [`Foreseen`]. Nothing here is necessary: after an error, exits do the rest.

use std::io;

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{Laid, Memory};
use crate::foreseen::{Foreseen, PAGE_BYTES, Run};
use crate::sys::{self, Singly};

/// How often KVM may say, one time after the other, that it was interrupted.
const TRIES: u32 = 100;

/// Gives a fork its own copies of the pages that it will write to, and pages where its template has none.
pub fn copy(memory: &Memory, foreseen: &Foreseen) -> io::Result<()> {
    for run in &foreseen.written {
        for (region, start, len) in parts(memory, *run) {
            sys::populate(region, start, len)?;
        }
    }
    Ok(())
}

/// Maps pages for all vCPUs: those that are copied for writing, too. Does nothing if the host's KVM cannot do that. Call it
/// when the vCPU has its state, because the mappings of a vCPU that gets other features are dropped.
pub fn map(memory: &Memory, foreseen: &Foreseen, vm: &VmFd, vcpu: &VcpuFd) -> io::Result<()> {
    if vm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
        return Ok(());
    }
    for run in foreseen.written.iter().chain(&foreseen.read) {
        for (region, start, len) in parts(memory, *run) {
            map_part(vcpu, region.start_addr().0.saturating_add(start), len)?;
        }
    }
    Ok(())
}

fn map_part(vcpu: &VcpuFd, start: u64, len: u64) -> io::Result<()> {
    let (mut left, mut tries) = (len, TRIES);
    while left > 0 {
        let from = start.saturating_add(len - left);
        match sys::map_for_guest(vcpu, from, left) {
            Ok(rest) if rest < left => (left, tries) = (rest, TRIES),
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
            Err(e) => match e.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock if tries > 0 => tries -= 1,
                _ => return Err(e),
            },
        }
    }
    Ok(())
}

/// Lets the host's page tables tell exactly which pages of the template this fork touches, as long as the result is there.
pub fn show(memory: &Memory, laid: &Laid) -> io::Result<Singly> {
    let singly = Singly::new()?;
    // Parts of a template are huge pages, as its boot left them.
    memory.iter().for_each(sys::avoid_huge_pages);
    for part in laid {
        let run = Run {
            first: part.start / PAGE_BYTES,
            count: (part.end - part.start) / PAGE_BYTES,
        };
        for (region, start, len) in parts(memory, run) {
            singly.add(region, start, len)?;
        }
    }
    Ok(singly)
}

/// Where pages are: in which regions, from which byte on and how many bytes.
fn parts(memory: &Memory, run: Run) -> impl Iterator<Item = (&GuestRegionMmap<()>, u64, u64)> {
    let start = run.first.saturating_mul(PAGE_BYTES);
    let end = start.saturating_add(run.count.saturating_mul(PAGE_BYTES));
    let mut first = 0_u64;
    memory.iter().filter_map(move |region| {
        let (from, to) = (first, first.saturating_add(region.len()));
        first = to;
        let (start, end) = (start.max(from), end.min(to));
        (start < end).then(|| (region, start - from, end - start))
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::foreseen::runs;
    use crate::guest::{Guest, enter_until_halted};
    use crate::memory::tests::{first_bytes, template};
    use crate::memory::{GAP_END, GAP_START, create, forked};
    use crate::statistics::KvmExits;

    /// What the host has mapped of the first pages: `.` nothing, `f` a page of a file, `c` a copy.
    fn mapped(memory: &Memory, pages: u64) -> String {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let region = memory.iter().next().unwrap();
        let first = region.as_ptr() as u64 / PAGE_BYTES;
        let look = |page| {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, page * 8).unwrap();
            let entry = u64::from_le_bytes(entry);
            match (entry >> 63, entry >> 61 & 1) {
                (0, _) => '.',
                (_, 1) => 'f',
                _ => 'c',
            }
        };
        (first..first + pages).map(look).collect()
    }

    fn written(pages: impl IntoIterator<Item = u64>) -> Foreseen {
        Foreseen {
            written: runs(pages),
            read: Vec::new(),
        }
    }

    #[test]
    fn what_is_foreseen_is_copied_and_neither_the_template_nor_the_content_changes() {
        let template = template();
        let taken = template.metadata().unwrap().blocks();
        let (fork, _) = forked(&template, 8 * PAGE_BYTES).unwrap();
        assert_eq!(mapped(&fork, 8), "........");
        copy(&fork, &written([0, 1, 3])).unwrap();
        assert_eq!(mapped(&fork, 8), "cf.c....");
        assert_eq!(first_bytes(&fork, 8), [1, 0, 3, 4, 0, 0, 0, 0]);
        fork.write_obj(9u8, GuestAddress(3 * PAGE_BYTES)).unwrap();
        let other = forked(&template, 8 * PAGE_BYTES).unwrap().0;
        assert_eq!(first_bytes(&other, 8), [1, 0, 3, 4, 0, 0, 0, 0]);
        assert_eq!(template.metadata().unwrap().blocks(), taken);
    }

    #[test]
    fn a_fork_that_is_shown_maps_only_the_page_that_it_reads() {
        let template = template();
        let (fork, laid) = forked(&template, 8 * PAGE_BYTES).unwrap();
        let shown = show(&fork, &laid).unwrap();
        fork.read_obj::<u8>(GuestAddress(2 * PAGE_BYTES)).unwrap();
        assert_eq!(mapped(&fork, 8), "..f.....");
        fork.write_obj(9u8, GuestAddress(3 * PAGE_BYTES)).unwrap();
        assert_eq!(mapped(&fork, 8), "..fc....");
        drop(shown);
        assert_eq!(first_bytes(&fork, 8), [1, 0, 3, 9, 0, 0, 0, 0]);
    }

    #[test]
    fn pages_are_on_both_sides_of_the_gap_and_nowhere_else() {
        let memory = create(GAP_START + 4 * PAGE_BYTES).unwrap();
        let below = GAP_START / PAGE_BYTES;
        let found = |first, count| {
            let parts = parts(&memory, Run { first, count });
            let parts = parts.map(|(region, start, len)| (region.start_addr().0 + start, len));
            parts.collect::<Vec<_>>()
        };
        assert_eq!(found(1, 2), [(PAGE_BYTES, 2 * PAGE_BYTES)]);
        assert_eq!(
            found(below - 1, 2),
            [(GAP_START - PAGE_BYTES, PAGE_BYTES), (GAP_END, PAGE_BYTES)]
        );
        assert_eq!(
            found(below + 3, 1),
            [(GAP_END + 3 * PAGE_BYTES, PAGE_BYTES)]
        );
        assert_eq!(found(below + 4, 1), []);
        assert_eq!(found(u64::MAX, u64::MAX), []);
    }

    /// Writes to 64 pages from 1 MiB on.
    #[rustfmt::skip]
    const WRITES: [u8; 0x17] = [
        0xbf, 0x00, 0x00, 0x10, 0x00, // mov edi,0x100000
        0xb9, 0x40, 0x00, 0x00, 0x00, // mov ecx,0x40
        // next:
        0x88, 0x07, // mov [rdi],al
        0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi,0x1000
        0xff, 0xc9, // dec ecx
        0x75, 0xf4, // jnz next
        0xf4, // hlt
    ];

    #[test]
    #[ignore = "needs KVM: scripts/test runs it on a KVM host"]
    fn a_guest_does_not_leave_for_pages_that_are_mapped_ahead() {
        let exits = |foreseen: &Foreseen| {
            let mut guest = Guest::new(1, &WRITES);
            let vcpu = guest.vcpus.remove(0);
            copy(&guest.memory, foreseen).unwrap();
            map(&guest.memory, foreseen, &guest.vm, &vcpu).unwrap();
            let counted = sys::statistics_file(&vcpu).ok().and_then(KvmExits::find);
            let _vcpu = enter_until_halted(vcpu);
            let can = guest
                .vm
                .check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into())
                > 0;
            (can, KvmExits::sum(&[counted.unwrap()]).unwrap())
        };
        let (_, each) = exits(&Foreseen::default());
        let (can, few) = exits(&written(256..256 + 64));
        assert!(each >= 64, "{each}");
        match can {
            true => assert!(few < 32, "{few} of {each}"),
            false => println!("not tested: this host's KVM cannot map ahead (Linux 6.10)"),
        }
    }
}
