// SPDX-License-Identifier: Apache-2.0
//! Volumes: what containers mount in addition to their images.
//!
//! [`kind`] recognizes kubelet's volumes by their place, and [`mountinfo`] reads the host's mounts. From both, this
//! file makes the description of a volume for the guest. When a container is created, the pod's owner makes the guest
//! create missing volumes.
//!
//! - [`mirror`] keeps copies in the guest up to date with kubelet's originals; [`watcher`] and [`walk`] help it.
//! - [`termination`] copies a container's termination message to the host.
//! - [`disk`] is the host's side of an emptyDir, and [`environment`] copies files from it for kubelet.
//! - [`block`] opens block devices of the host.

pub mod block;
pub mod disk;
pub mod environment;
pub mod kind;
pub mod mirror;
pub mod mountinfo;
pub mod termination;
mod walk;
pub mod watcher;

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol::{self, Ownership, volume::Kind};
use bulkhead_host::HostPath;

use self::disk::DiskError;
use self::kind::Place;
use self::mirror::MirrorError;
use self::mountinfo::{Mounts, join};
use self::watcher::Watcher;
use crate::modes;
use crate::pod::life::record::MirrorSource;

/// An error about a volume of a container.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("mount of {path}: {what} is not supported by this version")]
    NotSupported { what: &'static str, path: PathBuf },
    #[error("mount of {path}")]
    Look { path: PathBuf, source: io::Error },
    #[error("mount of {path}: kubelet's volume is gone")]
    Gone { path: PathBuf },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("make volume {name} in the guest")]
    Make { name: String, source: AgentError },
    #[error("copy {path} into the guest")]
    Mirror {
        path: PathBuf,
        source: Arc<MirrorError>,
    },
}

/// How a host path that a container mounts gets into the guest.
#[derive(Debug)]
pub enum Found {
    /// The guest has a volume of its own for it.
    Guest(InGuest),
    /// The host's file or directory is shared with the guest.
    Shared(HostPath),
}

#[derive(Debug)]
pub struct InGuest {
    pub volume: protocol::Volume,
    pub sub_path: PathBuf,
    /// The owner and mode of the sub-path, if the guest has to make it.
    pub made_as: Option<Ownership>,
    pub host: HostSide,
}

/// The host's side of a volume of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostSide {
    /// The volume is in the guest's memory. This is kubelet's directory of it.
    Memory(PathBuf),
    /// The volume is in a file in this directory of kubelet.
    Disk(PathBuf),
    /// The volume is a copy of this source and follows its changes.
    Mirrored(MirrorSource),
    /// When the container exits, the guest's file is copied to this file.
    CopiedBack(PathBuf),
}

/// Recognizes the host paths that containers mount.
#[derive(Debug)]
pub struct Volumes {
    kubelet_roots: Vec<PathBuf>,
    pub watcher: Watcher,
}

impl Volumes {
    pub fn new(kubelet_roots: Vec<PathBuf>) -> Self {
        Self {
            kubelet_roots,
            watcher: Watcher::default(),
        }
    }

    /// Finds out how `path` gets into the guest, for the container `id` of a pod with the Kubernetes uid `uid`. Blocks.
    /// The path is looked up once: what is decided here holds for the opened file that is shared.
    /// If the path does not exist, a directory is made, as other runtimes do. But a missing volume of kubelet is an
    /// error.
    pub fn find(&self, uid: &str, id: &str, path: &Path) -> Result<Found, VolumeError> {
        let look = |source| VolumeError::Look {
            path: path.to_owned(),
            source,
        };
        if !path.exists() {
            if self.is_kubelets(path) {
                // kubelet made the volume before it asked. A new empty directory would hide that its content is lost.
                return Err(VolumeError::Gone {
                    path: path.to_owned(),
                });
            }
            modes::directory_for_all(path).map_err(look)?;
        }
        let found = HostPath::find(path).map_err(look)?;
        let metadata = found.metadata().map_err(look)?;
        let mounts = Mounts::read().map_err(look)?;
        let place = self.place(uid, found.path(), &mounts);
        match place {
            Place::EmptyDir {
                volume,
                directory,
                sub_path,
            } => {
                let volume = empty_dir(&volume, &directory, &mounts)?;
                let on_disk = matches!(volume.kind, Some(Kind::Directory(_)));
                let is_below = !sub_path.as_os_str().is_empty();
                Ok(Found::Guest(InGuest {
                    volume,
                    made_as: Some(ownership(&metadata)).filter(|_| is_below),
                    sub_path,
                    host: if on_disk {
                        HostSide::Disk(directory)
                    } else {
                        HostSide::Memory(directory)
                    },
                }))
            }
            Place::TerminationLog if metadata.is_file() => Ok(Found::Guest(InGuest {
                volume: protocol::Volume {
                    name: termination::volume_name(id),
                    ownership: Some(ownership(&metadata)),
                    kind: Some(Kind::File(protocol::WritableFile {})),
                },
                sub_path: PathBuf::new(),
                made_as: None,
                host: HostSide::CopiedBack(found.path().to_owned()),
            })),
            Place::Lost => Err(VolumeError::Gone {
                path: path.to_owned(),
            }),
            Place::Mirrored {
                volume,
                directory,
                sub_path,
                in_memory,
            } => mirrored(
                format!("mirror-{volume}"),
                directory,
                kind::in_newest_state(&sub_path),
                protocol::Mirror {
                    single_file: false,
                    in_memory,
                },
            ),
            Place::EtcHosts => {
                let file = protocol::Mirror {
                    single_file: true,
                    in_memory: false,
                };
                let path = found.path().to_owned();
                mirrored("etc-hosts".to_owned(), path, PathBuf::new(), file)
            }
            Place::TerminationLog | Place::Shared => {
                let kind = metadata.file_type();
                if kind.is_block_device() || kind.is_char_device() {
                    return Err(VolumeError::NotSupported {
                        what: "a device as a mount (instead of in the container's devices)",
                        path: path.to_owned(),
                    });
                }
                Ok(Found::Shared(found))
            }
        }
    }

