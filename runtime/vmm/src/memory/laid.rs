// SPDX-License-Identifier: Apache-2.0
//! Memory that begins with the pages of a file: a fork's, with those of its template. On the main thread, before there are
//! others.
//!
//! Only where the file has data is it mapped, privately, over a file of the VM's own: a page is copied when the VM first
//! writes to it. A page of a hole that is read through a mapping would be made in the template's file.

use std::fs::File;
use std::io;
use std::ops::Range;

use vm_memory::GuestMemoryBackend;

use super::{Memory, MemoryError, create, ranges};
use crate::{sparse, sys};

/// The parts of memory that are mapped from a template, by their places in the file of [`super::save`].
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

/// Lays the data of a file over the first `bytes` of memory that nothing has used yet.
fn lay(memory: &Memory, file: &File, bytes: u64) -> io::Result<Laid> {
    let (mut laid, mut first) = (Laid::new(), 0);
    // Few of its pages are touched.
    memory.iter().for_each(sys::avoid_huge_pages);
    for ((_, len), region) in ranges(bytes).into_iter().zip(memory.iter()) {
        let mut at = first;
        while let Some(data) = sparse::next_data(file, at..first + len)? {
            let length = data.end - data.start;
            sys::lay_over(region, data.start - first, length, file, data.start)?;
            at = data.end;
            laid.push(data);
        }
        first += len;
    }
    Ok(laid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::foreseen::PAGE_BYTES;
    use crate::memory::tests::{blocks, first_bytes, saved, template};
    use crate::memory::{release, restored};

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
}
