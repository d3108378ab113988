// SPDX-License-Identifier: Apache-2.0
//! The FUSE requests: each is checked by [`super::rules`], passed to its share, and node numbers are translated.

use std::ffi::CStr;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ROOT_ID, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};

use super::{Tree, errno, rules};

/// The options to agree on, as far as the driver offers them. Locks are not among them: the guest handles them itself.
const WANTED: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::READDIRPLUS_AUTO)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::HANDLE_KILLPRIV_V2);

type Opened = (Option<u64>, OpenOptions, Option<u32>);

impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let agreed = capable & WANTED;
        self.options.store(agreed.bits(), Ordering::Relaxed);
        Ok(agreed)
    }

    fn destroy(&self) {
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        shares.clear();
    }

    fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        rules::name(name)?;
        if parent == ROOT_ID {
            return self.lookup_share(context, name);
        }
        let (share, parent) = self.node(parent)?;
        Ok(share.entry(share.files.lookup(context, parent, name)?))
    }

    fn forget(&self, context: &Context, node: u64, count: u64) {
        if let Ok((share, node)) = self.node(node) {
            share.files.forget(context, node, count);
        }
    }

    fn getattr(
        &self,
        context: &Context,
        node: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        if node == ROOT_ID {
            let root = std::fs::File::open(&self.root)?;
            let attr = crate::sys::stat(&root)?;
            return Ok((attr, Duration::ZERO));
        }
        let (share, node) = self.node(node)?;
        share.files.getattr(context, node, handle)
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (share, node) = self.node(node)?;
        share.files.setattr(context, node, attr, handle, valid)
    }

    fn readlink(&self, context: &Context, node: u64) -> io::Result<Vec<u8>> {
        let (share, node) = self.node(node)?;
        share.files.readlink(context, node)
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        rules::maker(context)?;
        rules::name(name)?;
        let (share, parent) = self.node(parent)?;
        Ok(share.entry(share.files.symlink(context, target, parent, name)?))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        rules::maker(context)?;
        rules::name(name)?;
        rules::kind(mode)?;
        let (share, parent) = self.node(parent)?;
        Ok(share.entry(share.files.mknod(context, parent, name, mode, 0, umask)?))
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        rules::maker(context)?;
        rules::name(name)?;
        let (share, parent) = self.node(parent)?;
        Ok(share.entry(share.files.mkdir(context, parent, name, mode, umask)?))
    }

    fn unlink(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        rules::name(name)?;
        let (share, parent) = self.node(parent)?;
        share.files.unlink(context, parent, name)
    }

    fn rmdir(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        rules::name(name)?;
        let (share, parent) = self.node(parent)?;
        share.files.rmdir(context, parent, name)
    }

    fn rename(
        &self,
        context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        rules::name(old_name)?;
        rules::name(new_name)?;
        rules::rename(flags)?;
        let (share, old) = self.node(old_parent)?;
        let (other, new) = self.node(new_parent)?;
        if !Arc::ptr_eq(&share, &other) {
            return Err(errno(libc::EXDEV));
        }
        share
            .files
            .rename(context, old, old_name, new, new_name, flags)
    }

    fn link(&self, context: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        rules::name(name)?;
        let (share, node) = self.node(node)?;
        let (other, parent) = self.node(parent)?;
        if !Arc::ptr_eq(&share, &other) {
            return Err(errno(libc::EXDEV));
        }
        Ok(share.entry(share.files.link(context, node, parent, name)?))
    }

    fn open(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<Opened> {
        let (share, node) = self.node(node)?;
        share
            .files
            .open(context, node, rules::flags(flags), fuse_flags)
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        rules::maker(context)?;
        rules::name(name)?;
        rules::kind(args.mode & !libc::S_IFREG)?;
        args.flags = rules::flags(args.flags);
        let (share, parent) = self.node(parent)?;
        let (entry, handle, options, backing) = share.files.create(context, parent, name, args)?;
        Ok((share.entry(entry), handle, options, backing))
    }

    fn read(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let (share, node) = self.node(node)?;
        let flags = rules::flags(flags);
        let files = &share.files;
        files.read(context, node, handle, to, size, offset, owner, flags)
    }

    fn write(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (share, node) = self.node(node)?;
        share.files.write(
            context,
            node,
            handle,
            from,
            size,
            offset,
            owner,
            delayed,
            rules::flags(flags),
            fuse_flags,
        )
    }

    fn flush(&self, context: &Context, node: u64, handle: u64, owner: u64) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        share.files.flush(context, node, handle, owner)
    }

    fn fsync(&self, context: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        share.files.fsync(context, node, data_only, handle)
    }

    fn fallocate(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        share
            .files
            .fallocate(context, node, handle, mode, offset, length)
    }

    fn release(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        unlock: bool,
        owner: Option<u64>,
    ) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        let files = &share.files;
        files.release(context, node, flags, handle, flush, unlock, owner)
    }

    fn statfs(&self, context: &Context, node: u64) -> io::Result<statvfs64> {
        let (share, node) = self.node(node)?;
        share.files.statfs(context, node)
    }

    fn setxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        rules::change_attribute(name)?;
        let (share, node) = self.node(node)?;
        share.files.setxattr(context, node, name, value, flags)
    }

    fn getxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        rules::read_attribute(name)?;
        let (share, node) = self.node(node)?;
        let size = size.min(rules::ATTRIBUTE_BYTES);
        share.files.getxattr(context, node, name, size)
    }

    fn listxattr(&self, context: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let (share, node) = self.node(node)?;
        let all = share
            .files
            .listxattr(context, node, rules::ATTRIBUTE_BYTES)?;
        let names = match all {
            ListxattrReply::Names(names) => rules::users_only(&names),
            ListxattrReply::Count(_) => Vec::new(),
        };
        let count = u32::try_from(names.len()).map_err(io::Error::other)?;
        match size {
            0 => Ok(ListxattrReply::Count(count)),
            size if size < count => Err(errno(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, context: &Context, node: u64, name: &CStr) -> io::Result<()> {
        rules::change_attribute(name)?;
        let (share, node) = self.node(node)?;
        share.files.removexattr(context, node, name)
    }

    fn opendir(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (share, node) = self.node(node)?;
        share.files.opendir(context, node, rules::flags(flags))
    }

    fn readdir(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        share
            .files
            .readdir(context, node, handle, size, offset, add)
    }

    fn readdirplus(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        let mut translated = |found: DirEntry<'_>, entry: Entry| add(found, share.entry(entry));
        let files = &share.files;
        files.readdirplus(context, node, handle, size, offset, &mut translated)
    }

    fn fsyncdir(
        &self,
        context: &Context,
        node: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        share.files.fsyncdir(context, node, data_only, handle)
    }

    fn releasedir(&self, context: &Context, node: u64, flags: u32, handle: u64) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        share.files.releasedir(context, node, flags, handle)
    }

    fn access(&self, context: &Context, node: u64, mask: u32) -> io::Result<()> {
        let (share, node) = self.node(node)?;
        share.files.access(context, node, mask)
    }

    fn lseek(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let (share, node) = self.node(node)?;
        share.files.lseek(context, node, handle, offset, whence)
    }
}
