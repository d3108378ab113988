// SPDX-License-Identifier: Apache-2.0
//! Extents of the disks that are windows. The host puts an extent on the disk, raises the disk's capacity, and then
//! says in a request where the extent is. A device-mapper device makes it a block device.
//!
//! Everything here blocks, so it must be called from a thread that may block.

use std::fs;
use std::io;

use super::capacity;
use super::dm::{Access, Control};
use super::extent::Extent;

#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    #[error("read size or number of disk {disk}")]
    NoDisk {
        disk: &'static str,
        source: io::Error,
    },
    #[error("{extent} reach beyond the end of disk {disk}, which has {capacity} sectors")]
    BeyondDisk {
        disk: &'static str,
        extent: Extent,
        capacity: u64,
    },
    #[error("map {extent} of disk {disk}")]
    Map {
        disk: &'static str,
        extent: Extent,
        source: io::Error,
    },
}

/// Creates `/dev/dm-N` for an extent, with the device-mapper name `name`. Returns N.
pub fn map(
    disk: &'static str,
    name: &str,
    extent: Extent,
    access: Access,
) -> Result<u32, WindowError> {
    wait_for_capacity(disk, extent)?;
    let number = fs::read_to_string(format!("/sys/block/{disk}/dev"))
        .map_err(|source| WindowError::NoDisk { disk, source })?;
    Control::open()
        .and_then(|control| control.create_linear(name, number.trim(), extent, access))
        .map_err(|source| WindowError::Map {
            disk,
            extent,
            source,
        })
}

/// Removes a device. One that is in use goes when its last user closes it.
pub fn unmap(name: &str) {
    if let Ok(control) = Control::open() {
        let _ = control.remove(name);
    }
}

/// Waits until the disk is large enough.
fn wait_for_capacity(disk: &'static str, extent: Extent) -> Result<(), WindowError> {
    let capacity = capacity::wait_for(disk, extent.end())
        .map_err(|source| WindowError::NoDisk { disk, source })?;
    if capacity < extent.end() {
        return Err(WindowError::BeyondDisk {
            disk,
            extent,
            capacity,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::agent as proto;

    use super::*;

    #[test]
    fn a_disk_that_is_not_there_is_named() {
        let extent = proto::Extent {
            first_sector: 0,
            sectors: 8,
        };
        let extent = Extent::try_from(extent).unwrap();
        let refused = map("none", "x", extent, Access::ReadWrite).unwrap_err();
        assert_eq!(refused.to_string(), "read size or number of disk none");
    }
}
