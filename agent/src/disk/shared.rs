// SPDX-License-Identifier: Apache-2.0
//! Directories and files of the host, by virtio-fs: one device for all of them, mounted when the first
//! container needs it. The host's file server has one name per share and nothing else. A pod with a user namespace
//! has a second mount, in which all files belong to its own users (an idmapped mount).

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::mount::{MountFlags, mount};

use crate::init::mounts;
use crate::users::PodUsers;

const MOUNT: &std::ffi::CStr = c"/run/shared";
const MAPPED: &std::ffi::CStr = c"/run/shared-mapped";
/// The tag by which the device can be mounted.
const TAG: &std::ffi::CStr = c"bulkhead";

static MOUNTED: Mutex<Mounted> = Mutex::new(Mounted {
    plain: false,
    mapped: false,
});

/// Which of the two mounts exist.
struct Mounted {
    plain: bool,
    mapped: bool,
}

/// The path of the share `name` in the agent's tree, in the mount for `seen_by` if that is given. Blocks. Fails if the
/// host does not serve the share.
pub fn path(name: &str, seen_by: Option<&PodUsers>) -> io::Result<PathBuf> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    if !is_name(name) {
        return Err(invalid(format!("{name:?} is not the name of a share")));
    }
    let mut mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !mounted.plain {
        fs::create_dir_all(as_path(MOUNT))?;
        // A device node of the host must not become a device of this guest.
        mount(TAG, MOUNT, c"virtiofs", MountFlags::NODEV, None)?;
        mounted.plain = true;
    }
    // An idmapped mount is possible only after the server has answered FUSE_INIT, so wait for a first reply here.
    let path = as_path(MOUNT).join(name);
    path.symlink_metadata()?;
    let Some(users) = seen_by else {
        return Ok(path);
    };
    if !mounted.mapped {
        if users.namespace().is_none() {
            return Err(invalid("the pod has no user namespace".to_owned()));
        }
        let view = mounts::clone_path(as_path(MOUNT))?;
        users.map_owners(&view)?;
        fs::create_dir_all(as_path(MAPPED))?;
        mounts::attach_at(&view, MAPPED)?;
        mounted.mapped = true;
    }
    Ok(as_path(MAPPED).join(name))
}

fn as_path(text: &std::ffi::CStr) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(text.to_bytes()))
}

/// Whether `name` is a letter and a number, as the file server names shares.
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
