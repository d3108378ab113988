// SPDX-License-Identifier: Apache-2.0
//! A window: a disk made of extents, each backed by its own file. Pure: no I/O.

use crate::extent::{Extent, SECTOR_BYTES};

/// Extents begin at multiples of this, so that they are aligned to the guest's pages of 4 KiB.
pub const EXTENT_ALIGN: u64 = 4096;
/// More extents than any set of images has layers.
pub const MAX_EXTENTS: usize = 4096;

/// Why an extent cannot be appended.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WindowError {
    #[error("extent is empty")]
    Empty,
    #[error("extent of {0} bytes is too large")]
    TooLarge(u64),
    #[error("window has {MAX_EXTENTS} extents already")]
    Full,
}

/// A part of one file.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'w, F> {
    pub file: &'w F,
    /// Where in the file, in bytes.
    pub offset: u64,
    pub len: u64,
}

/// A file, and the bytes of the disk that it backs.
#[derive(Debug)]
struct Backing<F> {
    file: F,
    start: u64,
    end: u64,
}

impl<F> Backing<F> {
    fn extent(&self) -> Extent {
        Extent {
            first_sector: self.start / SECTOR_BYTES,
            sectors: self.end.saturating_sub(self.start) / SECTOR_BYTES,
        }
    }
}

/// Files in the order in which they were appended. Removed ones leave gaps.
#[derive(Debug)]
pub struct Window<F> {
    backings: Vec<Backing<F>>,
}

impl<F> Default for Window<F> {
    fn default() -> Self {
        Self {
            backings: Vec::new(),
        }
    }
}

