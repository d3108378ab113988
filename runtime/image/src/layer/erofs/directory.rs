// SPDX-License-Identifier: Apache-2.0
//! The entries of a directory: their order on disk and their distribution over blocks. Pure.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::layer::blocks::BLOCK_BYTES;
use crate::layer::node::NodeId;

pub const DIRENT_BYTES: usize = 12;

/// What an entry refers to.
pub enum Entry {
    Itself,
    Parent,
    Child(NodeId),
}

/// All entries of a directory, including `.` and `..`, ordered by the bytes of their names.
pub fn entries(children: &BTreeMap<Box<[u8]>, NodeId>) -> impl Iterator<Item = (&[u8], Entry)> {
    let names = |range: (Bound<&[u8]>, Bound<&[u8]>)| {
        let named = children.range::<[u8], _>(range);
        named.map(|(name, id)| (&**name, Entry::Child(*id)))
    };
    let (itself, parent) = (&b"."[..], &b".."[..]);
    let before = names((Bound::Unbounded, Bound::Excluded(itself)));
    let between = names((Bound::Excluded(itself), Bound::Excluded(parent)));
    let after = names((Bound::Excluded(parent), Bound::Unbounded));
    before
        .chain([(itself, Entry::Itself)])
        .chain(between)
        .chain([(parent, Entry::Parent)])
        .chain(after)
}

/// The entries of each block, block by block. Each entry is drawn once: a directory may have millions of them.
pub fn in_blocks<'a>(
    entries: impl Iterator<Item = (&'a [u8], Entry)>,
) -> impl Iterator<Item = Vec<(&'a [u8], Entry)>> {
    let mut entries = entries.peekable();
    std::iter::from_fn(move || {
        let mut block = Vec::new();
        let mut used = 0;
        while let Some(entry) = entries.next_if(|(name, _)| used + bytes(name) <= BLOCK_BYTES) {
            used += bytes(entry.0);
            block.push(entry);
        }
        (!block.is_empty()).then_some(block)
    })
}

/// How many bytes a directory has before its last block, and how many of that are used.
pub fn measure(children: &BTreeMap<Box<[u8]>, NodeId>) -> (u64, usize) {
    let mut before = 0;
    let mut blocks = in_blocks(entries(children)).peekable();
    while let Some(block) = blocks.next() {
        if blocks.peek().is_none() {
            return (before, block.iter().map(|(name, _)| bytes(name)).sum());
        }
        before += BLOCK_BYTES as u64;
    }
    (before, 0)
}

/// What an entry takes.
fn bytes(name: &[u8]) -> usize {
    DIRENT_BYTES + name.len()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Issue 13, point 6: to find the entries of a block, all entries before it were passed again.
    #[test]
    fn a_large_directory_is_read_once_to_write_all_its_blocks() {
        let names = (0..100_000).map(|number| format!("{number:06}").into_bytes().into());
        let children: BTreeMap<_, _> = names.map(|name| (name, NodeId::ROOT)).collect();
        let drawn = Cell::new(0);
        let counted = entries(&children).inspect(|_| drawn.set(drawn.get() + 1));
        let mut seen = 0;
        for block in in_blocks(counted) {
            seen += block.len();
            // At most one more was looked at.
            assert!(drawn.get() <= seen + 1);
        }
        assert_eq!((seen, drawn.get()), (100_002, 100_002));
        let (before, last) = measure(&children);
        let per_block = BLOCK_BYTES / (DIRENT_BYTES + 6);
        let blocks = 100_002usize.div_ceil(per_block);
        assert_eq!(before, ((blocks - 1) * BLOCK_BYTES) as u64);
        assert!((1..=BLOCK_BYTES).contains(&last));
    }
}
