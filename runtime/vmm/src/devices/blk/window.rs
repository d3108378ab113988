// SPDX-License-Identifier: Apache-2.0
//! A window: one run of disk bytes made of many extents, each backed by something of its own.
//! Pure: no I/O.

/// Extents begin at multiples of this, so that a guest with 4 KiB pages can map them.
pub const EXTENT_ALIGN: u64 = 4096;
const SECTOR_BYTES: u64 = 512;
/// More extents than any set of images has layers.
pub const MAX_EXTENTS: usize = 4096;

/// An extent that cannot be appended.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WindowError {
    #[error("extent is empty")]
    Empty,
    #[error("extent of {0} bytes is too large")]
    TooLarge(u64),
    #[error("window has {MAX_EXTENTS} extents already")]
    Full,
}

/// Where an extent ended up, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub first_sector: u64,
    pub sectors: u64,
}

/// A part of one extent.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'w, F> {
    pub file: &'w F,
    /// Where in the extent.
    pub offset: u64,
    pub len: u64,
}

#[derive(Debug)]
struct Extent<F> {
    file: F,
    start: u64,
    end: u64,
}

/// Extents in the order in which they were appended; there are gaps where some were removed.
#[derive(Debug)]
pub struct Window<F> {
    extents: Vec<Extent<F>>,
}

impl<F> Default for Window<F> {
    fn default() -> Self {
        Self {
            extents: Vec::new(),
        }
    }
}

impl<F> Window<F> {
    /// The size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.extents.last().map_or(0, |extent| extent.end)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Adds `bytes` of `file`, rounded up, at the end.
    pub fn append(&mut self, file: F, bytes: u64) -> Result<Placed, WindowError> {
        if bytes == 0 {
            return Err(WindowError::Empty);
        }
        if self.extents.len() >= MAX_EXTENTS {
            return Err(WindowError::Full);
        }
        let start = self.len();
        let rounded = bytes.checked_next_multiple_of(EXTENT_ALIGN);
        // Offsets are signed to the kernel.
        let end = rounded
            .and_then(|r| start.checked_add(r))
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or(WindowError::TooLarge(bytes))?;
        self.extents.push(Extent { file, start, end });
        Ok(Placed {
            first_sector: start / SECTOR_BYTES,
            sectors: end.saturating_sub(start) / SECTOR_BYTES,
        })
    }

    /// Takes out the extent at `first_sector`. Its place stays empty, unless it was the last one.
    pub fn remove(&mut self, first_sector: u64) -> Option<F> {
        let start = first_sector.checked_mul(SECTOR_BYTES)?;
        let at = self
            .extents
            .binary_search_by_key(&start, |extent| extent.start);
        Some(self.extents.remove(at.ok()?).file)
    }

    /// Where the first extent is whose file is the right one.
    pub fn find(&self, is_right: impl Fn(&F) -> bool) -> Option<Placed> {
        let found = self.extents.iter().find(|extent| is_right(&extent.file))?;
        Some(Placed {
            first_sector: found.start / SECTOR_BYTES,
            sectors: found.end.saturating_sub(found.start) / SECTOR_BYTES,
        })
    }

    /// What is behind the extents.
    pub fn files(&self) -> impl Iterator<Item = &F> {
        self.extents.iter().map(|extent| &extent.file)
    }

    /// The pieces that hold `[start, start + len)`, in order; what no extent holds is missing.
    pub fn pieces(&self, start: u64, len: u64) -> impl Iterator<Item = Piece<'_, F>> {
        let end = start.saturating_add(len);
        let first = self.extents.partition_point(|extent| extent.end <= start);
        self.extents
            .get(first..)
            .unwrap_or(&[])
            .iter()
            .take_while(move |extent| extent.start < end)
            .map(move |extent| {
                let from = start.max(extent.start);
                Piece {
                    file: &extent.file,
                    offset: from.saturating_sub(extent.start),
                    len: end.min(extent.end).saturating_sub(from),
                }
            })
            .filter(|piece| piece.len > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_map_to_pieces() {
        let mut window = Window::default();
        assert_eq!(window.pieces(0, 100).count(), 0);
        let placed = window.append('a', 5000).unwrap();
        assert_eq!((placed.first_sector, placed.sectors), (0, 16));
        let placed = window.append('b', 4096).unwrap();
        assert_eq!((placed.first_sector, placed.sectors), (16, 8));
        let placed = window.append('c', 1).unwrap();
        assert_eq!((placed.first_sector, placed.sectors), (24, 8));
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
}
