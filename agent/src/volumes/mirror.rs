// SPDX-License-Identifier: Apache-2.0
//! A mirrored volume: a copy of a host directory that kubelet refreshes. The next state is built out of sight. Then it
//! replaces the last one in the same way as kubelet does it, so programs that watch the volume see the same events.
//!
//! ```text
//! <home>/content     what containers mount
//! <home>/next-<n>    the state that stream n is receiving
//! ```
//! A volume that is a single file is overwritten in place, because containers have mounted that very file.
//!
//! Everything here blocks; [`super::mirror_stream`] calls it from a thread that may block.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_proto::agent::mirror_entry::Kind;
use bulkhead_proto::agent::mirror_record::Record;
use bulkhead_proto::agent::{MirrorEntry, Ownership};
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Uid, chownat, mkdirat, openat,
    openat2, renameat_with, symlinkat,
};

use super::ownership;
use crate::users::PodUsers;

/// kubelet's symbolic link to the current state. By changing this link, all files change at once for readers.
const CURRENT: &str = "..data";
const MAX_PATH_BYTES: usize = 4095;
const COMPARED_BYTES: usize = 16 << 10;

/// The part of a volume that containers mount.
pub fn content(home: &Path) -> PathBuf {
    home.join("content")
}

/// Creates an empty mirror.
pub fn prepare(home: &Path, single_file: bool) -> io::Result<()> {
    if single_file {
        File::create_new(content(home)).map(drop)
    } else {
        fs::create_dir(content(home))
    }
}

/// The receiving end of one stream.
#[derive(Debug)]
pub struct Mirror {
    home: PathBuf,
    single_file: bool,
    users: PodUsers,
    streams: Arc<AtomicU64>,
    /// The number of this stream.
    number: u64,
    /// What has been received of the next state.
    next: Option<Next>,
}

/// The next state, as far as it has been received. Dropping it deletes it.
#[derive(Debug)]
struct Next {
    root: PathBuf,
    /// The file of the last entry, if that was a file.
    file: Option<File>,
    /// The ownership of the volume's root.
    ownership: Option<Ownership>,
}

impl Mirror {
    pub fn new(home: PathBuf, single_file: bool, streams: Arc<AtomicU64>) -> Self {
        let number = streams.fetch_add(1, Ordering::SeqCst) + 1;
        Self {
            home,
            single_file,
            users: PodUsers::default(),
            streams,
            number,
            next: None,
        }
    }

    /// Sets that owners in received entries are users of the pod.
    pub fn owned_by(self, users: PodUsers) -> Self {
        Self { users, ..self }
    }

    /// Handles one record of the next state. After an error the caller must give the state up.
    pub fn take(&mut self, record: Record) -> io::Result<()> {
        match record {
            Record::Entry(entry) => self.take_entry(entry),
            Record::Data(bytes) => match self.next.as_mut().and_then(|next| next.file.as_mut()) {
                Some(file) => file.write_all(&bytes),
                None => Err(invalid("data without a file")),
            },
            Record::Restart(_) => {
                self.next = None;
                Ok(())
            }
            Record::Commit(_) => self.commit(),
        }
    }

    /// Discards what has been received of the next state.
    pub fn give_up(&mut self) {
        self.next = None;
    }

    /// Adds one entry. An entry with an empty path is the volume itself.
    fn take_entry(&mut self, entry: MirrorEntry) -> io::Result<()> {
        if self.next.is_none() {
            let root = self.home.join(format!("next-{}", self.number));
            self.next = Some(Next::new(root)?);
        }
        let (Some(next), Some(kind)) = (self.next.as_mut(), entry.kind) else {
            return Err(invalid("entry without a kind"));
        };
        let ownership = entry
            .ownership
            .ok_or_else(|| invalid("entry without an owner"))?;
        let ownership = self.users.owned(&ownership)?;
        next.file = None;
        if entry.path.is_empty() {
            let is_file = matches!(kind, Kind::File(_));
            if is_file != self.single_file {
                return Err(invalid(
                    "the volume is a file on the host and a directory in the guest, or the reverse",
                ));
            }
            if is_file {
                next.file = Some(create_file(
                    &open_directory(&next.root)?,
                    OsStr::new("file"),
                )?);
            }
            next.ownership = Some(ownership);
            return Ok(());
        }
        if self.single_file {
            return Err(invalid("entry below a volume that is a file"));
        }
        next.add(&entry.path, &kind, &ownership)
    }

    fn commit(&mut self) -> io::Result<()> {
        let Some(mut next) = self.next.take() else {
            return Err(invalid("nothing to commit"));
        };
        next.file = None;
        if self.streams.load(Ordering::SeqCst) != self.number {
            return Err(io::Error::other("a newer stream fills this volume"));
        }
        let content = content(&self.home);
        if self.single_file {
            overwrite(&content, &next.root.join("file"))?;
        } else {
            replace(&content, &next.root)?;
        }
        match &next.ownership {
            Some(ownership) => ownership::set_at(&content, ownership),
            None => Ok(()),
        }
    }
}

