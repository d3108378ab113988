// SPDX-License-Identifier: Apache-2.0
//! Writes the EROFS file system around file data that are already written: directories, inodes, superblock.
//!
//! The format is in Linux, Documentation/filesystems/erofs.rst. We use the uncompressed subset, which every kernel
//! since 5.4 can mount: extended inodes, plain or inline-tail data, xattrs directly after the inode. The metadata area
//! begins where the data end, so everything except the superblock is written in order.

mod directory;
pub mod xattr;

use std::io;

use super::blocks::{BLOCK_BYTES, BlockWriter};
use super::node::{Kind, Node, NodeId};
use super::tree::Tree;
use directory::{DIRENT_BYTES, Entry, entries, in_blocks, measure};

const MAGIC: u32 = 0xe0f5_e1e2;
const SUPER_OFFSET: usize = 1024;
const BLOCK_BITS: u8 = 12;
/// Timestamps are modification times, not change times.
const FEATURE_COMPAT_MTIME: u32 = 0x2;
/// An inode's number is its distance from the start of the metadata area in units of this.
const SLOT_BYTES: usize = 32;
const INODE_BYTES: usize = 64;
/// The first slot stays free, because some programs take the inode number 0 for "none".
const FIRST_SLOT: usize = 1;
const FORMAT_PLAIN: u16 = 0x1;
const FORMAT_INLINE: u16 = 0x1 | 2 << 1;
const NO_BLOCK: u32 = u32::MAX;

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// What is needed for each file while the file system is written.
pub const PLACED_BYTES: usize = size_of::<Option<Placed>>() + size_of::<NodeId>();

/// Where one inode is and where its data are.
#[derive(Clone, Copy, Debug)]
struct Placed {
    slot: u32,
    links: u32,
    parent: NodeId,
    /// For directories and long symbolic links: the first of the blocks before the tail.
    first_block: u32,
    /// The size of the tail, which directly follows the inode.
    inline_bytes: u16,
    size: u64,
}

impl Placed {
    /// How many blocks the content takes that is not inline.
    fn blocks(&self) -> u64 {
        (self.size - u64::from(self.inline_bytes)).div_ceil(BLOCK_BYTES as u64)
    }
}

/// Writes the file system of `tree` after the data in `blocks`.
pub fn write(tree: &Tree, blocks: &mut BlockWriter) -> io::Result<()> {
    blocks.pad();
    let mut layout = Layout::new(tree)?;
    let data_block = blocks.next_block()?;
    let meta_block = layout.place_blocks(data_block)?;
    for (id, placed) in layout.order() {
        layout.write_blocks(id, placed, blocks)?;
    }
    debug_assert_eq!(blocks.next_block()?, meta_block);
    let mut written = 0;
    for (id, placed) in layout.order() {
        let start = placed.slot as usize * SLOT_BYTES;
        blocks.write(&vec![0; start - written])?;
        let inode = layout.inode(id, placed)?;
        blocks.write(&inode)?;
        written = start + inode.len();
    }
    blocks.pad();
    let total = blocks.next_block()?;
    blocks.set_first(&layout.super_block(meta_block, total)?)
}

/// Where everything is placed in the file system.
struct Layout<'a> {
    tree: &'a Tree,
    /// By node index. `None` for nodes that no directory contains any more.
    placed: Vec<Option<Placed>>,
    /// The reachable nodes in the order of their inodes. The root is first.
    order: Vec<NodeId>,
}

impl<'a> Layout<'a> {
    /// Counts links, and gives every reachable node its slot.
    fn new(tree: &'a Tree) -> io::Result<Self> {
        let mut layout = Self {
            tree,
            placed: vec![None; tree.len()],
            order: Vec::new(),
        };
        layout.reach();
        let mut next = FIRST_SLOT * SLOT_BYTES;
        for index in 0..layout.order.len() {
            let Some(&id) = layout.order.get(index) else {
                break;
            };
            let node = tree.node(id);
            let fixed = INODE_BYTES + xattr::bytes(&node.attributes.xattrs);
            let (size, tail) = layout.content(id);
            // The inline tail must be completely in the same block as its inode.
            let inline_bytes = if fixed + tail <= BLOCK_BYTES { tail } else { 0 };
            if inline_bytes > 0 && next % BLOCK_BYTES + fixed + inline_bytes > BLOCK_BYTES {
                next = next.next_multiple_of(BLOCK_BYTES);
            }
            if let Some(Some(placed)) = layout.placed.get_mut(id.index()) {
                placed.slot = u32::try_from(next / SLOT_BYTES).map_err(io::Error::other)?;
                placed.size = size;
                placed.inline_bytes = u16::try_from(inline_bytes).map_err(io::Error::other)?;
            }
            next = (next + fixed + inline_bytes).next_multiple_of(SLOT_BYTES);
        }
        Ok(layout)
    }

