// SPDX-License-Identifier: Apache-2.0
//! The checks of a guest's requests, before the passthrough sees them. Pure.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::api::filesystem::Context;

use super::errno;
use crate::idmap::NOBODY;

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`: no attribute, and no list of names, is longer.
pub const ATTRIBUTE_BYTES: u32 = 64 << 10;
/// The bit of O_TMPFILE that is not O_DIRECTORY.
const UNNAMED: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// Checks a name in a directory: one component, and neither `.` nor `..`.
pub fn name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        bytes if bytes.len() > 255 => Err(errno(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// Checks that a request to create a file has a user and a group. The system calls take [`NOBODY`] for "do not
/// change", and then the file would belong to root.
pub fn maker(context: &Context) -> io::Result<()> {
    match context.uid == NOBODY || context.gid == NOBODY {
        true => Err(errno(libc::EOVERFLOW)),
        false => Ok(()),
    }
}

/// Checks the type of a new file: files, sockets and pipes may be created, devices may not.
pub fn kind(mode: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => Ok(()),
        _ => Err(errno(libc::EPERM)),
    }
}

/// The flags of an open request that are passed on.
pub fn flags(flags: u32) -> u32 {
    let refused = libc::O_DIRECT | UNNAMED | libc::O_PATH | libc::O_ASYNC;
    flags & !refused.cast_unsigned()
}

/// Allows RENAME_NOREPLACE and RENAME_EXCHANGE, but not RENAME_WHITEOUT, which creates a device node.
pub fn rename(flags: u32) -> io::Result<()> {
    match flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) {
        0 => Ok(()),
        _ => Err(errno(libc::EINVAL)),
    }
}

/// Whether an extended attribute is in the `user.` namespace.
pub fn is_users(name: &[u8]) -> bool {
    name.starts_with(b"user.") && name.len() > 5
}

/// Checks the name of an attribute that the guest wants to change.
pub fn change_attribute(name: &CStr) -> io::Result<()> {
    match is_users(name.to_bytes()) {
        true => Ok(()),
        false => Err(errno(libc::EOPNOTSUPP)),
    }
}

/// Checks the name of an attribute that the guest wants to read. Only `user.*` attributes seem to exist.
pub fn read_attribute(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        bytes if is_users(bytes) => Ok(()),
        bytes if bytes.starts_with(b"system.") => Err(errno(libc::EOPNOTSUPP)),
        _ => Err(errno(libc::ENODATA)),
    }
}

/// Keeps only the `user.*` names of a list in which every name ends with a NUL.
pub fn users_only(list: &[u8]) -> Vec<u8> {
    let names = list.split_inclusive(|&byte| byte == 0);
    let users = names.filter(|name| is_users(name.strip_suffix(b"\0").unwrap_or(name)));
    users.flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_a_directory() {
        for bad in [c"", c".", c"..", c"/", c"a/b", c"../a", c"/etc"] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
        for good in [c"a", c"...", c"..a", c".a", c" "] {
            assert!(name(good).is_ok(), "{good:?}");
        }
        let long = std::ffi::CString::new("x".repeat(256)).unwrap();
        assert!(name(&long).is_err());
    }

    #[test]
    fn devices_cannot_be_made_and_sockets_can() {
        for (mode, allowed) in [
            (libc::S_IFREG | 0o644, true),
            (0o644, true),
            (libc::S_IFSOCK, true),
            (libc::S_IFIFO, true),
            (libc::S_IFCHR, false),
            (libc::S_IFBLK | 0o600, false),
            (libc::S_IFDIR, false),
            (libc::S_IFLNK, false),
        ] {
            assert_eq!(kind(mode).is_ok(), allowed, "{mode:o}");
        }
        assert!(rename(libc::RENAME_NOREPLACE).is_ok());
        assert!(rename(libc::RENAME_WHITEOUT).is_err());
    }

    #[test]
    fn attributes_are_the_users_own() {
        let list = b"user.a\0security.capability\0user.\0trusted.overlay.opaque\0user.b\0";
        assert_eq!(users_only(list), b"user.a\0user.b\0");
        assert!(change_attribute(c"user.x").is_ok());
        assert!(change_attribute(c"security.capability").is_err());
        let missing = read_attribute(c"security.capability").unwrap_err();
        assert_eq!(missing.raw_os_error(), Some(libc::ENODATA));
    }

    #[test]
    fn flags_that_need_aligned_buffers_or_make_no_sense_here_are_dropped() {
        let asked = libc::O_RDWR | libc::O_DIRECT | libc::O_TMPFILE | libc::O_APPEND;
        let kept = libc::O_RDWR | libc::O_DIRECTORY | libc::O_APPEND;
        assert_eq!(flags(asked.cast_unsigned()), kept.cast_unsigned());
    }
}