impl Next {
    fn new(root: PathBuf) -> io::Result<Self> {
        // An earlier state may have been left here when it was given up.
        let _ = fs::remove_dir_all(&root);
        fs::create_dir(&root)?;
        Ok(Self {
            root,
            file: None,
            ownership: None,
        })
    }

    fn add(&mut self, path: &str, kind: &Kind, owner: &Ownership) -> io::Result<()> {
        let path = Path::new(path);
        let plain = path
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(invalid("entry without a name"));
        };
        if !plain || path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(invalid("entry with a path that is too long or not plain"));
        }
        let parent = open_directory(&self.root.join(parent))?;
        match kind {
            Kind::Directory(_) => {
                mkdirat(&parent, name, Mode::from_raw_mode(0o700))?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(&parent, name, flags, Mode::empty())?;
                ownership::set(&made, owner)
            }
            Kind::File(_) => {
                let file = create_file(&parent, name)?;
                ownership::set(&file, owner)?;
                self.file = Some(file);
                Ok(())
            }
            Kind::Link(target) => {
                symlinkat(OsStr::from_bytes(target), &parent, name)?;
                let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                Ok(chownat(&parent, name, Some(uid), Some(gid), flags)?)
            }
        }
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        // If this fails, the next state of this stream removes the directory.
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat2(
        CWD,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?)
}

fn create_file(parent: &OwnedFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::from_raw_mode(0o600))?.into())
}

/// Writes the content of `next` to `content`, which stays the same file.
fn overwrite(content: &Path, next: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(content)?;
    let length = io::copy(&mut File::open(next)?, &mut file)?;
    file.set_len(length)
}

/// Replaces the entries of `content` by those of `next`, name by name at the top level. Each change is one rename.
fn replace(content: &Path, next: &Path) -> io::Result<()> {
    let (old, new) = (open_directory(content)?, open_directory(next)?);
    let wanted = names(next)?;
    let is_directory = |name: &OsString| next.join(name).symlink_metadata().map(|m| m.is_dir());
    let (mut directories, mut others) = (Vec::new(), Vec::new());
    for name in &wanted {
        if is_directory(name)? {
            directories.push(name);
        } else {
            others.push(name);
        }
    }
    // First the link that switches all readers, then the links that lead through it.
    others.sort_by_key(|name| name.as_os_str() != CURRENT);
    for name in directories.into_iter().chain(others) {
        if !same(&content.join(name), &next.join(name))? {
            move_in(&old, &new, content, name)?;
        }
    }
    for name in names(content)? {
        if wanted.binary_search(&name).is_err() {
            remove(&content.join(name))?;
        }
    }
    Ok(())
}

/// Moves one name from `new` to `old`. A directory that it replaces moves to the next state's place and is deleted
/// with it.
fn move_in(old: &OwnedFd, new: &OwnedFd, content: &Path, name: &OsStr) -> io::Result<()> {
    let is_directory = |path: PathBuf| path.symlink_metadata().is_ok_and(|m| m.is_dir());
    let there = content.join(name).symlink_metadata().is_ok();
    let exchange = there
        && (is_directory(content.join(name)) || {
            let stat = rustix::fs::statat(new.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW)?;
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory
        });
    let flags = if exchange {
        RenameFlags::EXCHANGE
    } else {
        RenameFlags::empty()
    };
    Ok(renameat_with(new, name, old, name, flags)?)
}

fn remove(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

/// The names in a directory, sorted.
fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let entries = fs::read_dir(directory)?;
    let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name())).collect();
    let mut names = names?;
    names.sort();
    Ok(names)
}

/// Whether two trees are equal in everything that is mirrored. False if `one` is missing or of an unexpected type.
fn same(one: &Path, other: &Path) -> io::Result<bool> {
    let a = match one.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found?,
    };
    let b = other.symlink_metadata()?;
    let kind = a.file_type();
    let owners = |m: &fs::Metadata| (m.uid(), m.gid());
    if kind != b.file_type() || owners(&a) != owners(&b) || kind.is_fifo() || kind.is_socket() {
        return Ok(false);
    }
    if kind.is_symlink() {
        return Ok(fs::read_link(one)? == fs::read_link(other)?);
    }
    if a.mode() != b.mode() {
        return Ok(false);
    }
    if kind.is_file() {
        return Ok(a.len() == b.len() && same_bytes(one, other)?);
    }
    let (left, right) = (names(one)?, names(other)?);
    if left != right {
        return Ok(false);
    }
    for name in &left {
        if !same(&one.join(name), &other.join(name))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Compares two files of equal length.
fn same_bytes(one: &Path, other: &Path) -> io::Result<bool> {
    let open = |path| {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW);
        options.open(path)
    };
    let (mut one, mut other) = (open(one)?, open(other)?);
    let mut a = vec![0; COMPARED_BYTES];
    let mut b = vec![0; COMPARED_BYTES];
    loop {
        let length = one.read(&mut a)?;
        let (left, right) = (a.split_at(length).0, b.split_at_mut(length).0);
        if length == 0 {
            return Ok(true);
        }
        if other.read_exact(right).is_err() || left != right {
            return Ok(false);
        }
    }
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
