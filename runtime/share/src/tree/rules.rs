// SPDX-License-Identifier: Apache-2.0
//! What a guest may ask for, checked before the passthrough hears of it. Pure.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::api::filesystem::Context;

use super::errno;
use crate::idmap::NOBODY;

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`: no attribute, and no list of names, is longer.
pub const ATTRIBUTE_BYTES: u32 = 64 << 10;
/// The kernel's own flag in O_TMPFILE.
const UNNAMED: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// A name in a directory: one component, and not a way up.
pub fn name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        bytes if bytes.len() > 255 => Err(errno(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// Whoever makes a file is somebody: the system calls would take nobody for "as it is", which is root.
pub fn maker(context: &Context) -> io::Result<()> {
    match context.uid == NOBODY || context.gid == NOBODY {
        true => Err(errno(libc::EOVERFLOW)),
        false => Ok(()),
    }
}

/// Files, sockets and pipes can be made; devices cannot.
pub fn kind(mode: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => Ok(()),
        _ => Err(errno(libc::EPERM)),
    }
}

/// Flags of an open file that are passed on.
pub fn flags(flags: u32) -> u32 {
    let refused = libc::O_DIRECT | UNNAMED | libc::O_PATH | libc::O_ASYNC;
    flags & !refused.cast_unsigned()
}

/// RENAME_NOREPLACE and RENAME_EXCHANGE; a whiteout is a device node.
pub fn rename(flags: u32) -> io::Result<()> {
    match flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) {
        0 => Ok(()),
        _ => Err(errno(libc::EINVAL)),
    }
}

/// Whether an extended attribute is the users' own.
pub fn is_users(name: &[u8]) -> bool {
    name.starts_with(b"user.") && name.len() > 5
}

/// An attribute that is to be changed.
pub fn change_attribute(name: &CStr) -> io::Result<()> {
    match is_users(name.to_bytes()) {
        true => Ok(()),
        false => Err(errno(libc::EOPNOTSUPP)),
    }
}

/// An attribute that is asked for. Others than users' are not there.
pub fn read_attribute(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        bytes if is_users(bytes) => Ok(()),
        bytes if bytes.starts_with(b"system.") => Err(errno(libc::EOPNOTSUPP)),
        _ => Err(errno(libc::ENODATA)),
    }
}

/// The users' own names of a list in which each ends with a NUL.
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
