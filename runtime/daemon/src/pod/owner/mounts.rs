// SPDX-License-Identifier: Apache-2.0
//! How a pod's owner prepares the mounts of a container. It makes missing volumes in the guest, starts mirrors of host
//! directories, and fills in the mounts of the agent's request.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::protocol;
use bulkhead_guest::protocol::volume::Kind;
use bulkhead_host::shares::mounts::{self as shares, Access};
use bulkhead_host::{Guest, HostPath};
use bulkhead_image::Image;

use super::Owner;
use super::shares::{Shared, Wanted};
use crate::pod::checkpoint::CheckpointError;
use crate::pod::errors::PodError;
use crate::pod::life::record::{ContainerRecord, Kept, MirrorSource};
use crate::pod::life::spec::{Mount, MountSource, Propagation};
use crate::pod::volumes::mirror::Mirror;
use crate::pod::volumes::{Found, HostSide, InGuest, VolumeError, termination, text};

/// A mount whose source has been found.
#[derive(Debug)]
pub(super) struct FoundMount {
    mount: Mount,
    source: FoundSource,
}

#[derive(Debug)]
enum FoundSource {
    Host(Found),
    Image { image: Box<Image>, sub_path: String },
}

impl Owner {
    /// Finds the sources of all mounts of the container `id`, and writes the ids of image volumes into `mounts`.
    /// Changes nothing in the guest yet.
    pub(super) fn find_mounts(
        &self,
        id: &str,
        mounts: &mut [Mount],
    ) -> Result<Vec<FoundMount>, PodError> {
        let find = |mount: &mut Mount| {
            Ok(FoundMount {
                source: self.find_source(id, &mut mount.source)?,
                mount: mount.clone(),
            })
        };
        tokio::task::block_in_place(|| mounts.iter_mut().map(find).collect())
    }

    /// Finds the source of one mount. For an image, also writes its id into `source`.
    fn find_source(
        &self,
        container: &str,
        source: &mut MountSource,
    ) -> Result<FoundSource, PodError> {
        let host = &self.shared.host;
        match source {
            MountSource::Host(path) => {
                let uid = &self.ledger.pod().spec.name.uid;
                let found = host.volumes.find(uid, container, path)?;
                Ok(FoundSource::Host(found))
            }
            MountSource::Image {
                image,
                sub_path,
                id,
            } => {
                let found = host.images.find(image).map_err(PodError::from);
                let found = found
                    .and_then(|found| found.ok_or_else(|| PodError::NoImage(image.clone())))
                    .map_err(|error| of_volume(image, error))?;
                *id = found.id.to_string();
                Ok(FoundSource::Image {
                    image: Box::new(found),
                    sub_path: sub_path.clone(),
                })
            }
        }
    }

    /// Prepares every mount of a container that is about to be created.
    pub(super) async fn prepare_mounts(
        &mut self,
        guest: &Guest,
        mounts: Vec<FoundMount>,
        request: &mut protocol::CreateContainerRequest,
    ) -> Result<(), PodError> {
        for FoundMount { mount, source } in mounts {
            let prepared = match source {
                FoundSource::Host(Found::Guest(found)) => {
                    self.prepare_in_guest(guest, found).await?
                }
                FoundSource::Host(Found::Shared(found)) => {
                    let share = self.share(&request.id, wanted(&mount, found)).await?;
                    request.mounts.push(described_share(&mount, share));
                    continue;
                }
                FoundSource::Image { image, sub_path } => {
                    let attached = self.attach_image(guest, &image, &request.id).await;
                    let layers = attached.map_err(|error| of_volume(image.id.as_str(), error))?;
                    let image = protocol::ImageVolume { layers };
                    protocol::Mount {
                        source: Some(protocol::mount::Source::Image(image)),
                        sub_path,
                        ..Default::default()
                    }
                }
            };
            request.mounts.push(described(&mount, prepared));
        }
        Ok(())
    }

