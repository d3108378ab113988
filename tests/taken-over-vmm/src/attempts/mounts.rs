// SPDX-License-Identifier: Apache-2.0
//! Mounts, by the old calls and the new ones.

use libc::{AT_FDCWD, EPERM, MNT_DETACH, MS_BIND, MS_MOVE, MS_REMOUNT, MS_SHARED};

use super::calls::done;
use crate::attempt::Answer::No;
use crate::attempt::{Answer, Attempt};
use crate::world::{Tried, World, call};

const OPEN_TREE_CLONE: i32 = 1;
const AT_RECURSIVE: i32 = 0x8000;
const FORBIDDEN: &[Answer] = &[No(EPERM)];

fn mount(world: &World, kind: &std::ffi::CStr, flags: u64) -> Tried {
    done(call!(world, mount, c"/", c"/", kind, flags, 0))
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("mount a `/proc`", FORBIDDEN, |w| mount(w, c"proc", 0)),
    Attempt::refused("mount a tmpfs", FORBIDDEN, |w| mount(w, c"tmpfs", 0)),
    Attempt::refused("mount a `/sys`", FORBIDDEN, |w| mount(w, c"sysfs", 0)),
    Attempt::refused("mount the host's cgroups", FORBIDDEN, |w| {
        mount(w, c"cgroup2", 0)
    }),
    Attempt::refused("mount the host's devices", FORBIDDEN, |w| {
        mount(w, c"devtmpfs", 0)
    }),
    Attempt::refused("mount by FUSE", FORBIDDEN, |w| mount(w, c"fuse", 0)),
    Attempt::refused("bind a directory", FORBIDDEN, |w| mount(w, c"", MS_BIND)),
    Attempt::refused("make its root writable", FORBIDDEN, |w| {
        mount(w, c"", MS_BIND | MS_REMOUNT)
    }),
    Attempt::refused("share its mounts with others", FORBIDDEN, |w| {
        mount(w, c"", MS_SHARED)
    }),
    Attempt::refused("move its root", FORBIDDEN, |w| mount(w, c"", MS_MOVE)),
    Attempt::refused("unmount its root", FORBIDDEN, |w| {
        done(call!(w, umount2, c"/", MNT_DETACH))
    }),
    Attempt::refused("exchange its root (`pivot_root`)", FORBIDDEN, |w| {
        done(call!(w, pivot_root, c".", c"."))
    }),
    Attempt::refused("make a file system (`fsopen`)", FORBIDDEN, |w| {
        done(call!(w, fsopen, c"tmpfs", 0))
    }),
    Attempt::refused("change a mount (`fspick`)", FORBIDDEN, |w| {
        done(call!(w, fspick, AT_FDCWD, c"/", 0))
    }),
    Attempt::refused("copy a mount (`open_tree`)", FORBIDDEN, |w| {
        done(call!(w, open_tree, AT_FDCWD, c"/", OPEN_TREE_CLONE))
    }),
    Attempt::refused("move a mount (`move_mount`)", FORBIDDEN, |w| {
        done(call!(w, move_mount, AT_FDCWD, c"/", AT_FDCWD, c"/", 0))
    }),
    Attempt::refused(
        "change a mount's settings (`mount_setattr`)",
        FORBIDDEN,
        |w| {
            let settings = [0u64; 4];
            done(call!(
                w,
                mount_setattr,
                AT_FDCWD,
                c"/",
                AT_RECURSIVE,
                &settings,
                32
            ))
        },
    ),
];