    /// Finds all reachable nodes, breadth first: the root is first, and the files of a directory are neighbours.
    fn reach(&mut self) {
        self.visit(NodeId::ROOT, NodeId::ROOT);
        let mut index = 0;
        while let Some(&id) = self.order.get(index) {
            if let Kind::Directory(children) = &self.tree.node(id).kind {
                for &child in children.values() {
                    self.visit(child, id);
                }
            }
            index += 1;
        }
    }

    /// Visits a node under one of its names. A node that was visited before only gets another link.
    fn visit(&mut self, id: NodeId, parent: NodeId) {
        let Some(slot) = self.placed.get_mut(id.index()) else {
            return;
        };
        let links = match &self.tree.node(id).kind {
            Kind::Directory(children) => {
                let is_directory =
                    |child: &&NodeId| matches!(self.tree.node(**child).kind, Kind::Directory(_));
                2 + children.values().filter(is_directory).count()
            }
            _ => 1,
        };
        match slot {
            // A hard link: another name of a file that was already visited.
            Some(placed) => placed.links = placed.links.saturating_add(1),
            None => {
                *slot = Some(Placed {
                    slot: 0,
                    links: u32::try_from(links).unwrap_or(u32::MAX),
                    parent,
                    first_block: NO_BLOCK,
                    inline_bytes: 0,
                    size: 0,
                });
                self.order.push(id);
            }
        }
    }

    /// Returns the size of a node's content, and how many bytes of the last block may be stored inline, after the inode.
    fn content(&self, id: NodeId) -> (u64, usize) {
        match &self.tree.node(id).kind {
            Kind::Directory(children) => {
                let (before, tail) = measure(children);
                (before + tail as u64, tail)
            }
            Kind::Symlink(target) => {
                let tail = target.len() % BLOCK_BYTES;
                (target.len() as u64, tail)
            }
            Kind::Regular { bytes, .. } => (*bytes, 0),
            _ => (0, 0),
        }
    }

    /// Gives blocks to directories and symbolic links whose content does not fit inline. Returns the next free block.
    fn place_blocks(&mut self, mut next: u32) -> io::Result<u32> {
        for id in &self.order {
            let is_regular = matches!(self.tree.node(*id).kind, Kind::Regular { .. });
            let Some(Some(placed)) = self.placed.get_mut(id.index()) else {
                continue;
            };
            if is_regular || placed.blocks() == 0 {
                continue;
            }
            placed.first_block = next;
            let count = u32::try_from(placed.blocks()).map_err(io::Error::other)?;
            next = next
                .checked_add(count)
                .ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        }
        Ok(next)
    }

    fn order(&self) -> impl Iterator<Item = (NodeId, &Placed)> {
        let placed = |id: &NodeId| Some((*id, self.placed.get(id.index())?.as_ref()?));
        self.order.iter().filter_map(placed)
    }

    fn slot(&self, id: NodeId) -> u64 {
        let placed = self.placed.get(id.index()).and_then(Option::as_ref);
        placed.map_or(0, |placed| placed.slot.into())
    }

    /// Writes the part of a node's content that is not inline.
    fn write_blocks(
        &self,
        id: NodeId,
        placed: &Placed,
        blocks: &mut BlockWriter,
    ) -> io::Result<()> {
        if placed.first_block == NO_BLOCK {
            return Ok(());
        }
        match &self.tree.node(id).kind {
            Kind::Directory(children) => {
                let mut listed = in_blocks(entries(children));
                for _ in 0..placed.blocks() {
                    let block = listed.next().unwrap_or_default();
                    blocks.write(&self.directory_block(placed, &block))?;
                    blocks.pad();
                }
            }
            Kind::Symlink(target) => {
                let outside = target.len() - usize::from(placed.inline_bytes);
                blocks.write(target.get(..outside).unwrap_or_default())?;
                blocks.pad();
            }
            _ => {}
        }
        Ok(())
    }