    /// Makes a volume in the guest if it is missing, and attaches or mirrors its content.
    async fn prepare_in_guest(
        &mut self,
        guest: &Guest,
        mut found: InGuest,
    ) -> Result<protocol::Mount, PodError> {
        let name = found.volume.name.clone();
        if let HostSide::Disk(directory) = &found.host {
            let place = self.attach_disk(guest, &name, directory).await?;
            found.volume.kind = Some(Kind::Directory(place));
        }
        let made = guest.agent.ensure_volume(found.volume).await;
        made.map_err(|source| VolumeError::Make {
            name: name.clone(),
            source,
        })?;
        if let HostSide::Mirrored(source) = found.host {
            self.follow(guest, &name, source).await?;
        }
        Ok(protocol::Mount {
            source: Some(protocol::mount::Source::Volume(name)),
            sub_path: text(&found.sub_path),
            made_as: found.made_as,
            ..Default::default()
        })
    }

    /// Makes a volume of the guest follow a host directory from now on, and waits until it has the directory's content.
    pub(super) async fn follow(
        &mut self,
        guest: &Guest,
        name: &str,
        source: MirrorSource,
    ) -> Result<(), PodError> {
        if self.ledger.pod().mirrors.get(name) != Some(&source) {
            let (name, source) = (name.to_owned(), source.clone());
            self.mirrors.remove(&name);
            self.ledger
                .change_pod(|pod| drop(pod.mirrors.insert(name, source)))?;
        }
        let path = source.path.clone();
        let watcher = &self.shared.host.volumes.watcher;
        let mirror = self
            .mirrors
            .entry(name.to_owned())
            .or_insert_with(|| Mirror::start(guest, name.to_owned(), source, watcher.clone()));
        faults::around(Step::SyncMirror, async {
            let synced = mirror.synced().await;
            let synced = synced.map_err(|source| VolumeError::Mirror { path, source });
            synced.map_err(PodError::from)
        })
        .await
    }

    /// Continues the mirrors of an earlier daemon.
    pub(super) fn follow_mirrors(&mut self, guest: &Guest) {
        let watcher = &self.shared.host.volumes.watcher;
        let started = self.ledger.pod().mirrors.iter().map(|(name, source)| {
            let mirror = Mirror::start(guest, name.clone(), source.clone(), watcher.clone());
            (name.clone(), mirror)
        });
        self.mirrors = started.collect();
    }

    /// Removes the container's own volume in the guest: the one for its termination message.
    pub(super) async fn remove_own_volumes(&self, guest: &Guest, record: &ContainerRecord) {
        if record.termination_log.is_some()
            && let Err(error) = guest
                .agent
                .remove_volume(&termination::volume_name(record.first_id()))
                .await
        {
            self.ledger
                .complain("remove the termination log in the guest", &error);
        }
    }
}

fn of_volume(image: &str, error: PodError) -> PodError {
    PodError::ImageVolume {
        image: image.to_owned(),
        source: Box::new(error),
    }
}

/// kubelet's file for the container's termination message, if the container mounts one.
pub(super) fn termination_log(mounts: &[FoundMount]) -> Option<PathBuf> {
    mounts.iter().find_map(|found| match &found.source {
        FoundSource::Host(Found::Guest(InGuest {
            host: HostSide::CopiedBack(path),
            ..
        })) => Some(path.clone()),
        _ => None,
    })
}

/// The emptyDirs that the container mounts: kubelet's directory for each, by the volume's name in the guest.
pub(super) fn empty_dirs(mounts: &[FoundMount]) -> BTreeMap<String, PathBuf> {
    let one = |found: &FoundMount| match &found.source {
        FoundSource::Host(Found::Guest(InGuest {
            volume,
            host: HostSide::Disk(directory) | HostSide::Memory(directory),
            ..
        })) => Some((volume.name.clone(), directory.clone())),
        _ => None,
    };
    mounts.iter().filter_map(one).collect()
}

