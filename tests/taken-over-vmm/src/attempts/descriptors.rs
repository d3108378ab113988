// SPDX-License-Identifier: Apache-2.0
//! Files that it holds: the guest's kernel, its initramfs and the layers of images, which others share; the scratch disk
//! and the logs, which are its own but belong to root.

use libc::{
    EACCES, EAGAIN, EBADF, EINVAL, ENOTTY, EOPNOTSUPP, EPERM, EROFS, F_ADD_SEALS, F_NOTIFY,
    F_OFD_SETLK, F_SETFL, F_SETLEASE, F_WRLCK, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, LOCK_EX,
    LOCK_NB, MAP_SHARED, O_RDWR, PROT_READ, PROT_WRITE,
};

use super::calls::{done, ioctl, ioctl_on};
use crate::attempt::Answer::{No, Works};
use crate::attempt::{Answer, Attempt};
use crate::world::{Tried, World, call};

/// Requests of linux/fs.h, fsverity.h and ext4.
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;
const FS_IOC_ENABLE_VERITY: u32 = 0x4080_6685;
const FICLONE: u32 = 0x4004_9409;
const FIDEDUPERANGE: u32 = 0xc018_9436;
const FIBMAP: u32 = 1;
const FIFREEZE: u32 = 0xc004_5877;
const FITRIM: u32 = 0xc018_5879;
const EXT4_IOC_SHUTDOWN: u32 = 0x8004_587d;
const EXT4_IOC_SWAP_BOOT: u32 = 0x6611;
const EXT4_IOC_RESIZE_FS: u32 = 0x4008_6610;
const TIOCSTI: u32 = 0x5412;
/// `DN_MODIFY` of fcntl(2).
const DN_MODIFY: i32 = 2;
const FS_IMMUTABLE_FL: u64 = 0x10;

const FOREIGN: &[Answer] = &[No(EPERM), No(EACCES), No(EROFS)];
/// Its own user has no number in its user namespace (EINVAL).
const NOT_OWNED: &[Answer] = &[No(EPERM), No(EROFS), No(EINVAL)];
/// Not every file system has the request.
const FOREIGN_OR_MISSING: &[Answer] = &[
    No(EPERM),
    No(EACCES),
    No(EROFS),
    No(ENOTTY),
    No(EOPNOTSUPP),
    No(EINVAL),
    No(EBADF),
];
const DEDUPED: &[Answer] = &[
    No(EPERM),
    No(EACCES),
    No(EROFS),
    No(ENOTTY),
    No(EOPNOTSUPP),
    No(EINVAL),
    No(EBADF),
    No(libc::EXDEV),
    No(libc::ETXTBSY),
];
const READ_ONLY: &[Answer] = &[No(EBADF)];

fn write(world: &World, fd: i32) -> Tried {
    let byte = [0u8];
    done(call!(world, pwrite64, fd, &byte, 1, 0))
}

fn map_for_writing(world: &World, fd: i32) -> Tried {
    done(call!(
        world,
        mmap,
        0,
        4096,
        PROT_READ | PROT_WRITE,
        MAP_SHARED,
        fd,
        0
    ))
}

fn chmod(world: &World, fd: i32) -> Tried {
    done(call!(world, fchmod, fd, 0o666))
}

fn chown(world: &World, fd: i32) -> Tried {
    let user = call!(world, getuid)?;
    done(call!(world, fchown, fd, user, user))
}

fn set_attribute(world: &World, fd: i32) -> Tried {
    done(call!(world, fsetxattr, fd, c"user.taken", c"x", 1, 0))
}

