// SPDX-License-Identifier: Apache-2.0
//! Reads an EROFS file system, by Linux's description of the format and by nothing of ours. Panics if it is damaged.
//!
//! Only what layers have is known: extended inodes, plain or inline-tail data, and extended attributes at the inode.

use std::collections::BTreeMap;

const BLOCK_BYTES: usize = 4096;
const SUPER: usize = 1024;
const INODE_BYTES: usize = 64;
const DIRENT_BYTES: usize = 12;
const NO_BLOCK: u32 = u32::MAX;

/// A file by its path.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub mode: u16,
    pub links: u32,
    pub inode: u64,
    /// The content of a regular file, or the target of a symbolic link.
    pub content: Vec<u8>,
}

/// All files by their paths. The root's path is empty.
#[must_use]
pub fn read(image: &[u8]) -> BTreeMap<Vec<u8>, Found> {
    assert_eq!(u32_at(image, SUPER), 0xe0f5_e1e2, "magic number");
    assert_eq!(image[SUPER + 12], 12, "size of a block");
    let blocks = u32_at(image, SUPER + 36);
    assert_eq!(
        image.len(),
        blocks as usize * BLOCK_BYTES,
        "size of the file system"
    );
    let root = u16_at(image, SUPER + 14).into();
    let reader = Reader {
        image,
        meta: u32_at(image, SUPER + 40) as usize * BLOCK_BYTES,
    };
    let mut found = BTreeMap::new();
    let mut ahead = vec![(Vec::new(), root, root)];
    while let Some((path, number, parent)) = ahead.pop() {
        let inode = reader.inode(number);
        if inode.is(0o040_000) {
            for (name, child, kind) in reader.entries(&inode) {
                match &name[..] {
                    b"." => assert_eq!(child, number, "{path:?}/."),
                    b".." => assert_eq!(child, parent, "{path:?}/.."),
                    _ => {
                        assert!(
                            !name.is_empty() && !name.contains(&b'/'),
                            "{path:?}/{name:?}"
                        );
                        let kind_of_inode = reader.inode(child).kind();
                        assert_eq!(kind, kind_of_inode, "{path:?}/{name:?}");
                        let below = [&path[..], b"/", &name[..]].concat();
                        assert!(below.len() < image.len(), "a directory contains itself");
                        ahead.push((below, child, number));
                    }
                }
            }
        }
        let is_read = inode.is(0o100_000) || inode.is(0o120_000);
        let one = Found {
            mode: inode.mode,
            links: inode.links,
            inode: number,
            content: if is_read {
                reader.content(&inode)
            } else {
                Vec::new()
            },
        };
        assert!(found.insert(path, one).is_none(), "a name twice");
    }
    check_links(&found);
    let inodes: std::collections::BTreeSet<_> = found.values().map(|one| one.inode).collect();
    assert_eq!(
        u64_at(image, SUPER + 16),
        inodes.len() as u64,
        "number of inodes"
    );
    found
}

/// A file has as many names as its inode says, and a directory as many links as it has directories, and two.
fn check_links(found: &BTreeMap<Vec<u8>, Found>) {
    let mut names: BTreeMap<u64, u32> = BTreeMap::new();
    for (path, one) in found {
        let is_directory = one.mode & 0o170_000 == 0o040_000;
        *names.entry(one.inode).or_default() += if is_directory { 2 } else { 1 };
        let above = path
            .iter()
            .rposition(|byte| *byte == b'/')
            .and_then(|slash| found.get(&path[..slash]));
        if let (true, Some(above)) = (is_directory, above) {
            *names.entry(above.inode).or_default() += 1;
        }
    }
    for (path, one) in found {
        assert_eq!(Some(&one.links), names.get(&one.inode), "links of {path:?}");
    }
}

struct Reader<'a> {
    image: &'a [u8],
    meta: usize,
}

struct Inode {
    mode: u16,
    size: usize,
    links: u32,
    first_block: u32,
    /// Where the part of the content is that follows the inode, if there is one.
    tail: Option<usize>,
}

