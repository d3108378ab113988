// SPDX-License-Identifier: Apache-2.0
//! The scratch disk: an ext4 file system that the host created for this guest.

use std::fs;
use std::io;

use bulkhead_proto::agent::disk;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use super::capacity;

pub const MOUNT: &str = "/run/scratch";
pub const CONTAINERS: &str = "/run/scratch/containers";

#[derive(Debug, thiserror::Error)]
#[error("the disk has {capacity} sectors, the host has announced {announced}")]
struct TooSmall {
    capacity: u64,
    announced: u64,
}

/// Mounts the scratch disk, or a tmpfs if there is none. The host has announced that the disk has at least so many
/// `sectors`; 0 means that it has announced nothing. Called once, from a thread that may block.
pub fn mount_scratch(sectors: u64) -> io::Result<()> {
    fs::create_dir_all(MOUNT)?;
    if has_disk(sectors)? {
        // The file system ends with the guest, so it needs no barriers. discard gives deleted space back to the host.
        let options = Some(c"nobarrier,discard,noinit_itable");
        mount(
            format!("/dev/{}", disk::SCRATCH),
            MOUNT,
            c"ext4",
            MountFlags::NOATIME,
            options,
        )?;
    } else {
        mount(
            c"tmpfs",
            MOUNT,
            c"tmpfs",
            MountFlags::NOATIME,
            Some(c"mode=0700"),
        )?;
    }
    fs::create_dir_all(CONTAINERS)
}

/// Whether there is a disk to mount. Waits for one that the host has announced: in a VM that began as a copy of another
/// one it grows only now.
fn has_disk(announced: u64) -> io::Result<bool> {
    match capacity::wait_for(disk::SCRATCH, announced) {
        Ok(capacity) if capacity < announced => Err(io::Error::other(TooSmall {
            capacity,
            announced,
        })),
        Ok(capacity) => Ok(capacity > 0),
        Err(_) if announced == 0 => Ok(false),
        Err(e) => Err(e),
    }
}

/// Writes everything back and unmounts the scratch disk, or at least makes it read-only.
pub fn release_scratch() {
    rustix::fs::sync();
    if unmount(MOUNT, UnmountFlags::empty()).is_err() {
        let _ = mount_remount(MOUNT, MountFlags::RDONLY, c"");
    }
}
