// SPDX-License-Identifier: Apache-2.0
//! Ranges of the disks that are windows: the host puts something there, raises the disk's capacity and then says
//! where it is; a device-mapper device makes a block device of it.
//!
//! Everything here blocks; call it from a thread that may.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::dm::Control;

/// How long the disk may take to show the capacity that the host has announced.
const CAPACITY_TIMEOUT: Duration = Duration::from_secs(5);
const CAPACITY_PAUSE: Duration = Duration::from_millis(1);

#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    #[error("disk {disk}")]
    NoDisk {
        disk: &'static str,
        source: io::Error,
    },
    #[error("range of {sectors} sectors at {first} is empty or too large")]
    BadRange { first: u64, sectors: u64 },
    #[error("range ends at sector {end}, disk {disk} at {capacity}")]
    BeyondDisk {
        disk: &'static str,
        end: u64,
        capacity: u64,
    },
    #[error("map {sectors} sectors at {first} of disk {disk}")]
    Map {
        disk: &'static str,
        first: u64,
        sectors: u64,
        source: io::Error,
    },
}

/// Sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    pub first: u64,
    pub sectors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// Makes `/dev/dm-N` of a range, by the name `name`; returns N.
pub fn map(
    disk: &'static str,
    name: &str,
    range: Range,
    access: Access,
) -> Result<u32, WindowError> {
    let Range { first, sectors } = range;
    let end = first.checked_add(sectors).filter(|_| sectors > 0);
    wait_for_capacity(disk, end.ok_or(WindowError::BadRange { first, sectors })?)?;
    let number = fs::read_to_string(format!("/sys/block/{disk}/dev"))
        .map_err(|source| WindowError::NoDisk { disk, source })?;
    Control::open()
        .and_then(|control| control.create_linear(name, number.trim(), range, access))
        .map_err(|source| WindowError::Map {
            disk,
            first,
            sectors,
            source,
        })
}

/// Forgets a device; one that is in use goes with its last user.
pub fn unmap(name: &str) {
    if let Ok(control) = Control::open() {
        let _ = control.remove(name);
    }
}

/// The host raises the disk's capacity, then calls; the interrupt that says so may come after the call.
fn wait_for_capacity(disk: &'static str, end: u64) -> Result<(), WindowError> {
    let deadline = Instant::now() + CAPACITY_TIMEOUT;
    loop {
        let size = fs::read_to_string(format!("/sys/block/{disk}/size"))
            .map_err(|source| WindowError::NoDisk { disk, source })?;
        let capacity = size.trim().parse().unwrap_or(0);
        if end <= capacity {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(WindowError::BeyondDisk {
                disk,
                end,
                capacity,
            });
        }
        std::thread::sleep(CAPACITY_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_without_sectors_or_end_is_refused() {
        for (first, sectors) in [(8, 0), (u64::MAX, 1)] {
            let range = Range { first, sectors };
            let refused = map("none", "x", range, Access::ReadOnly).unwrap_err();
            assert!(matches!(refused, WindowError::BadRange { .. }), "{first}");
        }
        let range = Range {
            first: 0,
            sectors: 8,
        };
        let refused = map("none", "x", range, Access::ReadWrite).unwrap_err();
        assert!(matches!(refused, WindowError::NoDisk { .. }));
    }
}