impl Inode {
    fn is(&self, format: u16) -> bool {
        self.mode & 0o170_000 == format
    }

    /// As directories say it.
    fn kind(&self) -> u8 {
        match self.mode & 0o170_000 {
            0o100_000 => 1,
            0o040_000 => 2,
            0o020_000 => 3,
            0o060_000 => 4,
            0o010_000 => 5,
            0o120_000 => 7,
            other => panic!("mode {other:o}"),
        }
    }
}

impl Reader<'_> {
    fn inode(&self, number: u64) -> Inode {
        let at = self.meta + usize::try_from(number).expect("an inode's number") * 32;
        let format = u16_at(self.image, at);
        assert_eq!(format & 1, 1, "an extended inode");
        let attributes = usize::from(u16_at(self.image, at + 2));
        let attribute_bytes = if attributes == 0 {
            0
        } else {
            12 + (attributes - 1) * 4
        };
        self.check_attributes(at + INODE_BYTES, attribute_bytes);
        let end = at + INODE_BYTES + attribute_bytes;
        let tail = match format >> 1 {
            0 => None,
            2 => Some(end),
            other => panic!("layout {other}"),
        };
        Inode {
            mode: u16_at(self.image, at + 4),
            size: usize::try_from(u64_at(self.image, at + 8)).expect("a size"),
            first_block: u32_at(self.image, at + 16),
            links: u32_at(self.image, at + 44),
            tail,
        }
    }

    /// The entries fill their space, and each has a prefix that exists.
    fn check_attributes(&self, at: usize, bytes: usize) {
        let end = at + bytes;
        let mut at = at + 12;
        while at < end {
            let (name, value) = (
                usize::from(self.image[at]),
                usize::from(u16_at(self.image, at + 2)),
            );
            assert!(
                matches!(self.image[at + 1], 1..=4 | 6),
                "prefix of an attribute"
            );
            at += (4 + name + value).next_multiple_of(4);
            assert!(at <= end, "an attribute beyond the others");
        }
    }

    fn content(&self, inode: &Inode) -> Vec<u8> {
        let tail_bytes = match inode.tail {
            Some(_) => (inode.size - 1) % BLOCK_BYTES + 1,
            None => 0,
        };
        let plain_bytes = inode.size - tail_bytes;
        let mut content = Vec::new();
        if plain_bytes > 0 {
            assert_ne!(inode.first_block, NO_BLOCK, "content without blocks");
            let at = inode.first_block as usize * BLOCK_BYTES;
            assert!(at > 0, "content in the superblock");
            content.extend(&self.image[at..at + plain_bytes]);
        }
        if let Some(at) = inode.tail {
            assert!(
                at % BLOCK_BYTES + tail_bytes <= BLOCK_BYTES,
                "a tail in two blocks"
            );
            content.extend(&self.image[at..at + tail_bytes]);
        }
        content
    }

    /// Names, inodes and kinds, in the order of the names.
    fn entries(&self, directory: &Inode) -> Vec<(Vec<u8>, u64, u8)> {
        let content = self.content(directory);
        let mut entries: Vec<(Vec<u8>, u64, u8)> = Vec::new();
        for block in content.chunks(BLOCK_BYTES) {
            let first = usize::from(u16_at(block, 8));
            assert!(
                first > 0 && first.is_multiple_of(DIRENT_BYTES),
                "number of entries"
            );
            let count = first / DIRENT_BYTES;
            for index in 0..count {
                let at = index * DIRENT_BYTES;
                let start = usize::from(u16_at(block, at + 8));
                let end = match index + 1 < count {
                    true => usize::from(u16_at(block, at + DIRENT_BYTES + 8)),
                    false => {
                        let rest = &block[start..];
                        start
                            + rest
                                .iter()
                                .position(|byte| *byte == 0)
                                .unwrap_or(rest.len())
                    }
                };
                entries.push((
                    block[start..end].to_vec(),
                    u64_at(block, at),
                    block[at + 10],
                ));
            }
        }
        assert!(entries.is_sorted_by(|a, b| a.0 < b.0), "order of names");
        entries
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
