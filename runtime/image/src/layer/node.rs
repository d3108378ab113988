// SPDX-License-Identifier: Apache-2.0
//! One file of a layer, as the tar archive describes it. Pure.

use std::collections::BTreeMap;

/// About how much memory a name or an attribute takes, apart from its bytes.
pub const ENTRY_BYTES: usize = 64;
/// How much memory a file takes, apart from its names and attributes, also while its layer is written. [`super::erofs`]
/// proves that it is not more.
pub const NODE_BYTES: usize = 128;
const IMPLIED_DIRECTORY_MODE: u16 = 0o755;
/// The attribute by which the agent finds directories without an entry of their own (`agent/src/disk/implied.rs`).
/// overlayfs hides it from containers.
pub const OVERLAY_IMPLIED: &[u8] = b"trusted.overlay.bulkhead.implied";
const ITSELF: &[u8] = b"y";
const BELOW: &[u8] = b"b";
/// The attribute that marks an opaque directory for overlayfs.
pub const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// The index of a node in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    pub const ROOT: Self = Self(0);

    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The attributes that any file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits, including set-uid, set-gid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime_seconds: i64,
    pub mtime_nanoseconds: u32,
    /// By full name (`user.x`).
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

impl Attributes {
    /// About how much memory the extended attributes take.
    pub fn xattr_bytes(&self) -> usize {
        let xattrs = self.xattrs.iter();
        xattrs
            .map(|(name, value)| ENTRY_BYTES + name.len() + value.len())
            .sum()
    }
}

/// The type of a file, with what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    /// The data are in whole blocks from `first_block` on.
    Regular {
        first_block: u32,
        bytes: u64,
    },
    Symlink(Box<[u8]>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

impl Kind {
    pub fn directory() -> Self {
        Self::Directory(BTreeMap::new())
    }

    /// The whiteout of overlayfs, which says that a name is deleted (Documentation/filesystems/overlayfs).
    pub const WHITEOUT: Self = Self::CharDevice { major: 0, minor: 0 };
}

#[derive(Debug)]
pub struct Node {
    pub attributes: Attributes,
    pub kind: Kind,
}

impl Node {
    /// The root, for which no entry has been read yet. A container's root directory is that of its writable layer, so it
    /// is not marked.
    pub fn root() -> Self {
        Self {
            attributes: Attributes {
                mode: IMPLIED_DIRECTORY_MODE,
                ..Attributes::default()
            },
            kind: Kind::directory(),
        }
    }

    /// A directory for which no entry has been read yet.
    pub fn implied_directory() -> Self {
        let mut node = Self::root();
        node.mark(ITSELF);
        node
    }

    fn mark(&mut self, value: &[u8]) {
        let xattrs = &mut self.attributes.xattrs;
        xattrs.insert(OVERLAY_IMPLIED.into(), value.into());
    }

    pub fn is_marked(&self) -> bool {
        self.attributes.xattrs.contains_key(OVERLAY_IMPLIED)
    }

    /// Says that there is an implied directory below this one.
    pub fn mark_above_implied(&mut self) {
        self.mark(BELOW);
    }

    /// Makes this directory one that replaces what lower layers have of its name, rather than one that adds to it.
    pub fn replace_lower(&mut self) {
        self.attributes.xattrs.remove(OVERLAY_IMPLIED);
        self.set_opaque();
    }

    /// Hides what lower layers have in this directory.
    pub fn set_opaque(&mut self) {
        let xattrs = &mut self.attributes.xattrs;
        xattrs.insert(OVERLAY_OPAQUE.into(), (*b"y").into());
    }
}
