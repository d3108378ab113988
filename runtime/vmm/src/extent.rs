// SPDX-License-Identifier: Apache-2.0
//! A part of a disk. In requests and replies it says where an image layer or a volume is. Pure.

use serde::{Deserialize, Serialize};

/// The unit of virtio-blk and Linux, whatever block size a disk has.
pub const SECTOR_BYTES: u64 = 512;

/// Consecutive sectors of a disk, such as an image layer on the image disk or a volume on the volume disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub first_sector: u64,
    pub sectors: u64,
}
