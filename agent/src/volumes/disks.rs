// SPDX-License-Identifier: Apache-2.0
//! Volumes on disk. Each is an ext4 file system with a journal, in a file of the host that is an extent of the volume
//! disk. It outlives the guest: the next guest of the same pod mounts it again.
//!
//! kubelet measures how much a volume takes on the host, so that has to follow the volume's content. Freed blocks are
//! discarded when the journal commits. And every [`PAUSE`] a thread "settles" each volume that was written to: it
//! writes back what has changed and empties the journal. Everything here blocks.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bulkhead_proto::agent::{Ownership, disk};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::ownership;
use crate::disk::dm::Access;
use crate::disk::extent::Extent;
use crate::disk::window;
use crate::sys;

const MOUNTS: &str = "/run/disks";
/// The directory that containers see. Beside it is `lost+found`, which belongs to the file system.
const CONTENT: &str = "content";
/// kubelet measures once a minute.
const PAUSE: Duration = Duration::from_secs(20);

/// The mounted file systems, by the names of their volumes. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Disks {
    mounted: Arc<Mutex<HashMap<String, Mounted>>>,
    /// Set when the thread that settles volumes has been started.
    settling: Arc<OnceLock<()>>,
}

/// A mounted volume.
#[derive(Debug)]
struct Mounted {
    /// The minor number of the device-mapper device.
    minor: u32,
    /// The device's activity when the volume was settled last.
    settled: Activity,
}

/// How many sectors have been written to a device and discarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Activity {
    written: u64,
    discarded: u64,
}

/// The directory that containers mount.
pub fn content(name: &str) -> PathBuf {
    home(name).join(CONTENT)
}

fn home(name: &str) -> PathBuf {
    Path::new(MOUNTS).join(name)
}

impl Disks {
    /// Mounts the file system in `extent`. New content belongs to `ownership`. Content of an earlier guest stays
    /// as it is.
    pub fn mount(&self, name: &str, extent: Extent, ownership: &Ownership) -> io::Result<()> {
        let device = device_name(name);
        let minor = window::map(disk::VOLUMES, &device, extent, Access::ReadWrite);
        let minor = minor.map_err(io::Error::other)?;
        let made = mount_device(minor, &home(name)).and_then(|()| {
            make_content(&home(name), ownership).inspect_err(|_| {
                let _ = unmount(home(name), UnmountFlags::DETACH);
            })
        });
        if let Err(e) = made {
            let _ = fs::remove_dir(home(name));
            window::unmap(&device);
            return Err(e);
        }
        let settled = Activity::default();
        self.lock()
            .insert(name.to_owned(), Mounted { minor, settled });
        self.keep_settled();
        Ok(())
    }

    /// Unmounts a volume. Its content stays on the host.
    pub fn unmount(&self, name: &str) -> io::Result<()> {
        if self.lock().remove(name).is_none() {
            return Ok(());
        }
        unmount(home(name), UnmountFlags::DETACH)?;
        window::unmap(&device_name(name));
        fs::remove_dir(home(name))
    }

    /// Writes everything back, at the end of the guest. A file system that processes still use cannot be unmounted, but
    /// is safe all the same, because of its journal.
    pub fn release(&self) {
        let names: Vec<String> = self.lock().drain().map(|(name, _)| name).collect();
        for name in names {
            if let Err(e) = File::open(home(&name)).and_then(|root| Ok(rustix::fs::syncfs(root)?)) {
                eprintln!("bulkhead-agent: write back volume {name}: {e}");
            }
            let _ = unmount(home(&name), UnmountFlags::empty());
        }
    }

    fn keep_settled(&self) {
        let disks = self.clone();
        self.settling.get_or_init(|| {
            let name = "disks".to_owned();
            let settling = move || {
                loop {
                    std::thread::sleep(PAUSE);
                    disks.settle();
                }
            };
            if let Err(e) = std::thread::Builder::new().name(name).spawn(settling) {
                eprintln!("bulkhead-agent: start the thread that settles volumes: {e}");
            }
        });
    }

    /// Settles all volumes that have been written to since the last time.
    fn settle(&self) {
        let known: Vec<_> = self
            .lock()
            .iter()
            .map(|(name, one)| (name.clone(), one.minor, one.settled))
            .collect();
        for (name, minor, settled) in known {
            if activity(minor) == settled {
                continue;
            }
            let root = File::open(home(&name));
            let done = root.and_then(|root| {
                rustix::fs::syncfs(&root)?;
                sys::empty_journal(&root)
            });
            if let Err(e) = done {
                // The host may have no space, or the volume has been unmounted meanwhile. Try again the next time.
                eprintln!("bulkhead-agent: settle volume {name}: {e}");
            }
            if let Some(one) = self.lock().get_mut(&name) {
                one.settled = activity(minor);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Mounted>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn device_name(name: &str) -> String {
    format!("disk-{name}")
}

fn mount_device(minor: u32, home: &Path) -> io::Result<()> {
    fs::create_dir_all(home)?;
    // As on the scratch disk, but with barriers, because the host's power may fail. The journal commits as often as
    // volumes are settled.
    let options = Some(c"discard,noinit_itable,commit=20");
    let device = format!("/dev/dm-{minor}");
    Ok(mount(device, home, c"ext4", MountFlags::NOATIME, options)?)
}

/// Creates the content directory by a rename at the end. If the guest ends in between, the next guest does not find
/// a directory that looks finished.
fn make_content(home: &Path, owner: &Ownership) -> io::Result<()> {
    let content = home.join(CONTENT);
    if content.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    let new = home.join("new");
    if !new.is_dir() {
        fs::create_dir(&new)?;
    }
    ownership::set_at(&new, owner)?;
    fs::rename(&new, &content)
}

/// The activity of a device. Zero if the device is gone.
fn activity(minor: u32) -> Activity {
    let text = fs::read_to_string(format!("/sys/block/dm-{minor}/stat")).unwrap_or_default();
    parse_activity(&text)
}

/// Parses the seventh and the fourteenth number of a `stat` file (Documentation/block/stat.rst).
fn parse_activity(text: &str) -> Activity {
    let numbers: Vec<u64> = text
        .split_whitespace()
        .map(|number| number.parse().unwrap_or(0))
        .collect();
    let number = |at: usize| numbers.get(at).copied().unwrap_or(0);
    Activity {
        written: number(6),
        discarded: number(13),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn content_is_made_once_and_kept_as_it_was_left() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path();
        let owner = |mode| Ownership {
            mode,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        // Left by a guest that ended too early.
        fs::create_dir(home.join("new")).unwrap();
        make_content(home, &owner(0o2770)).unwrap();
        let mode = || fs::metadata(home.join(CONTENT)).unwrap().mode() & 0o7777;
        assert_eq!(mode(), 0o2770);
        assert!(!home.join("new").exists());
        let changed = fs::Permissions::from_mode(0o700);
        fs::set_permissions(home.join(CONTENT), changed).unwrap();
        make_content(home, &owner(0o2770)).unwrap();
        assert_eq!(mode(), 0o700);
    }

    #[test]
    fn a_device_tells_what_was_written_and_discarded() {
        let text = "  1 2 3 4 5 6 777 8 9 10 11 12 13 1400 15 16 17\n";
        let expected = Activity {
            written: 777,
            discarded: 1400,
        };
        assert_eq!(parse_activity(text), expected);
        assert_eq!(parse_activity(""), Activity::default());
    }
}