    /// One block of a directory: first the entries, then their names, ordered by the names' bytes.
    fn directory_block(&self, placed: &Placed, entries: &[(&[u8], Entry)]) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        let mut name_offset = entries.len() * DIRENT_BYTES;
        for (name, target) in entries {
            let (slot, kind) = match target {
                Entry::Itself => (placed.slot.into(), 2),
                Entry::Parent => (self.slot(placed.parent), 2),
                Entry::Child(child) => (self.slot(*child), file_type(self.tree.node(*child))),
            };
            block.extend(u64::to_le_bytes(slot));
            block.extend(u16::try_from(name_offset).unwrap_or(0).to_le_bytes());
            block.extend([kind, 0]);
            name_offset += name.len();
        }
        for (name, _) in entries {
            block.extend_from_slice(name);
        }
        block
    }

    /// The bytes of an inode with its xattrs and its inline data.
    fn inode(&self, id: NodeId, placed: &Placed) -> io::Result<Vec<u8>> {
        let node = self.tree.node(id);
        let attributes = &node.attributes;
        let xattr_bytes = xattr::bytes(&attributes.xattrs);
        let xattr_count = u16::try_from(xattr::count(xattr_bytes))
            .map_err(|_| io::Error::other("too many extended attributes"))?;
        let (file_type, content) = match &node.kind {
            Kind::Directory(_) => (S_IFDIR, placed.first_block),
            Kind::Symlink(_) => (S_IFLNK, placed.first_block),
            Kind::Regular { bytes: 0, .. } => (S_IFREG, NO_BLOCK),
            Kind::Regular { first_block, .. } => (S_IFREG, *first_block),
            Kind::CharDevice { major, minor } => (S_IFCHR, device_number(*major, *minor)),
            Kind::BlockDevice { major, minor } => (S_IFBLK, device_number(*major, *minor)),
            Kind::Fifo => (S_IFIFO, 0),
        };
        let inline = placed.inline_bytes > 0;
        // struct erofs_inode_extended.
        let inline_bytes = usize::from(placed.inline_bytes);
        let mut bytes = Vec::with_capacity(INODE_BYTES + xattr_bytes + inline_bytes);
        bytes.extend(if inline { FORMAT_INLINE } else { FORMAT_PLAIN }.to_le_bytes());
        bytes.extend(xattr_count.to_le_bytes());
        bytes.extend((file_type | attributes.mode & 0o7777).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(placed.size.to_le_bytes());
        bytes.extend(content.to_le_bytes());
        bytes.extend(placed.slot.to_le_bytes());
        bytes.extend(attributes.uid.to_le_bytes());
        bytes.extend(attributes.gid.to_le_bytes());
        bytes.extend(attributes.mtime_seconds.to_le_bytes());
        bytes.extend(attributes.mtime_nanoseconds.to_le_bytes());
        bytes.extend(placed.links.to_le_bytes());
        bytes.extend([0; 16]);
        xattr::append(&mut bytes, &attributes.xattrs);
        if inline {
            match &node.kind {
                Kind::Symlink(target) => {
                    let from = target.len() - inline_bytes;
                    bytes.extend_from_slice(target.get(from..).unwrap_or_default());
                }
                Kind::Directory(children) => {
                    let last = in_blocks(entries(children)).last().unwrap_or_default();
                    bytes.extend(self.directory_block(placed, &last));
                }
                _ => {}
            }
        }
        Ok(bytes)
    }

    fn super_block(&self, meta_block: u32, total_blocks: u32) -> io::Result<[u8; BLOCK_BYTES]> {
        let root = u16::try_from(FIRST_SLOT).map_err(io::Error::other)?;
        // struct erofs_super_block.
        let mut fields = Vec::with_capacity(128);
        fields.extend(MAGIC.to_le_bytes());
        fields.extend(0u32.to_le_bytes()); // checksum: the feature is off
        fields.extend(FEATURE_COMPAT_MTIME.to_le_bytes());
        fields.extend([BLOCK_BITS, 0]);
        fields.extend(root.to_le_bytes());
        fields.extend((self.order.len() as u64).to_le_bytes());
        fields.extend([0; 12]); // build time
        fields.extend(total_blocks.to_le_bytes());
        fields.extend(meta_block.to_le_bytes());
        fields.extend([0; 4]); // shared xattrs: none
        let mut block = [0; BLOCK_BYTES];
        let place = block.get_mut(SUPER_OFFSET..SUPER_OFFSET + fields.len());
        place.unwrap_or_default().copy_from_slice(&fields);
        Ok(block)
    }
}

fn file_type(node: &Node) -> u8 {
    match node.kind {
        Kind::Regular { .. } => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice { .. } => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// The encoding of Linux's `new_encode_dev`: 12 bits of major number, 20 bits of minor number.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}
