// SPDX-License-Identifier: Apache-2.0
//! Extended attributes as they are stored after an inode: a header, then the entries. In an entry a number replaces the
//! prefix of the name. Pure.

use std::collections::BTreeMap;

const HEADER_BYTES: usize = 12;
const ENTRY_BYTES: usize = 4;

/// The prefixes of names, with the number that stands for each on disk.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
    (b"user.", 1),
];

type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Whether EROFS can store this extended attribute.
pub fn is_storable(name: &[u8], value: &[u8]) -> bool {
    u16::try_from(value.len()).is_ok()
        && split(name).is_some_and(|(_, rest)| u8::try_from(rest.len()).is_ok())
}

/// Splits a name into the number of its prefix and the rest.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES
        .iter()
        .find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))
}

/// How many bytes these attributes take after the inode.
pub fn bytes(xattrs: &Xattrs) -> usize {
    let entries = xattrs.iter().map(|(name, value)| {
        let rest = split(name).map_or(0, |(_, rest)| rest.len());
        (ENTRY_BYTES + rest + value.len()).next_multiple_of(4)
    });
    match entries.sum() {
        0 => 0,
        bytes => HEADER_BYTES + bytes,
    }
}

/// The inode's field for the size of its attributes: in words of 4 bytes, where the header counts as one.
pub fn count(bytes: usize) -> usize {
    match bytes {
        0 => 0,
        bytes => (bytes - HEADER_BYTES) / 4 + 1,
    }
}

/// Appends the attributes to the inode in `bytes`. All of them must have passed [`is_storable`].
pub fn append(bytes: &mut Vec<u8>, xattrs: &Xattrs) {
    if !xattrs.is_empty() {
        bytes.extend([0; HEADER_BYTES]);
    }
    for (name, value) in xattrs {
        append_one(bytes, name, value);
    }
}

fn append_one(bytes: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let Some((index, rest)) = split(name) else {
        return;
    };
    bytes.push(u8::try_from(rest.len()).unwrap_or(0));
    bytes.push(index);
    bytes.extend(u16::try_from(value.len()).unwrap_or(0).to_le_bytes());
    bytes.extend_from_slice(rest);
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}
