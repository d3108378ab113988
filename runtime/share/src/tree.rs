// SPDX-License-Identifier: Apache-2.0
//! One file system that contains all shares, and the rules that every request of a guest must obey. All
//! workers call it.
//!
//! The root directory has one name per share; nothing can be created in it. Each share is its own passthrough
//! file system of fuse-backend-rs. It is opened when the guest first looks it up, and dropped when it is no
//! longer mounted. A node's number has the share's number in its upper 16 bits and the passthrough's own
//! number in the others.
//!
//! | rule | why |
//! |---|---|
//! | no `..`, no `.`; the passthrough never follows a symbolic link | no name can leave a share |
//! | no device nodes | device numbers of guest and host have nothing to do with each other |
//! | only extended attributes named `user.*` | `security.*` and `trusted.*` would take effect on the host |
//! | a file is always created for a user and a group | without them it would belong to root |
//! | no O_DIRECT, no unnamed files | buffers are not aligned; the host's page cache serves all guests |

mod calls;
mod rules;

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem, FsOptions, ROOT_ID};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::name::{Propagation, ShareName};

const NUMBER_SHIFT: u32 = 48;
/// How long a guest may cache names and attributes that the host may change.
const PRIVATE_TIMEOUT: Duration = Duration::from_secs(1);

/// All shares of one guest.
pub struct Tree {
    root: PathBuf,
    shares: RwLock<BTreeMap<u16, Arc<Share>>>,
    /// The options that were agreed on with the guest's driver.
    options: AtomicU64,
}

/// A directory or file of the host.
struct Share {
    name: ShareName,
    /// The id of its mount. Later the same name may be another mount.
    mount: u64,
    files: PassthroughFs<()>,
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl Tree {
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            shares: RwLock::default(),
            options: AtomicU64::new(0),
        }
    }

    /// Drops shares that are no longer mounted, so that the server does not keep the host's file systems busy.
    pub fn sweep(&self) {
        let is_there = |share: &Share| self.mount_of(share.name).ok() == Some(share.mount);
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        shares.retain(|_, share| is_there(share));
    }

    fn path(&self, name: ShareName) -> PathBuf {
        self.root.join(name.to_string())
    }

    fn mount_of(&self, name: ShareName) -> io::Result<u64> {
        mount_id(&self.path(name))
    }

    /// The share with this name, as it is mounted now.
    fn share(&self, name: ShareName) -> io::Result<Arc<Share>> {
        let mount = self.mount_of(name)?;
        let found = {
            let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
            shares.get(&name.number).map(Arc::clone)
        };
        match found {
            Some(share) if share.name == name && share.mount == mount => Ok(share),
            // Numbers are used only once, so what the guest knows belongs to an earlier share.
            Some(_) => Err(errno(libc::ESTALE)),
            // There is a mount point, but nothing is mounted on it.
            None if mount == mount_id(&self.root)? => Err(errno(libc::ENOENT)),
            None => self.admit(name, mount),
        }
    }

    fn admit(&self, name: ShareName, mount: u64) -> io::Result<Arc<Share>> {
        let files = PassthroughFs::new(config(&self.path(name), name.propagation)?)?;
        let options = self.options.load(Ordering::Relaxed);
        files.init(FsOptions::from_bits_truncate(options))?;
        let share = Arc::new(Share { name, mount, files });
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(shares.entry(name.number).or_insert(share)))
    }

    /// The share that a node belongs to, and the node's number in that share.
    fn node(&self, node: u64) -> io::Result<(Arc<Share>, u64)> {
        let number = u16::try_from(node >> NUMBER_SHIFT).unwrap_or(0);
        if number == 0 {
            // The root can only be looked at.
            return Err(errno(libc::EACCES));
        }
        let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
        let share = shares.get(&number).ok_or_else(|| errno(libc::ESTALE))?;
        Ok((Arc::clone(share), node & ((1 << NUMBER_SHIFT) - 1)))
    }

    fn lookup_share(&self, context: &Context, name: &CStr) -> io::Result<Entry> {
        let name = name.to_str().ok().and_then(ShareName::parse);
        let share = self.share(name.ok_or_else(|| errno(libc::ENOENT))?)?;
        let (attr, attr_timeout) = share.files.getattr(context, ROOT_ID, None)?;
        Ok(Entry {
            inode: share.outer(ROOT_ID),
            generation: 0,
            attr,
            attr_flags: 0,
            attr_timeout,
            entry_timeout: Duration::ZERO,
        })
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Tree {
    /// A tree with these directories of `root` as its shares. Nothing is mounted, so they are opened as if they were.
    pub fn of_directories(root: &Path, names: &[&str]) -> io::Result<Self> {
        let tree = Self::new(root.to_owned());
        tree.init(FsOptions::all())?;
        for name in names {
            let mount = mount_id(&root.join(name))?;
            let name = ShareName::parse(name).ok_or_else(|| errno(libc::EINVAL))?;
            tree.admit(name, mount)?;
        }
        Ok(tree)
    }
}

impl Share {
    fn outer(&self, node: u64) -> u64 {
        u64::from(self.name.number) << NUMBER_SHIFT | node
    }

    fn entry(&self, mut entry: Entry) -> Entry {
        entry.inode = self.outer(entry.inode);
        entry
    }
}

fn mount_id(path: &Path) -> io::Result<u64> {
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID)?;
    Ok(found.stx_mnt_id)
}

fn config(path: &Path, propagation: Propagation) -> io::Result<Config> {
    let timeout = match propagation {
        Propagation::Private => PRIVATE_TIMEOUT,
        Propagation::Slave => Duration::ZERO,
    };
    let root_dir = path.to_str().ok_or_else(|| errno(libc::EINVAL))?;
    Ok(Config {
        root_dir: root_dir.to_owned(),
        entry_timeout: timeout,
        attr_timeout: timeout,
        // The guest caches data until the file is opened again or its size or time changes.
        cache_policy: CachePolicy::Auto,
        writeback: false,
        xattr: true,
        killpriv_v2: true,
        // The same file in two mounts is two nodes, because one of the mounts may be read-only.
        enable_mntid: true,
        allow_direct_io: false,
        ..Config::default()
    })
}

#[cfg(test)]
pub(super) mod tests;