    fn is_kubelets(&self, path: &Path) -> bool {
        let is_below = |root: PathBuf| path.starts_with(root.join("pods"));
        let real = |root: &PathBuf| root.canonicalize().ok();
        let mut roots = self.kubelet_roots.iter();
        roots.any(|root| is_below(root.clone()) || real(root).is_some_and(is_below))
    }

    fn place(&self, uid: &str, real: &Path, mounts: &Mounts) -> Place {
        // kubelet's root is often a link to a larger disk.
        let roots = self
            .kubelet_roots
            .iter()
            .filter_map(|root| root.canonicalize().ok());
        roots
            .map(|root| kind::place(&root, uid, real, mounts, volumes_called))
            .find(|place| *place != Place::Shared)
            .unwrap_or(Place::Shared)
    }
}

/// The directories of a pod's volumes with this name: at most one for each volume plugin.
fn volumes_called(pod: &Path, name: &str) -> Vec<PathBuf> {
    let plugins = std::fs::read_dir(pod.join("volumes"));
    let plugins = plugins.into_iter().flatten().flatten();
    plugins
        .map(|plugin| plugin.path().join(name))
        .filter(|path| path.is_dir())
        .collect()
}

fn empty_dir(
    volume: &str,
    directory: &Path,
    mounts: &Mounts,
) -> Result<protocol::Volume, VolumeError> {
    let look = |source| VolumeError::Look {
        path: directory.to_owned(),
        source,
    };
    let metadata = directory.symlink_metadata().map_err(look)?;
    let medium = mounts.at(directory).map(|mounted| {
        let size = |option| mounted.size_bytes(option).unwrap_or(0);
        (mounted.kind.as_str(), size)
    });
    let kind = match medium {
        Some(("tmpfs", size)) => Kind::Memory(protocol::MemoryDirectory {
            size_bytes: size("size"),
        }),
        Some(("hugetlbfs", size)) => Kind::HugePages(protocol::HugePageDirectory {
            page_size_bytes: size("pagesize"),
        }),
        // The owner fills in the extent when it has attached the disk.
        Some(_) | None => Kind::Directory(protocol::Extent::default()),
    };
    Ok(protocol::Volume {
        name: format!("empty-dir-{volume}"),
        ownership: Some(ownership(&metadata)),
        kind: Some(kind),
    })
}

/// A volume of the guest that mirrors `path`.
fn mirrored(
    name: String,
    path: PathBuf,
    sub_path: PathBuf,
    kind: protocol::Mirror,
) -> Result<Found, VolumeError> {
    let metadata = path
        .symlink_metadata()
        .map_err(|source| VolumeError::Look {
            path: path.clone(),
            source,
        })?;
    Ok(Found::Guest(InGuest {
        volume: protocol::Volume {
            name,
            ownership: Some(ownership(&metadata)),
            kind: Some(Kind::Mirror(kind)),
        },
        sub_path,
        made_as: None,
        host: HostSide::Mirrored(MirrorSource { path }),
    }))
}

fn ownership(metadata: &std::fs::Metadata) -> Ownership {
    Ownership {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
    }
}