fn make_immutable(world: &World, fd: i32) -> Tried {
    let mut flags = FS_IMMUTABLE_FL.to_ne_bytes();
    ioctl_on(world, fd, FS_IOC_SETFLAGS, &mut flags)
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("write to the guest's kernel", READ_ONLY, |w| {
        write(w, w.held.kernel)
    }),
    Attempt::refused("write to the initramfs", READ_ONLY, |w| {
        write(w, w.held.initramfs)
    }),
    Attempt::refused("write to the kernel's modules", READ_ONLY, |w| {
        write(w, w.held.modules)
    }),
    Attempt::refused("write to a layer", READ_ONLY, |w| write(w, w.held.layer)),
    Attempt::refused(
        "make a layer's descriptor writable (`F_SETFL`)",
        READ_ONLY,
        |w| {
            call!(w, fcntl, w.held.layer, F_SETFL, O_RDWR)?;
            write(w, w.held.layer)
        },
    ),
    Attempt::refused("map the guest's kernel for writing", &[No(EACCES)], |w| {
        map_for_writing(w, w.held.kernel)
    }),
    Attempt::refused("map a layer for writing", &[No(EACCES)], |w| {
        map_for_writing(w, w.held.layer)
    }),
    Attempt::refused("make a map of a layer writable later", &[No(EACCES)], |w| {
        let page = call!(w, mmap, 0, 4096, PROT_READ, MAP_SHARED, w.held.layer, 0)?;
        done(call!(w, mprotect, page, 4096, PROT_READ | PROT_WRITE))
    }),
    Attempt::refused("truncate a layer", &[No(EINVAL), No(EBADF)], |w| {
        done(call!(w, ftruncate, w.held.layer, 0))
    }),
    Attempt::refused("punch a hole into a layer", READ_ONLY, |w| {
        let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        done(call!(w, fallocate, w.held.layer, mode, 0, 4096))
    }),
    Attempt::refused(
        "copy the scratch disk over a layer",
        &[No(EBADF), No(EINVAL)],
        |w| {
            let mut offset = [0i64];
            done(call!(
                w,
                copy_file_range,
                w.held.scratch,
                &mut offset,
                w.held.layer,
                0,
                4096,
                0
            ))
        },
    ),
    Attempt::refused("splice a pipe into a layer", READ_ONLY, |w| {
        let mut pipe = [0i32; 2];
        call!(w, pipe2, &mut pipe, 0)?;
        call!(w, write, pipe[1], b"x", 1)?;
        let mut offset = [0i64];
        done(call!(
            w,
            splice,
            pipe[0],
            0,
            w.held.layer,
            &mut offset,
            1,
            0
        ))
    }),
    Attempt::refused("send a file into a layer (`sendfile`)", READ_ONLY, |w| {
        let mut offset = [0i64];
        done(call!(
            w,
            sendfile,
            w.held.layer,
            w.held.kernel,
            &mut offset,
            1
        ))
    }),
    Attempt::refused(
        "clone the scratch disk into a layer",
        FOREIGN_OR_MISSING,
        |w| ioctl(w, w.held.layer, FICLONE, w.held.scratch.into()),
    ),
    Attempt::refused("merge blocks of a layer (`FIDEDUPERANGE`)", DEDUPED, |w| {
        // struct file_dedupe_range with one destination, the layer; its status is the fourth word there.
        let destination = u64::from(w.held.layer.cast_unsigned());
        let mut range = [0u64; 7];
        range[1] = 4096;
        range[2] = 1;
        range[3] = destination;
        call!(w, ioctl, w.held.scratch, FIDEDUPERANGE, &mut range)?;
        let status = range[6].to_ne_bytes();
        match i32::from_ne_bytes([status[0], status[1], status[2], status[3]]) {
            refused if refused < 0 => Err(-refused),
            _ => Ok(range[5] != 0),
        }
    }),
    Attempt::refused("change a layer's mode", FOREIGN, |w| chmod(w, w.held.layer)),
    Attempt::refused("change the kernel's mode", FOREIGN, |w| {
        chmod(w, w.held.kernel)
    }),
    Attempt::refused("change the scratch disk's mode", FOREIGN, |w| {
        chmod(w, w.held.scratch)
    }),
    Attempt::refused("change the log's mode", FOREIGN, |w| chmod(w, w.held.log)),
    Attempt::refused("own a layer", NOT_OWNED, |w| chown(w, w.held.layer)),
    Attempt::refused("own the scratch disk", NOT_OWNED, |w| {
        chown(w, w.held.scratch)
    }),
    Attempt::refused("set a layer's times", FOREIGN, |w| {
        done(call!(w, utimensat, w.held.layer, 0, 0, 0))
    }),
    Attempt::refused("set an attribute of a layer", FOREIGN_OR_MISSING, |w| {
        set_attribute(w, w.held.layer)
    }),
    Attempt::refused(
        "set an attribute of the scratch disk",
        FOREIGN_OR_MISSING,
        |w| set_attribute(w, w.held.scratch),
    ),
    Attempt::refused("make a layer immutable", FOREIGN_OR_MISSING, |w| {
        make_immutable(w, w.held.layer)
    }),
    Attempt::refused("make the scratch disk immutable", FOREIGN_OR_MISSING, |w| {
        make_immutable(w, w.held.scratch)
    }),
    Attempt::refused(
        "leave the host's quota by the scratch disk",
        FOREIGN_OR_MISSING,
        |w| {
            // struct fsxattr: another project.
            let mut attributes = [0u8; 28];
            attributes[12] = 7;
            ioctl_on(w, w.held.scratch, FS_IOC_FSSETXATTR, &mut attributes)
        },
    ),
    Attempt::refused("seal a layer by fs-verity", FOREIGN_OR_MISSING, |w| {
        let mut settings = [0u8; 128];
        settings[..12].copy_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0]);
        ioctl_on(w, w.held.layer, FS_IOC_ENABLE_VERITY, &mut settings)
    }),
    Attempt::refused(
        "seal a layer as memory (`F_ADD_SEALS`)",
        &[No(EINVAL), No(EPERM)],
        |w| {
            done(call!(
                w,
                fcntl,
                w.held.layer,
                F_ADD_SEALS,
                libc::F_SEAL_WRITE
            ))
        },
    ),
    Attempt::refused("freeze the layer's file system", FOREIGN_OR_MISSING, |w| {
        ioctl(w, w.held.layer, FIFREEZE, 0)
    }),
    Attempt::refused(
        "trim the file system of the scratch disk",
        FOREIGN_OR_MISSING,
        |w| {
            let mut range = [0u8; 24];
            range[8..16].copy_from_slice(&[0xff; 8]);
            ioctl_on(w, w.held.scratch, FITRIM, &mut range)
        },
    ),
    Attempt::refused(
        "find a file's blocks on the host's disk (`FIBMAP`)",
        FOREIGN_OR_MISSING,
        |w| {
            let mut block = [0u8; 4];
            ioctl_on(w, w.held.scratch, FIBMAP, &mut block)
        },
    ),
    Attempt::refused(
        "shut the host's file system down",
        FOREIGN_OR_MISSING,
        |w| {
            let mut flags = [0u8; 4];
            ioctl_on(w, w.held.scratch, EXT4_IOC_SHUTDOWN, &mut flags)
        },
    ),
    Attempt::refused(
        "put the scratch disk in the boot loader's place",
        FOREIGN_OR_MISSING,
        |w| ioctl(w, w.held.scratch, EXT4_IOC_SWAP_BOOT, 0),
    ),
    Attempt::refused("resize the host's file system", FOREIGN_OR_MISSING, |w| {
        let mut blocks = [0u8; 8];
        ioctl_on(w, w.held.scratch, EXT4_IOC_RESIZE_FS, &mut blocks)
    }),
    Attempt::refused(
        "hold a layer's lease",
        &[No(EACCES), No(EINVAL), No(EAGAIN)],
        |w| done(call!(w, fcntl, w.held.layer, F_SETLEASE, libc::F_RDLCK)),
    ),
    Attempt::refused("lock a layer for writing (`fcntl`)", READ_ONLY, |w| {
        // struct flock for the whole file.
        let kind = u64::try_from(F_WRLCK).unwrap_or(0);
        let lock = [kind, 0, 0, 0];
        done(call!(w, fcntl, w.held.layer, F_OFD_SETLK, &lock))
    }),
    Attempt::harmless(
        "lock a layer (`flock`)",
        &[Works, No(EAGAIN)],
        "nobody else locks layers",
        |w| done(call!(w, flock, w.held.layer, LOCK_EX | LOCK_NB)),
    ),
    Attempt::harmless(
        "lock the guest's kernel (`flock`)",
        &[Works, No(EAGAIN), No(EBADF)],
        "nobody else locks it",
        |w| done(call!(w, flock, w.held.kernel, LOCK_EX | LOCK_NB)),
    ),
    Attempt::refused(
        "have changes of a file told (`F_NOTIFY`)",
        &[No(libc::ENOTDIR), No(EINVAL)],
        |w| done(call!(w, fcntl, w.held.layer, F_NOTIFY, DN_MODIFY)),
    ),
    Attempt::refused("read the console's log", READ_ONLY, |w| {
        let mut byte = [0u8];
        done(call!(w, pread64, w.held.console, &mut byte, 1, 0))
    }),
    Attempt::refused("read the log of what its processes said", READ_ONLY, |w| {
        let mut byte = [0u8];
        done(call!(w, pread64, w.held.log, &mut byte, 1, 0))
    }),
    Attempt::refused("write to the pipe of its configuration", READ_ONLY, |w| {
        done(call!(w, write, w.held.input, b"x", 1))
    }),
    Attempt::refused(
        "type into a terminal (`TIOCSTI`)",
        &[No(ENOTTY), No(EINVAL)],
        |w| {
            let mut key = *b"x";
            ioctl_on(w, w.held.input, TIOCSTI, &mut key)
        },
    ),
    Attempt::harmless(
        "write over earlier lines of the VMM's log (`F_SETFL`)",
        &[Works],
        "it is that of this VM; the daemon's own log says what happened, too",
        |w| done(call!(w, fcntl, w.held.log, F_SETFL, 0)),
    ),
];
