// SPDX-License-Identifier: Apache-2.0
//! Extended attributes as they stand beside an inode: a header, then the entries, each with the number of its name's
//! prefix. Pure.

use std::collections::BTreeMap;

const HEADER_BYTES: usize = 12;
const ENTRY_BYTES: usize = 4;

/// What a name begins with, and the number that stands for it on disk.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
    (b"user.", 1),
];

type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Whether an extended attribute can be kept.
pub fn is_storable(name: &[u8], value: &[u8]) -> bool {
    u16::try_from(value.len()).is_ok()
        && split(name).is_some_and(|(_, rest)| u8::try_from(rest.len()).is_ok())
}

/// The number of a name's prefix, and the rest of the name.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES
        .iter()
        .find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))
}

/// How many bytes follow the inode of a file with these attributes.
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

/// The number in the inode that says how long they are: in words, the header counting as one.
pub fn count(bytes: usize) -> usize {
    match bytes {
        0 => 0,
        bytes => (bytes - HEADER_BYTES) / 4 + 1,
    }
}

/// Appends all of them, if there are any, to the inode in `bytes`. Call with what [`is_storable`] says yes to.
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
