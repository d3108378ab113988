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

/// Returns how many entries are in each block, and how many bytes of the last block are used.
pub fn split_entries(children: &BTreeMap<Box<[u8]>, NodeId>) -> (Vec<usize>, usize) {
    let mut split = vec![0];
    let mut used = 0;
    for (name, _) in entries(children) {
        let bytes = DIRENT_BYTES + name.len();
        if used + bytes > BLOCK_BYTES {
            split.push(0);
            used = 0;
        }
        used += bytes;
        if let Some(count) = split.last_mut() {
            *count += 1;
        }
    }
    (split, used)
}
