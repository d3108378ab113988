// SPDX-License-Identifier: Apache-2.0
//! Copies what a file is like from one path to another: owner, permissions, extended attributes, times. Links are not
//! followed. Blocks.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Timespec, Timestamps, XattrFlags, lgetxattr, llistxattr, lsetxattr, utimensat,
};

/// Attributes with this prefix are overlayfs's own. Containers do not see them.
const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
const MAX_XATTR_BYTES: usize = 64 << 10;

/// Makes `copy` like `source`, which must be of the same type.
pub fn copy(source: &Path, copy: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(source)?;
    // The owner comes first, because a change of it clears set-id bits and capabilities.
    std::os::unix::fs::lchown(copy, Some(found.uid()), Some(found.gid()))?;
    if !found.file_type().is_symlink() {
        fs::set_permissions(copy, fs::Permissions::from_mode(found.mode() & 0o7777))?;
    }
    copy_xattrs(source, copy)?;
    let time = |seconds, nanoseconds| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time(found.atime(), found.atime_nsec()),
        last_modification: time(found.mtime(), found.mtime_nsec()),
    };
    Ok(utimensat(CWD, copy, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn copy_xattrs(source: &Path, copy: &Path) -> io::Result<()> {
    // Most files have none.
    if llistxattr(source, &mut [0_u8; 0])? == 0 {
        return Ok(());
    }
    let mut names = vec![0; MAX_XATTR_BYTES];
    let length = llistxattr(source, &mut names)?;
    let names = names.get(..length).unwrap_or_default();
    let mut value = vec![0; MAX_XATTR_BYTES];
    for name in names.split(|byte| *byte == 0) {
        if name.is_empty() || name.starts_with(OVERLAY_PREFIX) {
            continue;
        }
        let length = lgetxattr(source, name, &mut value)?;
        let value = value.get(..length).unwrap_or_default();
        lsetxattr(copy, name, value, XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_and_times_are_copied() {
        let directory = tempfile::tempdir().unwrap();
        let (source, copy) = (directory.path().join("a"), directory.path().join("b"));
        for path in [&source, &copy] {
            fs::create_dir(path).unwrap();
        }
        fs::set_permissions(&source, fs::Permissions::from_mode(0o1750)).unwrap();
        fs::create_dir(source.join("child")).unwrap();
        super::copy(&source, &copy).unwrap();
        let of = |path: &Path| {
            let of = fs::metadata(path).unwrap();
            (of.mode(), of.uid(), of.gid(), of.mtime(), of.mtime_nsec())
        };
        assert_eq!(of(&source), of(&copy));
    }

    #[test]
    fn a_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (source, copy) = (directory.path().join("a"), directory.path().join("b"));
        for path in [&source, &copy] {
            std::os::unix::fs::symlink("/no/such/file", path).unwrap();
        }
        super::copy(&source, &copy).unwrap();
        let time = |path: &Path| fs::symlink_metadata(path).unwrap().mtime_nsec();
        assert_eq!(time(&source), time(&copy));
    }
}
