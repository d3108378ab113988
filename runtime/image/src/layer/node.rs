// SPDX-License-Identifier: Apache-2.0
//! One file of a layer: what tar says of it. Pure.

use std::collections::BTreeMap;

/// What a name or an attribute costs besides its bytes, about.
pub const ENTRY_BYTES: usize = 64;
const IMPLIED_DIRECTORY_MODE: u16 = 0o755;
/// The attribute by which overlayfs knows an opaque directory.
pub const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// An index into the nodes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    pub const ROOT: Self = Self(0);

    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What tar says of any file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with set-uid, set-gid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime_seconds: i64,
    pub mtime_nanoseconds: u32,
    /// Full names (`user.x`).
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

impl Attributes {
    /// About what they cost in memory.
    pub fn xattr_bytes(&self) -> usize {
        let xattrs = self.xattrs.iter();
        xattrs
            .map(|(name, value)| ENTRY_BYTES + name.len() + value.len())
            .sum()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    /// Data in whole blocks from `first_block` on.
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

    /// How overlayfs knows that a name is gone (filesystems/overlayfs: "whiteouts").
    pub const WHITEOUT: Self = Self::CharDevice { major: 0, minor: 0 };
}

#[derive(Debug)]
pub struct Node {
    pub attributes: Attributes,
    pub kind: Kind,
}

impl Node {
    /// A directory that no entry has told of yet.
    pub fn implied_directory() -> Self {
        Self {
            attributes: Attributes {
                mode: IMPLIED_DIRECTORY_MODE,
                ..Attributes::default()
            },
            kind: Kind::directory(),
        }
    }

    pub fn set_opaque(&mut self) {
        let xattrs = &mut self.attributes.xattrs;
        xattrs.insert(OVERLAY_OPAQUE.into(), (*b"y").into());
    }
}
