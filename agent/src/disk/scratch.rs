// SPDX-License-Identifier: Apache-2.0
//! The scratch disk: an ext4 file system that the host created for this guest.

use std::fs;
use std::io;

use bulkhead_proto::agent::disk;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

pub const MOUNT: &str = "/run/scratch";
pub const CONTAINERS: &str = "/run/scratch/containers";

/// Mounts the scratch disk, or a tmpfs if there is none. Called once, from a thread that may block.
pub fn mount_scratch() -> io::Result<()> {
    fs::create_dir_all(MOUNT)?;
    let size = fs::read_to_string(format!("/sys/block/{}/size", disk::SCRATCH)).unwrap_or_default();
    let has_disk = size.trim().parse::<u64>().is_ok_and(|sectors| sectors > 0);
    if has_disk {
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

/// Writes everything back and unmounts the scratch disk, or at least makes it read-only.
pub fn release_scratch() {
    rustix::fs::sync();
    if unmount(MOUNT, UnmountFlags::empty()).is_err() {
        let _ = mount_remount(MOUNT, MountFlags::RDONLY, c"");
    }
}