/// A path as text, for messages to the guest, without a slash at the end.
pub fn text(path: &Path) -> String {
    join(Path::new(""), path).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn kubelet() -> (tempfile::TempDir, Volumes, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().join("real");
        let root = directory.path().join("kubelet");
        let pod = real.join("pods/uid");
        std::fs::create_dir_all(pod.join("volumes/kubernetes.io~empty-dir/data")).unwrap();
        std::fs::create_dir_all(pod.join("containers/main")).unwrap();
        std::fs::write(pod.join("containers/main/0a1b"), "").unwrap();
        symlink(&real, &root).unwrap();
        (directory, Volumes::new(vec![root.clone()]), root)
    }

    fn in_guest(found: Found) -> InGuest {
        match found {
            Found::Guest(guest) => guest,
            Found::Shared(found) => panic!("{} is shared", found.path().display()),
        }
    }

    #[test]
    fn an_empty_dir_carries_its_mode_also_where_kubelets_directory_is_a_link() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, volumes, root) = kubelet();
        let path = root.join("pods/uid/volumes/kubernetes.io~empty-dir/data");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o2777)).unwrap();
        let guest = in_guest(volumes.find("uid", "c", &path).unwrap());
        assert_eq!(guest.volume.name, "empty-dir-data");
        assert_eq!(guest.volume.ownership.unwrap().mode, 0o2777);
        assert!(matches!(guest.volume.kind, Some(Kind::Directory(_))));
        let directory = path.canonicalize().unwrap();
        assert_eq!(guest.host, HostSide::Disk(directory));
        assert_eq!((guest.sub_path.as_os_str().len(), guest.made_as), (0, None));
    }

    #[test]
    fn a_termination_log_is_a_file_of_its_container() {
        let (_directory, volumes, root) = kubelet();
        let path = root.join("pods/uid/containers/main/0a1b");
        let guest = in_guest(volumes.find("uid", "c", &path).unwrap());
        assert_eq!(guest.volume.name, "termination-log-c");
        let host = path.canonicalize().unwrap();
        assert_eq!(guest.host, HostSide::CopiedBack(host));
    }

    #[test]
    fn what_kubelet_refreshes_is_mirrored_and_what_is_secret_stays_in_memory() {
        let (_directory, volumes, root) = kubelet();
        let pod = root.join("pods/uid");
        std::fs::write(pod.join("etc-hosts"), "").unwrap();
        for (path, name, single_file, in_memory) in [
            (
                "volumes/kubernetes.io~configmap/cm",
                "mirror-cm",
                false,
                false,
            ),
            ("volumes/kubernetes.io~secret/s", "mirror-s", false, true),
            ("etc-hosts", "etc-hosts", true, false),
        ] {
            let path = pod.join(path);
            if !single_file {
                std::fs::create_dir_all(&path).unwrap();
            }
            let guest = in_guest(volumes.find("uid", "c", &path).unwrap());
            assert_eq!(guest.volume.name, name);
            let expected = protocol::Mirror {
                single_file,
                in_memory,
            };
            assert_eq!(guest.volume.kind, Some(Kind::Mirror(expected)));
            let path = path.canonicalize().unwrap();
            assert_eq!(guest.host, HostSide::Mirrored(MirrorSource { path }));
        }
    }

    #[test]
    fn other_paths_are_shared_with_links_followed_and_made_if_they_are_missing() {
        let (directory, volumes, root) = kubelet();
        let missing = directory.path().join("new/one");
        symlink(&missing, directory.path().join("link")).unwrap();
        let Found::Shared(made) = volumes.find("uid", "c", &missing).unwrap() else {
            panic!("shared");
        };
        assert!(made.path().is_dir());
        let link = directory.path().join("link");
        assert!(
            matches!(volumes.find("uid", "c", &link).unwrap(), Found::Shared(same) if same.path() == made.path())
        );
        let others = root.join("pods/other/volumes/kubernetes.io~empty-dir/data");
        std::fs::create_dir_all(&others).unwrap();
        assert!(matches!(
            volumes.find("uid", "c", &others).unwrap(),
            Found::Shared(_)
        ));
    }

    #[test]
    fn a_volume_of_kubelets_that_is_gone_is_not_made_again() {
        let (_directory, volumes, root) = kubelet();
        let below = "pods/uid/volumes/kubernetes.io~configmap/gone";
        for path in [root.join(below), root.canonicalize().unwrap().join(below)] {
            let error = volumes.find("uid", "c", &path).unwrap_err();
            assert!(matches!(error, VolumeError::Gone { .. }), "{error}");
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_device_is_not_a_directory_to_be_shared() {
        let (_directory, volumes, _root) = kubelet();
        let error = volumes
            .find("uid", "c", Path::new("/dev/null"))
            .unwrap_err();
        assert!(error.to_string().contains("/dev/null"), "{error}");
    }
}
