// SPDX-License-Identifier: Apache-2.0
//! How a pod's owner brings a pod back from a checkpoint: `RestorePod`. Most of it is a boot ([`super::boot`]); this file
//! has what differs: the containers are known before the VM is, their layers go back to their places on the image disk,
//! and the guest gets a new identity in place of its first one.
//!
//! A layer that no container needs any more leaves a hole on the disk, because the guest knows the places of the others.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::control::Extent;
use bulkhead_image::{Image, LayerBlob};
use bulkhead_vmm::extent::SECTOR_BYTES;
use rustix::fs::MemfdFlags;

use super::Owner;
use super::kept::{empty_dirs, kept_volumes, termination_log};
use crate::pod::checkpoint::{CheckpointError, Saved, SavedLayer};
use crate::pod::errors::PodError;
use crate::pod::life::record::{ContainerRecord, MirrorSource};
use crate::pod::life::spec::{ContainerSpec, Mount};
use crate::random::new_id;

/// What a pod is brought back from, and as what.
#[derive(Debug)]
pub struct BringBack {
    pub saved: Saved,
    /// For each container what it was, what it is to be, and its new id.
    pub containers: Vec<(ContainerRecord, ContainerSpec, String)>,
    /// Whether many pods begin like this. Then they share the pages of its memory, and its containers wait until a client
    /// asks for them ([`super::warm`]).
    pub is_warmed: bool,
}

/// What is known of the containers before there is a VM.
#[derive(Debug)]
pub(super) struct Prepared {
    records: Vec<ContainerRecord>,
    pub layers: Vec<(File, Extent)>,
}

/// How a pod may begin.
#[derive(Debug)]
pub enum Way {
    /// Forked if that is possible.
    Any,
    /// Its fork has failed.
    Boot,
    Saved(Box<BringBack>),
}

impl Way {
    pub(super) fn saved(&self) -> Option<&BringBack> {
        match self {
            Self::Saved(from) => Some(from),
            Self::Any | Self::Boot => None,
        }
    }
}

impl BringBack {
    /// A warmed pod with all its containers.
    pub fn warmed(saved: Saved) -> Self {
        let of = |one: &ContainerRecord| (one.clone(), one.spec.clone(), new_id());
        Self {
            containers: saved.manifest.containers.iter().map(of).collect(),
            saved,
            is_warmed: true,
        }
    }

    /// For the guest: which container has which id from now on.
    pub(super) fn renamed(&self) -> Vec<protocol::RestoredContainer> {
        let renamed = |(saved, _, new_id): &(ContainerRecord, ContainerSpec, String)| {
            protocol::RestoredContainer {
                id: saved.id.clone(),
                new_id: new_id.clone(),
            }
        };
        self.containers.iter().map(renamed).collect()
    }
}

impl Owner {
    /// Finds the images and mounts of all containers, and leases the images. After an error [`Self::give_up`] releases
    /// them.
    pub(super) fn prepare(&mut self, from: &BringBack) -> Result<Prepared, PodError> {
        let manifest = &from.saved.manifest;
        let (kernel, modules) = self.sums()?;
        if (kernel, &modules) != (manifest.kernel, &manifest.modules) {
            let what = "this node's guest kernel or its modules are not those of the saved VM";
            return Err(CheckpointError::Unlike(what.to_owned()).into());
        }
        let (mut records, mut paths) = (Vec::new(), BTreeMap::new());
        let mut mirrors = BTreeMap::new();
        for (saved, spec, id) in &from.containers {
            let (record, followed) = match from.is_warmed {
                true => (self.waiting(id, saved)?, BTreeMap::new()),
                false => self.brought_back(id, saved, spec.clone(), &mirrors)?,
            };
            mirrors.extend(followed);
            let volumes = record.spec.mounts.iter().filter_map(Mount::image);
            let volumes = volumes.map(|(_, id)| id.to_owned());
            let images: Vec<_> = [record.image_id.clone()]
                .into_iter()
                .chain(volumes)
                .collect();
            // The record must exist before the image lease: at its start, a daemon removes leases without a record.
            self.ledger.write_container(&record)?;
            for image in images {
                let leased =
                    tokio::task::block_in_place(|| self.shared.host.images.lease(&image, id))?;
                paths.extend(
                    leased
                        .into_iter()
                        .map(|LayerBlob { diff_id, path }| (diff_id, path)),
                );
            }
            records.push(record);
        }
        let layers = self.layers(&manifest.layers, &paths)?;
        // Where a layer would be that no container needs there is nothing, so a later one with it gets it elsewhere.
        let mut places = manifest.pod.layers.clone();
        places.retain(|diff_id, _| paths.contains_key(diff_id));
        self.ledger.change_pod(|pod| {
            pod.layers = places;
            pod.mirrors = mirrors;
        })?;
        Ok(Prepared { records, layers })
    }

