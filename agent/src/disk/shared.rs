// SPDX-License-Identifier: Apache-2.0
//! Directories and files of the host, by virtio-fs: one device for all of them, mounted when the first
//! container needs it. The host's file server has a name for each share; nothing else is there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::mount::{MountFlags, mount};

const MOUNT: &str = "/run/shared";
/// The device's name for itself.
const TAG: &std::ffi::CStr = c"bulkhead";

static MOUNTED: Mutex<bool> = Mutex::new(false);

/// Where the share `name` is in the agent's tree. Blocks, and fails if the host does not serve it.
pub fn path(name: &str) -> io::Result<PathBuf> {
    if !is_name(name) {
        let what = format!("{name:?} is not the name of a share");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    mount_once()?;
    let path = Path::new(MOUNT).join(name);
    path.symlink_metadata()?;
    Ok(path)
}

fn mount_once() -> io::Result<()> {
    let mut mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*mounted {
        fs::create_dir_all(MOUNT)?;
        // A device node of the host would be one of this guest.
        mount(TAG, MOUNT, c"virtiofs", MountFlags::NODEV, None)?;
        *mounted = true;
    }
    Ok(())
}

/// A letter and a number, as the file server has them.
fn is_name(name: &str) -> bool {
    let digits = name.strip_prefix(['p', 's']).unwrap_or_default();
    (1..=5).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_shares_are_looked_up() {
        for (name, good) in [
            ("p1", true),
            ("s65535", true),
            ("p", false),
            ("p123456", false),
            ("..", false),
            ("p1/..", false),
            ("", false),
            ("x1", false),
        ] {
            assert_eq!(is_name(name), good, "{name:?}");
        }
    }
}