/// The volumes of a container that is brought back, which its guest has already: the new source of each mirror, by the
/// volume's name. An error if the guest lacks one, or if one is no volume of the guest.
pub(super) fn kept_volumes(
    mounts: &[FoundMount],
    saved: &ContainerRecord,
    kept: &Kept,
) -> Result<BTreeMap<String, MirrorSource>, CheckpointError> {
    let mut mirrors = BTreeMap::new();
    for FoundMount { mount, source } in mounts {
        let (is_kept, name) = match source {
            FoundSource::Image { .. } => continue,
            FoundSource::Host(Found::Shared(_)) => (false, None),
            FoundSource::Host(Found::Guest(found)) => {
                let name = &found.volume.name;
                let is_kept = match &found.host {
                    HostSide::Mirrored(source) => match mirror_of(mount, name, saved, kept) {
                        Some(was) => {
                            let other = mirrors.insert(was.to_owned(), source.clone());
                            other.is_none_or(|other| other == *source)
                        }
                        None => false,
                    },
                    HostSide::Memory(_) => kept.empty_dirs.contains(name),
                    HostSide::Disk(_) => false,
                    HostSide::CopiedBack(_) => kept.has_termination_log,
                };
                (is_kept, Some(name))
            }
        };
        if !is_kept {
            let path = &mount.container_path;
            let what = name.map_or("a directory of the host", String::as_str);
            return Err(CheckpointError::Unlike(format!(
                "container {}: the mount at {path} is {what}, which the saved VM does not have",
                saved.spec.name
            )));
        }
    }
    Ok(mirrors)
}

/// The mirror that the saved container has where this mount is. It need not have the name that a new one would have: kubelet
/// calls the volume with a service account's token otherwise in each pod.
fn mirror_of<'a>(
    mount: &Mount,
    name: &'a str,
    saved: &ContainerRecord,
    kept: &'a Kept,
) -> Option<&'a str> {
    let mut was = saved.spec.mounts.iter();
    let was = was.find(|was| was.container_path == mount.container_path)?;
    let of_source = |path: &Path| {
        let mut mirrors = kept.mirrors.iter();
        let (name, _) = mirrors.find(|(_, source)| are_one(&source.path, path))?;
        Some(name.as_str())
    };
    let at_source = match &was.source {
        MountSource::Host(path) => of_source(path),
        MountSource::Image { .. } => None,
    };
    // A part of a volume is mounted from another place.
    at_source.or_else(|| kept.mirrors.contains_key(name).then_some(name))
}

/// Whether two paths are of one volume of kubelet, whose root directory may be a link in one of them.
fn are_one(one: &Path, other: &Path) -> bool {
    let end = |path: &Path| {
        let mut parts = path.components().rev().take(4).collect::<Vec<_>>();
        parts.reverse();
        parts
            .iter()
            .map(|part| part.as_os_str().to_owned())
            .collect::<Vec<_>>()
    };
    end(one) == end(other)
}

fn wanted(mount: &Mount, found: HostPath) -> Wanted {
    Wanted {
        found,
        access: match (mount.readonly, mount.recursive_readonly) {
            (_, true) => Access::ReadRecursive,
            (true, false) => Access::Read,
            (false, false) => Access::Write,
        },
        propagation: match mount.propagation {
            Propagation::Private => shares::Propagation::Private,
            Propagation::HostToContainer => shares::Propagation::Slave,
        },
    }
}

/// The mount of a share. It says what the host's mounts are: one that the host has read-only is so here, whatever the
/// container asked for.
fn described_share(mount: &Mount, share: Shared) -> protocol::Mount {
    let part = |(path, readonly): (PathBuf, bool)| protocol::SharePart {
        path: text(&path),
        readonly,
    };
    let source = Some(protocol::mount::Source::Shared(share.name));
    let prepared = protocol::Mount {
        source,
        parts: share.writability.parts.into_iter().map(part).collect(),
        ..Default::default()
    };
    protocol::Mount {
        readonly: share.writability.readonly,
        ..described(mount, prepared)
    }
}

/// Adds to a prepared mount the fields that do not depend on the kind of volume.
fn described(mount: &Mount, prepared: protocol::Mount) -> protocol::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => protocol::Propagation::Private,
        Propagation::HostToContainer => protocol::Propagation::HostToContainer,
    };
    protocol::Mount {
        container_path: mount.container_path.clone(),
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_readonly,
        map_owners: mount.users.is_some(),
        no_exec: mount.options.no_exec,
        no_suid: mount.options.no_suid,
        no_dev: mount.options.no_dev,
        propagation: propagation.into(),
        ..prepared
    }
}
