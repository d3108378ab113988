// SPDX-License-Identifier: Apache-2.0
//! Translates the mounts that a container wants into those that its first process makes. Sources are found and checked
//! when the container is created, so that a wrong one is an error of that call.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use bulkhead_proto::agent::mount::Source;
use bulkhead_proto::agent::{IMAGE_VOLUME, Mount, Ownership, Propagation, SharePart};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

use super::{VolumeError, Volumes, ownership};
use crate::disk::layers::{LayerError, Layers, MountedLayer};
use crate::disk::overlay::{ImageView, OverlayError};
use crate::disk::shared;
use crate::init::config::{BindMount, Part};
use crate::init::mounts::is_directory;

/// The most mounts of one container, with the parts of its shares. Each takes a descriptor of its first process for a
/// moment.
const MAX_MOUNTS: usize = 8192;

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("too many mounts: {0}, at most {MAX_MOUNTS} are possible")]
    TooMany(usize),
    #[error("{0:?} is not a path at which something can be mounted")]
    Target(String),
    #[error("mount at {target}: {reason}")]
    Source {
        target: String,
        reason: &'static str,
    },
    #[error("mount at {target}")]
    Volume { target: String, source: VolumeError },
    #[error("{IMAGE_VOLUME} at {target}: mount layers")]
    Layers { target: String, source: LayerError },
    #[error("{IMAGE_VOLUME} at {target}")]
    Image {
        target: String,
        source: OverlayError,
    },
    #[error("{IMAGE_VOLUME} at {target}: {sub_path:?} in the image")]
    InImage {
        target: String,
        sub_path: String,
        source: io::Error,
    },
    #[error("mount the host's files at {target}")]
    Shared { target: String, source: io::Error },
    #[error("mount at {target}: {sub_path:?} of the volume")]
    SubPath {
        target: String,
        sub_path: String,
        source: io::Error,
    },
}

/// The resolved mounts of a container.
#[derive(Debug, Default)]
pub struct Resolved {
    /// As the request has them; [`in_order`] is for all mounts of the container together.
    pub binds: Vec<BindMount>,
    /// Kept as long as the container exists.
    pub views: Vec<ImageView>,
}

/// Finds and checks the sources of the mounts of container `id`.
pub fn resolve(
    volumes: &Volumes,
    layers: &Layers,
    id: &str,
    mounts: &[Mount],
) -> Result<Resolved, MountError> {
    let count = mounts.iter().map(|one| 1 + one.parts.len()).sum();
    if count > MAX_MOUNTS {
        return Err(MountError::TooMany(count));
    }
    let mut resolved = Resolved::default();
    for mount in mounts {
        let target = target(&mount.container_path)?;
        let source = match &mount.source {
            Some(Source::Image(image)) => {
                let name = format!("{id}-{}", resolved.views.len());
                let acquired = layers.acquire(&image.layers);
                let view = view(volumes, acquired, &name, &target)?;
                let source = view.path().to_owned();
                resolved.views.push(view);
                source
            }
            _ => find(volumes, mount, &target)?,
        };
        check_sub_path(volumes, mount, &source, &target)?;
        resolved.binds.push(BindMount {
            source: source.to_string_lossy().into_owned(),
            sub_path: mount.sub_path.clone(),
            readonly: mount.readonly || mount.recursive_readonly,
            recursive_readonly: mount.recursive_readonly,
            follows_host: mount.propagation() == Propagation::HostToContainer,
            no_exec: mount.no_exec,
            no_suid: mount.no_suid,
            no_dev: mount.no_dev,
            parts: mount.parts.iter().map(part).collect(),
            target,
        });
    }
    Ok(resolved)
}

/// Puts mounts into the order in which they are made: each before what is mounted inside it.
pub fn in_order(binds: &mut [BindMount]) {
    // The sort is stable: of two mounts at one place the later one covers the earlier one.
    binds.sort_by_key(|bind| Path::new(&bind.target).components().count());
}

fn part(part: &SharePart) -> Part {
    Part {
        path: part.path.clone(),
        readonly: part.readonly,
    }
}

fn find(volumes: &Volumes, mount: &Mount, target: &str) -> Result<PathBuf, MountError> {
    let target = target.to_owned();
    match &mount.source {
        Some(Source::Volume(name)) => volumes
            .find(name)
            .map_err(|source| MountError::Volume { target, source }),
        Some(Source::Shared(name)) => {
            let seen_by = mount.map_owners.then_some(&volumes.users);
            let found = shared::path(name, seen_by);
            found.map_err(|source| MountError::Shared { target, source })
        }
        Some(Source::Image(_)) | None => Err(MountError::Source {
            target,
            reason: "the mount has no source",
        }),
    }
}

fn view(
    volumes: &Volumes,
    acquired: Result<Vec<MountedLayer>, LayerError>,
    name: &str,
    target: &str,
) -> Result<ImageView, MountError> {
    let acquired = acquired.map_err(|source| MountError::Layers {
        target: target.to_owned(),
        source,
    })?;
    ImageView::mount(name, acquired, &volumes.users).map_err(|source| MountError::Image {
        target: target.to_owned(),
        source,
    })
}

