// SPDX-License-Identifier: Apache-2.0
//! How a pod's owner prepares the mounts of a container. It makes missing volumes in the guest, starts mirrors of host
//! directories, and fills in the mounts of the agent's request.

use std::path::PathBuf;

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::protocol;
use bulkhead_guest::protocol::volume::Kind;
use bulkhead_host::shares::mounts::{self as shares, Access};
use bulkhead_host::{Guest, HostPath};
use bulkhead_image::Image;

use super::Owner;
use super::shares::{Shared, Wanted};
use crate::pod::errors::PodError;
use crate::pod::life::record::{ContainerRecord, MirrorSource};
use crate::pod::life::spec::{Mount, MountSource, Propagation};
use crate::pod::life::volume::VolumeKind;
use crate::pod::volumes::mirror::Mirror;
use crate::pod::volumes::{Found, HostSide, InGuest, VolumeError, termination, text};

/// A mount whose source has been found.
#[derive(Debug)]
pub(super) struct FoundMount {
    pub mount: Mount,
    pub source: FoundSource,
}

#[derive(Debug)]
pub(super) enum FoundSource {
    Host(Found),
    Image { image: Box<Image>, sub_path: String },
}

impl FoundMount {
    /// The volume, if the guest has one of its own for it.
    pub fn in_guest(&self) -> Option<&InGuest> {
        match &self.source {
            FoundSource::Host(Found::Guest(found)) => Some(found),
            FoundSource::Host(Found::Shared(_)) | FoundSource::Image { .. } => None,
        }
    }

    pub fn in_guest_mut(&mut self) -> Option<&mut InGuest> {
        match &mut self.source {
            FoundSource::Host(Found::Guest(found)) => Some(found),
            FoundSource::Host(Found::Shared(_)) | FoundSource::Image { .. } => None,
        }
    }
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
        let mut mounted = record.volumes.values();
        let has_log = record.termination_log.is_some()
            || mounted.any(|mount| mount.kind == VolumeKind::TerminationLog);
        if has_log
            && let Err(error) = guest
                .agent
                .remove_volume(&termination::volume_name(record.first_id()))
                .await
        {
            self.ledger
                .complain("remove the termination log in the guest", &error);
        }
    }

    /// Removes a volume of the guest that no container mounts any more, with what is in it.
    pub(super) async fn remove_volume(&mut self, guest: &Guest, name: &str) {
        self.mirrors.remove(name);
        if self.ledger.pod().mirrors.contains_key(name) {
            let forgotten = self.ledger.change_pod(|pod| drop(pod.mirrors.remove(name)));
            if let Err(error) = forgotten {
                self.ledger.complain("forget a mirror", &error);
            }
        }
        if let Err(error) = guest.agent.remove_volume(name).await {
            self.ledger.complain("remove a volume in the guest", &error);
        }
    }
}

fn of_volume(image: &str, error: PodError) -> PodError {
    PodError::ImageVolume {
        image: image.to_owned(),
        source: Box::new(error),
    }
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
