// SPDX-License-Identifier: Apache-2.0
//! The volumes that this guest keeps for its containers: file systems on disk, files of the scratch disk, and file
//! systems in memory. They outlive containers. They end when they are removed or with the guest, except those on disk,
//! which the next guest of the same pod mounts again.
//!
//! Everything here blocks, so it must be called from a thread that may block. [`mounts`] translates the mounts that a
//! container wants into those that its first process makes, and [`declared`] makes the volumes that images declare.

pub mod declared;
mod disks;
mod environment;
mod kind;
pub mod mirror;
pub mod mirror_stream;
pub mod mounts;
mod ownership;

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::{EnvironmentFile, Ownership, Volume};

use self::disks::Disks;
use self::kind::Kind;
use self::mirror::Mirror;
use crate::disk::extent::BadExtent;
use crate::disk::scratch;
use crate::users::PodUsers;

/// Where volumes in memory are mounted.
const IN_MEMORY: &str = "/run/volumes";
const MAX_VOLUMES: usize = 65536;
const MAX_NAME_BYTES: usize = 128;
const MAX_READ_BYTES: u64 = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("{0:?} is not a valid name of a volume")]
    Name(String),
    #[error("volume without {0}")]
    Missing(&'static str),
    #[error("volume on disk")]
    Extent(#[from] BadExtent),
    #[error("too many volumes, at most {MAX_VOLUMES} are possible")]
    TooMany,
    #[error("volume {0} does not exist")]
    NotFound(String),
    #[error("volume {0} is of another kind")]
    OtherKind(String),
    #[error("{what} volume {name}")]
    System {
        what: &'static str,
        name: String,
        source: io::Error,
    },
}

/// A volume that exists.
#[derive(Debug)]
struct Entry {
    kind: Kind,
    /// The ownership of the last request. Changes that containers made later stay until another ownership is requested.
    ownership: Ownership,
    /// How many streams have filled the volume. Only the newest one may fill it.
    streams: Arc<AtomicU64>,
}

/// All volumes of this guest. Clones share them.
#[derive(Clone, Debug)]
pub struct Volumes {
    on_disk: PathBuf,
    /// The users to whom volumes belong.
    users: PodUsers,
    disks: Disks,
    known: Arc<Mutex<HashMap<String, Entry>>>,
}

impl Volumes {
    /// Starts without volumes.
    pub fn new(users: PodUsers) -> Self {
        Self {
            on_disk: Path::new(scratch::MOUNT).join("volumes"),
            users,
            disks: Disks::default(),
            known: Arc::default(),
        }
    }

    /// Creates a volume, or checks that it exists.
    pub fn ensure(&self, volume: Option<Volume>) -> Result<(), VolumeError> {
        let volume = volume.ok_or(VolumeError::Missing("a description"))?;
        let name = volume.name;
        check_name(&name)?;
        let ownership = volume.ownership.ok_or(VolumeError::Missing("an owner"))?;
        let ownership = self.users.owned(&ownership);
        let ownership = ownership.map_err(failed("map the owner of", &name))?;
        let kind = Kind::try_from(volume.kind.ok_or(VolumeError::Missing("a kind"))?)?;
        let (home, path) = (self.home(&name, kind), self.path(&name, kind));
        let mut known = self.lock();
        let full = known.len() >= MAX_VOLUMES;
        match known.get_mut(&name) {
            Some(entry) if entry.kind != kind => Err(VolumeError::OtherKind(name)),
            Some(entry) if entry.ownership == ownership => Ok(()),
            Some(entry) => {
                set_ownership(&name, &path, &ownership)?;
                entry.ownership = ownership;
                Ok(())
            }
            None if full => Err(VolumeError::TooMany),
            None => {
                match kind {
                    Kind::Disk(extent) => {
                        let mounted = self.disks.mount(&name, extent, &ownership);
                        mounted.map_err(failed("mount", &name))?;
                    }
                    _ => {
                        let made = kind.make(&home).map_err(failed("create", &name));
                        let made = made.and_then(|()| set_ownership(&name, &path, &ownership));
                        made.inspect_err(|_| drop(kind.unmake(&home)))?;
                    }
                }
                let streams = Arc::default();
                let entry = Entry {
                    kind,
                    ownership,
                    streams,
                };
                known.insert(name, entry);
                Ok(())
            }
        }
    }

    /// Removes a volume. It is no error if there is none.
    pub fn remove(&self, name: &str) -> Result<(), VolumeError> {
        let mut known = self.lock();
        let Some(kind) = known.get(name).map(|entry| entry.kind) else {
            return Ok(());
        };
        match kind {
            Kind::Disk(_) => self.disks.unmount(name),
            _ => kind.unmake(&self.home(name, kind)),
        }
        .map_err(failed("remove", name))?;
        known.remove(name);
        Ok(())
    }

    /// Reads at most the last `limit` bytes of a volume that is a file.
    pub fn read_end(&self, name: &str, limit: u32) -> Result<Vec<u8>, VolumeError> {
        let kind = self.lock().get(name).map(|entry| entry.kind);
        let path = match kind {
            Some(Kind::File) => self.path(name, Kind::File),
            Some(_) => return Err(VolumeError::OtherKind(name.to_owned())),
            None => return Err(VolumeError::NotFound(name.to_owned())),
        };
        read_end(&path, u64::from(limit).min(MAX_READ_BYTES)).map_err(failed("read", name))
    }

    /// The files of an emptyDir from which kubelet may read environment variables on the host.
    pub fn environment_files(&self, name: &str) -> Result<Vec<EnvironmentFile>, VolumeError> {
        let kind = self.lock().get(name).map(|entry| entry.kind);
        match kind {
            Some(kind @ (Kind::Disk(_) | Kind::Memory { .. })) => {
                let found = environment::find(&self.path(name, kind));
                found.map_err(failed("search", name))
            }
            // Such a volume cannot have files of that form.
            Some(Kind::HugePages { .. }) => Ok(Vec::new()),
            Some(_) => Err(VolumeError::OtherKind(name.to_owned())),
            None => Err(VolumeError::NotFound(name.to_owned())),
        }
    }

    /// Writes back the volumes that outlive the guest, at its end.
    pub fn release(&self) {
        self.disks.release();
    }

    /// The receiving end for a mirrored volume. It replaces any other.
    pub fn mirror(&self, name: &str) -> Result<Mirror, VolumeError> {
        let known = self.lock();
        let entry = known.get(name);
        let entry = entry.ok_or_else(|| VolumeError::NotFound(name.to_owned()))?;
        let Kind::Mirror { single_file, .. } = entry.kind else {
            return Err(VolumeError::OtherKind(name.to_owned()));
        };
        let home = self.home(name, entry.kind);
        let mirror = Mirror::new(home, single_file, Arc::clone(&entry.streams));
        Ok(mirror.owned_by(self.users.clone()))
    }

    /// The path of a volume in the agent's tree.
    fn find(&self, name: &str) -> Result<PathBuf, VolumeError> {
        let known = self.lock();
        let entry = known.get(name);
        let entry = entry.ok_or_else(|| VolumeError::NotFound(name.to_owned()))?;
        Ok(self.path(name, entry.kind))
    }

    /// The part of a volume that containers mount. The next state of a mirror is built beside it.
    fn path(&self, name: &str, kind: Kind) -> PathBuf {
        let home = self.home(name, kind);
        match kind {
            Kind::Mirror { .. } => mirror::content(&home),
            Kind::Disk(_) => disks::content(name),
            _ => home,
        }
    }

    fn home(&self, name: &str, kind: Kind) -> PathBuf {
        if kind.is_in_memory() {
            Path::new(IN_MEMORY).join(name)
        } else {
            self.on_disk.join(name)
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failed(what: &'static str, name: &str) -> impl FnOnce(io::Error) -> VolumeError {
    let name = name.to_owned();
    move |source| VolumeError::System { what, name, source }
}

fn set_ownership(name: &str, path: &Path, ownership: &Ownership) -> Result<(), VolumeError> {
    ownership::set_at(path, ownership).map_err(failed("set the owner of", name))
}

/// Reads the end of a file. A container may have written its content, but cannot replace the file.
fn read_end(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut content = Vec::new();
    file.take(limit).read_to_end(&mut content)?;
    Ok(content)
}

/// Checks a name, which becomes the name of a directory.
fn check_name(name: &str) -> Result<(), VolumeError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let starts_well = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    if starts_well && name.len() <= MAX_NAME_BYTES && name.bytes().all(plain) {
        return Ok(());
    }
    Err(VolumeError::Name(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use bulkhead_proto::agent::volume::Kind as WantedKind;
    use bulkhead_proto::agent::{MemoryDirectory, WritableFile};

    use super::*;

    fn volumes() -> (tempfile::TempDir, Volumes) {
        let directory = tempfile::tempdir().unwrap();
        let volumes = Volumes {
            on_disk: directory.path().join("volumes"),
            ..Volumes::new(PodUsers::default())
        };
        (directory, volumes)
    }

    /// A volume that belongs to the user who runs the test.
    fn volume(name: &str, mode: u32, kind: WantedKind) -> Option<Volume> {
        Some(Volume {
            name: name.into(),
            ownership: Some(Ownership {
                mode,
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
            }),
            kind: Some(kind),
        })
    }

    #[test]
    fn a_volume_is_made_once_and_changed_only_when_asked_otherwise() {
        let (_directory, volumes) = volumes();
        let file = || WantedKind::File(WritableFile {});
        volumes.ensure(volume("data", 0o660, file())).unwrap();
        let path = volumes.find("data").unwrap();
        let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
        assert_eq!(mode(), 0o660);
        fs::write(&path, "kept").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        volumes.ensure(volume("data", 0o660, file())).unwrap();
        assert_eq!(mode(), 0o600, "what a container did stays");
        volumes.ensure(volume("data", 0o644, file())).unwrap();
        assert_eq!(mode(), 0o644);
        assert_eq!(fs::read(&path).unwrap(), b"kept");
        let other = WantedKind::Memory(MemoryDirectory { size_bytes: 1 });
        assert!(matches!(
            volumes.ensure(volume("data", 0o755, other)),
            Err(VolumeError::OtherKind(_))
        ));
        volumes.remove("data").unwrap();
        assert!(!path.exists());
        volumes.remove("data").unwrap();
    }

    #[test]
    fn of_a_file_the_end_is_read_and_no_more_than_allowed() {
        let (_directory, volumes) = volumes();
        let file = WantedKind::File(WritableFile {});
        volumes.ensure(volume("log", 0o666, file)).unwrap();
        fs::write(volumes.find("log").unwrap(), "0123456789").unwrap();
        assert_eq!(volumes.read_end("log", 4).unwrap(), b"6789");
        assert_eq!(volumes.read_end("log", u32::MAX).unwrap(), b"0123456789");
        let big = vec![b'x'; 100 << 10];
        fs::write(volumes.find("log").unwrap(), big).unwrap();
        assert_eq!(volumes.read_end("log", u32::MAX).unwrap().len(), 64 << 10);
        assert!(matches!(
            volumes.read_end("other", 4),
            Err(VolumeError::NotFound(_))
        ));
    }

    #[test]
    fn names_are_safe_as_names_of_directories() {
        for good in ["a", "empty-data", "log-0123.a_b"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-a", "a b", "ä", &"x".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