    /// The record of a container that is brought back as `spec`, and which mirrors of the guest have which sources now.
    /// Those of other containers that were brought back are in `followed`.
    pub(super) fn brought_back(
        &self,
        id: &str,
        saved: &ContainerRecord,
        mut spec: ContainerSpec,
        followed: &BTreeMap<String, MirrorSource>,
    ) -> Result<(ContainerRecord, BTreeMap<String, MirrorSource>), PodError> {
        let image = self.same_image(saved, &spec.image)?;
        let mounts = self.find_mounts(id, &mut spec.mounts)?;
        same_volumes(saved, &spec)?;
        let mirrors = kept_volumes(&mounts, saved, followed)?;
        let record = ContainerRecord {
            termination_log: termination_log(&mounts),
            empty_dirs: empty_dirs(&mounts),
            // The guest has them under their old names.
            volumes: saved.volumes.clone(),
            first_id: Some(saved.first_id().to_owned()),
            user: saved.user.clone(),
            ..self.container_record(id, spec, &image)?
        };
        Ok((record, mirrors))
    }

    /// The image of a container, which must be what it was.
    fn same_image(&self, saved: &ContainerRecord, name: &str) -> Result<Image, PodError> {
        let found = self.shared.host.images.find(name)?;
        let found = found.ok_or_else(|| PodError::NoImage(name.to_owned()))?;
        match found.id.as_str() == saved.image_id {
            true => Ok(found),
            false => Err(unlike(saved, name, &saved.image_id).into()),
        }
    }

    /// Opens what goes on the image disk, in its order.
    fn layers(
        &self,
        saved: &[SavedLayer],
        paths: &BTreeMap<String, PathBuf>,
    ) -> Result<Vec<(File, Extent)>, PodError> {
        let mut layers: Vec<&SavedLayer> = saved.iter().collect();
        layers.sort_by_key(|layer| layer.extent.first_sector);
        let mut opened = Vec::new();
        for layer in layers {
            let failed = |source| CheckpointError::File {
                path: layer.diff_id.clone().into(),
                source,
            };
            let Some(path) = paths.get(&layer.diff_id) else {
                let hole = hole(layer.extent.sectors).map_err(failed)?;
                opened.push((hole, layer.extent));
                continue;
            };
            let here = self.shared.host.images.layer_sum(&layer.diff_id)?;
            if here.is_none() || here != layer.sum {
                return Err(CheckpointError::Unlike(format!(
                    "layer {} has another file system on this node than when the pod was saved",
                    layer.diff_id
                ))
                .into());
            }
            opened.push((File::open(path).map_err(failed)?, layer.extent));
        }
        Ok(opened)
    }

    /// Makes the containers the pod's, which is ready.
    pub(super) fn add_containers(&mut self, guest: &Guest, prepared: Prepared) {
        for record in prepared.records {
            self.ledger.add_container(record);
        }
        self.follow_mirrors(guest);
    }

    /// Releases what [`Self::prepare`] took.
    pub(super) fn give_up(&mut self, from: &BringBack) {
        for (_, _, id) in &from.containers {
            if let Err(error) = self.forget_container(id) {
                self.ledger
                    .complain("remove a container that was not brought back", &error);
            }
        }
    }
}

/// Checks that the images that a container mounts, which have been found, are what they were.
fn same_volumes(saved: &ContainerRecord, spec: &ContainerSpec) -> Result<(), CheckpointError> {
    let was: BTreeMap<&str, &str> = saved.spec.mounts.iter().filter_map(Mount::image).collect();
    let mut found = spec.mounts.iter().filter_map(Mount::image);
    let other = found.find_map(|(name, id)| {
        let was = was.get(name).filter(|was| **was != id)?;
        Some(unlike(saved, name, was))
    });
    other.map_or(Ok(()), Err)
}

fn unlike(saved: &ContainerRecord, name: &str, was: &str) -> CheckpointError {
    let container = &saved.spec.name;
    CheckpointError::Unlike(format!(
        "container {container}: image {name} is not {was}, with which it was saved"
    ))
}

/// A file of so many sectors without content, open for reading only.
fn hole(sectors: u64) -> io::Result<File> {
    let file: OwnedFd = rustix::fs::memfd_create("no-layer", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, sectors.saturating_mul(SECTOR_BYTES))?;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::pod::fixtures;
    use crate::pod::life::spec::MountSource;

    #[test]
    fn an_image_that_is_mounted_must_be_what_it_was() {
        let with = |id: &str| {
            let mut record = fixtures::container_record();
            let mut mount = fixtures::mount("/m");
            mount.source = MountSource::Image {
                image: "example/data".into(),
                sub_path: String::new(),
                id: id.into(),
            };
            record.spec.mounts = vec![fixtures::mount("/host"), mount];
            record
        };
        let saved = with("sha256:a");
        assert!(same_volumes(&saved, &with("sha256:a").spec).is_ok());
        let said = same_volumes(&saved, &with("sha256:b").spec).unwrap_err();
        assert!(said.to_string().contains("is not sha256:a"), "{said}");
    }

    #[test]
    fn a_hole_reads_as_zeroes_and_cannot_be_written() {
        let mut file = hole(3).unwrap();
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(content, vec![0; 3 * 512]);
        assert!(file.write_all(b"x").is_err());
    }
}