/// Checks the sub-path of a mount and creates it if it may be created. In an image it must be a directory.
fn check_sub_path(
    volumes: &Volumes,
    mount: &Mount,
    source: &Path,
    target: &str,
) -> Result<(), MountError> {
    let made_as = mount.made_as.as_ref();
    let made_as = made_as.map(|owner| volumes.users.owned(owner)).transpose();
    let found = made_as.and_then(|owner| find_sub_path(source, &mount.sub_path, owner.as_ref()));
    let checked = found.and_then(|found| match mount.source {
        Some(Source::Image(_)) if !is_directory(&found)? => {
            Err(io::ErrorKind::NotADirectory.into())
        }
        _ => Ok(()),
    });
    checked.map_err(|source| {
        let (target, sub_path) = (target.to_owned(), mount.sub_path.clone());
        match mount.source {
            Some(Source::Image(_)) => MountError::InImage {
                target,
                sub_path,
                source,
            },
            _ => MountError::SubPath {
                target,
                sub_path,
                source,
            },
        }
    })
}

/// Checks a mount point: an absolute path without `..` that is not the root. Returns it without `.`.
pub fn target(path: &str) -> Result<String, MountError> {
    let refused = || MountError::Target(path.to_owned());
    let clean = Path::new(path);
    if !clean.is_absolute() || path.contains('\0') {
        return Err(refused());
    }
    let names: Option<PathBuf> = clean
        .components()
        .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
        .map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let names = names.filter(|names| !names.as_os_str().is_empty());
    let names = names.ok_or_else(refused)?;
    Ok(Path::new("/").join(names).to_string_lossy().into_owned())
}

/// Opens `sub_path` below `source` as a location. Containers write to volumes, so links that lead out of it are
/// refused, and so are the kernel's magic links.
pub fn open_sub_path(source: &Path, sub_path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = openat2(CWD, source, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    if sub_path.is_empty() {
        return Ok(root);
    }
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    openat2(&root, sub_path, flags, Mode::empty(), beneath)
}

/// The same, but if the path does not exist and `made_as` is given, creates its directories.
fn find_sub_path(
    source: &Path,
    sub_path: &str,
    made_as: Option<&Ownership>,
) -> io::Result<OwnedFd> {
    match (open_sub_path(source, sub_path), made_as) {
        (Err(Errno::NOENT), Some(made_as)) => make_below(source, Path::new(sub_path), made_as),
        (Err(Errno::XDEV), _) => Err(io::Error::other("the path leads out of the volume")),
        (found, _) => Ok(found?),
    }
}

fn make_below(source: &Path, sub_path: &Path, made_as: &Ownership) -> io::Result<OwnedFd> {
    let mut so_far = PathBuf::new();
    for part in sub_path.components() {
        let Component::Normal(name) = part else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let parent = open_sub_path(source, &so_far.to_string_lossy())?;
        make_directory(&parent, name, made_as)?;
        so_far.push(name);
    }
    Ok(open_sub_path(source, &sub_path.to_string_lossy())?)
}

fn make_directory(parent: &OwnedFd, name: &OsStr, made_as: &Ownership) -> io::Result<()> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Err(Errno::EXIST) => return Ok(()),
        made => made?,
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    ownership::set(&made, made_as)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn targets_are_absolute_clean_and_not_the_root() {
        for (path, expected) in [("/a", "/a"), ("/a//b/./c/", "/a/b/c")] {
            assert_eq!(target(path).unwrap(), expected);
        }
        for path in ["", "a", "/", "//", "/.", "/a/../b", "/a\0"] {
            assert!(target(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn parents_are_mounted_before_what_is_below_them_and_equals_stay_in_order() {
        let mount = |path: &str| Mount {
            container_path: path.into(),
            ..Default::default()
        };
        let mut binds = ["/a/b/c", "/d", "/a/b", "/e"].map(|path| BindMount {
            target: target(&mount(path).container_path).unwrap(),
            ..BindMount::default()
        });
        in_order(&mut binds);
        let targets = binds.map(|bind| bind.target);
        assert_eq!(targets, ["/d", "/e", "/a/b", "/a/b/c"]);
    }

    #[test]
    fn a_sub_path_is_made_where_it_may_be_and_never_leads_out() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let made_as = Ownership {
            mode: 0o2775,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        let find = |path: &str, made: bool| find_sub_path(&root, path, made.then_some(&made_as));
        assert!(find("a/b", false).is_err());
        find("a/b", true).unwrap();
        assert_eq!(
            fs::metadata(root.join("a/b")).unwrap().mode() & 0o7777,
            0o2775
        );
        fs::write(root.join("file"), "").unwrap();
        find("file", true).unwrap();
        symlink("a/b", root.join("inside")).unwrap();
        find("inside", true).unwrap();
        for (name, leads) in [
            ("up", "../.."),
            ("etc", "/etc"),
            ("magic", "/proc/self/root"),
        ] {
            symlink(leads, root.join(name)).unwrap();
            assert!(find(name, true).is_err(), "{name}");
            assert!(find(&format!("{name}/new"), true).is_err(), "{name}/new");
        }
        assert!(find("../x", true).is_err());
        assert!(find("/etc", true).is_err());
    }
}