impl<F> Window<F> {
    /// The size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.backings.last().map_or(0, |backing| backing.end)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backings.is_empty()
    }

    /// Adds `bytes` of `file` at the end, rounded up to [`EXTENT_ALIGN`].
    pub fn append(&mut self, file: F, bytes: u64) -> Result<Extent, WindowError> {
        if bytes == 0 {
            return Err(WindowError::Empty);
        }
        if self.backings.len() >= MAX_EXTENTS {
            return Err(WindowError::Full);
        }
        let start = self.len();
        let rounded = bytes.checked_next_multiple_of(EXTENT_ALIGN);
        // The kernel takes file offsets as signed numbers.
        let end = rounded
            .and_then(|r| start.checked_add(r))
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or(WindowError::TooLarge(bytes))?;
        let backing = Backing { file, start, end };
        let extent = backing.extent();
        self.backings.push(backing);
        Ok(extent)
    }

    /// Takes out the extent at `first_sector`. It leaves a gap, unless it was the last one.
    pub fn remove(&mut self, first_sector: u64) -> Option<F> {
        let start = first_sector.checked_mul(SECTOR_BYTES)?;
        let at = self
            .backings
            .binary_search_by_key(&start, |backing| backing.start);
        Some(self.backings.remove(at.ok()?).file)
    }

    /// The extent of the first file for which `is_right` holds.
    pub fn find(&self, is_right: impl Fn(&F) -> bool) -> Option<Extent> {
        let mut backings = self.backings.iter();
        Some(backings.find(|one| is_right(&one.file))?.extent())
    }

    pub fn files(&self) -> impl Iterator<Item = &F> {
        self.backings.iter().map(|backing| &backing.file)
    }

    /// The pieces that back `[start, start + len)`, in order. A part that no file backs is left out.
    pub fn pieces(&self, start: u64, len: u64) -> impl Iterator<Item = Piece<'_, F>> {
        let end = start.saturating_add(len);
        let first = self
            .backings
            .partition_point(|backing| backing.end <= start);
        self.backings
            .get(first..)
            .unwrap_or(&[])
            .iter()
            .take_while(move |backing| backing.start < end)
            .map(move |backing| {
                let from = start.max(backing.start);
                Piece {
                    file: &backing.file,
                    offset: from.saturating_sub(backing.start),
                    len: end.min(backing.end).saturating_sub(from),
                }
            })
            .filter(|piece| piece.len > 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_map_to_pieces() {
        let mut window = Window::default();
        assert_eq!(window.pieces(0, 100).count(), 0);
        let extent = window.append('a', 5000).unwrap();
        assert_eq!((extent.first_sector, extent.sectors), (0, 16));
        let extent = window.append('b', 4096).unwrap();
        assert_eq!((extent.first_sector, extent.sectors), (16, 8));
        let extent = window.append('c', 1).unwrap();
        assert_eq!((extent.first_sector, extent.sectors), (24, 8));
        assert_eq!(window.len(), 16384);

        type Case = (u64, u64, &'static [(char, u64, u64)]);
        let cases: [Case; 8] = [
            (0, 512, &[('a', 0, 512)]),
            (4096, 4096, &[('a', 4096, 4096)]),
            (8192, 512, &[('b', 0, 512)]),
            (7680, 1024, &[('a', 7680, 512), ('b', 0, 512)]),
            (0, 16384, &[('a', 0, 8192), ('b', 0, 4096), ('c', 0, 4096)]),
            (15872, 4096, &[('c', 3584, 512)]),
            (16384, 512, &[]),
            (u64::MAX, 512, &[]),
        ];
        for (start, len, expected) in cases {
            let pieces: Vec<_> = window.pieces(start, len).collect();
            let pieces: Vec<_> = pieces.iter().map(|p| (*p.file, p.offset, p.len)).collect();
            assert_eq!(pieces, expected, "{start} {len}");
        }
    }

    #[test]
    fn what_was_removed_is_a_gap() {
        let mut window = Window::default();
        for name in ['a', 'b', 'c'] {
            window.append(name, 4096).unwrap();
        }
        assert_eq!(window.remove(8), Some('b'));
        assert_eq!((window.remove(8), window.remove(1)), (None, None));
        assert_eq!(window.remove(u64::MAX), None);
        assert_eq!(window.len(), 12288);
        let pieces: Vec<_> = window.pieces(0, 12288).map(|p| (*p.file, p.len)).collect();
        assert_eq!(pieces, [('a', 4096), ('c', 4096)]);
        assert_eq!(window.pieces(4096, 4096).count(), 0);
        assert_eq!(window.remove(16), Some('c'));
        assert_eq!(window.append('d', 1).unwrap().first_sector, 8);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let mut window = Window::default();
        assert_eq!(window.append((), 0), Err(WindowError::Empty));
        for bytes in [u64::MAX, 1 << 63] {
            assert_eq!(window.append((), bytes), Err(WindowError::TooLarge(bytes)));
        }
        for _ in 0..MAX_EXTENTS {
            window.append((), 1).unwrap();
        }
        assert_eq!(window.append((), 1), Err(WindowError::Full));
    }

    proptest! {
        #[test]
        #[allow(clippy::arithmetic_side_effects)]
        fn for_all_windows_pieces_cover_what_is_backed_once_and_in_order(
            sizes in proptest::collection::vec(1u64..20_000, 0..12),
            removed in proptest::collection::vec(0u64..200, 0..6),
            start in prop_oneof![0u64..200_000, any::<u64>()],
            len in prop_oneof![0u64..200_000, any::<u64>()],
        ) {
            let mut window = Window::default();
            let mut backed = Vec::new();
            for (file, &bytes) in sizes.iter().enumerate() {
                let extent = window.append(file, bytes).unwrap();
                let first = extent.first_sector * SECTOR_BYTES;
                backed.push((file, first, first + extent.sectors * SECTOR_BYTES));
            }
            for page in removed {
                let gone = window.remove(page * EXTENT_ALIGN / SECTOR_BYTES);
                backed.retain(|&(file, ..)| Some(file) != gone);
            }
            let end = start.saturating_add(len);
            let expected: Vec<_> = backed
                .iter()
                .map(|&(file, from, to)| (file, from, from.max(start), to.min(end)))
                .filter(|&(_, _, from, to)| from < to)
                .map(|(file, first, from, to)| (file, from - first, to - from))
                .collect();
            let pieces: Vec<_> = window
                .pieces(start, len)
                .map(|piece| (*piece.file, piece.offset, piece.len))
                .collect();
            prop_assert_eq!(pieces, expected);
        }
    }
}
