// SPDX-License-Identifier: Apache-2.0
//! A part of a disk. The VMM says with it where it has put something, and is told with it what to take away. Pure.

use serde::{Deserialize, Serialize};

/// What virtio-blk and Linux count in, whatever a disk's own blocks are.
pub const SECTOR_BYTES: u64 = 512;

/// Sectors of a disk that follow one another: where an image layer is on the image disk, or a volume on the volume disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub first_sector: u64,
    pub sectors: u64,
}
