// SPDX-License-Identifier: Apache-2.0
//! Disks that grow. The host raises a disk's capacity before the request that needs it, but the interrupt about it may
//! come later than the request.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the disk may take to show a capacity that the host has announced.
const TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(1);
const DISKS: &str = "/sys/block";

/// Waits until a disk has at least `wanted` sectors, but not for long. Returns how many it has then, which may be fewer.
/// Blocks, so it must be called from a thread that may block.
pub fn wait_for(disk: &str, wanted: u64) -> io::Result<u64> {
    wait_in(Path::new(DISKS), disk, wanted, TIMEOUT)
}

fn wait_in(disks: &Path, disk: &str, wanted: u64, patience: Duration) -> io::Result<u64> {
    let deadline = Instant::now() + patience;
    loop {
        let size = fs::read_to_string(disks.join(disk).join("size"))?;
        let capacity = size.trim().parse().unwrap_or(0);
        if capacity >= wanted || Instant::now() > deadline {
            return Ok(capacity);
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_waited_for_until_it_is_large_enough_or_time_is_up() {
        let disks = tempfile::tempdir().unwrap();
        let disk = disks.path().join("vdx");
        fs::create_dir(&disk).unwrap();
        let show = |sectors: &str| fs::write(disk.join("size"), sectors).unwrap();
        let wait = |wanted, patience| wait_in(disks.path(), "vdx", wanted, patience).unwrap();
        show("8\n");
        assert_eq!(wait(0, Duration::ZERO), 8);
        assert_eq!(wait(8, TIMEOUT), 8);
        assert_eq!(wait(9, Duration::from_millis(3)), 8);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                show("16\n");
            });
            assert_eq!(wait(9, TIMEOUT), 16);
        });
        assert!(wait_in(disks.path(), "none", 0, TIMEOUT).is_err());
    }
}
