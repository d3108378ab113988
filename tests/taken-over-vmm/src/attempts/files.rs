// SPDX-License-Identifier: Apache-2.0
//! Files of the host, by every road that needs a path or a handle.

use std::ffi::CString;

use libc::{
    AT_EMPTY_PATH, AT_FDCWD, EACCES, EBADF, EEXIST, EINVAL, ENOENT, ENOTDIR, EOPNOTSUPP, EPERM,
    EROFS, ESTALE, EXDEV, O_CREAT, O_DIRECTORY, O_PATH, O_RDONLY, O_RDWR, O_TMPFILE, O_WRONLY,
};

use super::calls::{done, list, open};
use crate::attempt::Answer::{No, Nothing};
use crate::attempt::Attempt;
use crate::world::call;

const GONE: &[crate::attempt::Answer] = &[No(ENOENT)];
const NOT_MADE: &[crate::attempt::Answer] = &[No(EROFS), No(EACCES)];

fn path(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("list `/`", &[No(EACCES), Nothing], |w| list(w, c"/")),
    Attempt::refused("list `..` of `/`", &[No(EACCES), Nothing], |w| {
        list(w, c"/../../../..")
    }),
    Attempt::refused("read `/etc/passwd`", GONE, |w| {
        open(w, c"/etc/passwd", O_RDONLY)
    }),
    Attempt::refused("read `/../../etc/shadow`", GONE, |w| {
        open(w, c"/../../etc/shadow", O_RDONLY)
    }),
    Attempt::refused("find a path with `O_PATH`", GONE, |w| {
        open(w, c"/etc", O_PATH)
    }),
    Attempt::refused("write its own memory by `/proc/self/mem`", GONE, |w| {
        open(w, c"/proc/self/mem", O_RDWR)
    }),
    Attempt::refused("read the daemon's memory by `/proc`", GONE, |w| {
        open(w, &path(format!("/proc/{}/mem", w.facts.daemon)), O_RDONLY)
    }),
    Attempt::refused("read another VMM's memory by `/proc`", GONE, |w| {
        open(
            w,
            &path(format!("/proc/{}/mem", w.facts.neighbour)),
            O_RDONLY,
        )
    }),
    Attempt::refused("enter the host's root by `/proc/1/root`", GONE, |w| {
        open(w, c"/proc/1/root/etc", O_RDONLY | O_DIRECTORY)
    }),
    Attempt::refused("write `core_pattern`", GONE, |w| {
        open(w, c"/proc/sys/kernel/core_pattern", O_WRONLY)
    }),
    Attempt::refused("write `sysrq-trigger`", GONE, |w| {
        open(w, c"/proc/sysrq-trigger", O_WRONLY)
    }),
    Attempt::refused("write its `oom_score_adj`", GONE, |w| {
        open(w, c"/proc/self/oom_score_adj", O_WRONLY)
    }),
    Attempt::refused("write its map of users", GONE, |w| {
        open(w, c"/proc/self/uid_map", O_WRONLY)
    }),
    Attempt::refused("list `/sys/kernel`", GONE, |w| list(w, c"/sys/kernel")),
    Attempt::refused("leave its cgroup", GONE, |w| {
        open(w, c"/sys/fs/cgroup/cgroup.procs", O_WRONLY)
    }),
    Attempt::refused("open `/dev/mem`", GONE, |w| open(w, c"/dev/mem", O_RDWR)),
    Attempt::refused("open `/dev/kvm`", GONE, |w| open(w, c"/dev/kvm", O_RDWR)),
    Attempt::refused("open a disk of the host", GONE, |w| {
        open(w, c"/dev/vda", O_RDONLY)
    }),
    Attempt::refused("open the terminal", GONE, |w| open(w, c"/dev/tty", O_RDWR)),
    Attempt::refused("list `/dev/shm`", GONE, |w| list(w, c"/dev/shm")),
    Attempt::refused("list the directories of all VMs", GONE, |w| {
        list(w, &w.facts.path("run/pods"))
    }),
    Attempt::refused("list the layers of all images", GONE, |w| {
        list(w, &w.facts.path("state"))
    }),
    Attempt::refused("look at the daemon's socket", GONE, |w| {
        let mut about = [0u8; 256];
        let socket = w.facts.path("run/bulkhead.sock");
        done(call!(
            w,
            newfstatat,
            AT_FDCWD,
            socket.as_c_str(),
            &mut about,
            0
        ))
    }),
    Attempt::refused(
        "open a path below a file that it holds",
        &[No(ENOTDIR)],
        |w| done(call!(w, openat, w.held.kernel, c"../passwd", O_RDONLY)),
    ),
    Attempt::refused(
        "open the kernel's image again for writing, by `/proc`",
        GONE,
        |w| open(w, &path(format!("/proc/self/fd/{}", w.held.kernel)), O_RDWR),
    ),
    Attempt::refused("open a layer again for writing, by `/proc`", GONE, |w| {
        open(w, &path(format!("/proc/self/fd/{}", w.held.layer)), O_RDWR)
    }),
    Attempt::refused("open a layer again for writing, by `/dev/fd`", GONE, |w| {
        open(w, &path(format!("/dev/fd/{}", w.held.layer)), O_RDWR)
    }),
    Attempt::refused(
        "open a layer again for writing, without a path",
        &[No(ENOENT), No(ENOTDIR), No(EINVAL)],
        |w| done(call!(w, openat, w.held.layer, c"", O_RDWR)),
    ),
    Attempt::refused(
        "give a layer a name in its root (`linkat`)",
        &[No(ENOENT), No(EXDEV), No(EPERM), No(EROFS)],
        |w| {
            done(call!(
                w,
                linkat,
                w.held.layer,
                c"",
                AT_FDCWD,
                c"/layer",
                AT_EMPTY_PATH
            ))
        },
    ),
    Attempt::refused(
        "open a layer by its handle",
        &[No(EPERM), No(EOPNOTSUPP), No(ESTALE)],
        |w| {
            let mut handle = [0u8; 136];
            handle[0] = 128;
            let mut mount = [0i32];
            let flags = AT_EMPTY_PATH;
            call!(
                w,
                name_to_handle_at,
                w.held.layer,
                c"",
                &mut handle,
                &mut mount,
                flags
            )?;
            done(call!(w, open_by_handle_at, w.held.layer, &handle, O_RDWR))
        },
    ),
    Attempt::refused(
        "open the root of a disk by a guessed handle",
        &[No(EPERM), No(ESTALE)],
        |w| {
            // A handle of 8 bytes and type 1: inode 2 is the root of ext4.
            let handle = [8u32, 1, 2, 0];
            done(call!(
                w,
                open_by_handle_at,
                w.held.scratch,
                &handle,
                O_RDONLY
            ))
        },
    ),
    Attempt::refused("make a file", NOT_MADE, |w| {
        open(w, c"/file", O_CREAT | O_WRONLY)
    }),
    Attempt::refused(
        "make a file without a name",
        &[No(EROFS), No(EACCES), No(EOPNOTSUPP)],
        |w| open(w, c"/", O_TMPFILE | O_RDWR),
    ),
    Attempt::refused("make a directory", NOT_MADE, |w| {
        done(call!(w, mkdirat, AT_FDCWD, c"/directory", 0o700))
    }),
    Attempt::refused(
        "make a device node for KVM",
        &[No(EROFS), No(EACCES), No(EPERM)],
        |w| {
            let kvm = (10 << 8) | 232;
            done(call!(
                w,
                mknodat,
                AT_FDCWD,
                c"/kvm",
                libc::S_IFCHR | 0o666,
                kvm
            ))
        },
    ),
    Attempt::refused("make a symbolic link", NOT_MADE, |w| {
        done(call!(w, symlinkat, c"/proc", AT_FDCWD, c"/link"))
    }),
    Attempt::refused(
        "change its root's mode",
        &[No(EROFS), No(EPERM), No(EACCES)],
        |w| done(call!(w, fchmodat, AT_FDCWD, c"/", 0o777)),
    ),
    Attempt::refused(
        "rename its root",
        &[No(EROFS), No(EACCES), No(EEXIST), No(libc::EBUSY)],
        |w| done(call!(w, renameat, AT_FDCWD, c"/", AT_FDCWD, c"/other")),
    ),
    Attempt::refused("change its root (`chroot`)", &[No(EPERM)], |w| {
        done(call!(w, chroot, c"/"))
    }),
    Attempt::refused(
        "change to a directory that it does not hold",
        &[No(ENOTDIR), No(EBADF)],
        |w| done(call!(w, fchdir, w.held.kernel)),
    ),
];
