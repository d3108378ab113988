// SPDX-License-Identifier: Apache-2.0
//! What a pod's owner does so that a container finds its volumes: makes them in the guest where they are missing and
//! fills in the mounts of the agent's request.

use std::path::Path;

use super::{Found, VolumeError, text};
use crate::guest::{Guest, protocol};
use crate::pod::PodError;
use crate::pod::owner::Owner;
use crate::pod::spec::{ContainerSpec, Mount, MountSource, Propagation};

impl Owner {
    /// Prepares every mount of a container that is about to be created.
    pub(in crate::pod) async fn prepare_mounts(
        &mut self,
        guest: &Guest,
        spec: &ContainerSpec,
        request: &mut protocol::CreateContainerRequest,
    ) -> Result<(), PodError> {
        for mount in &spec.mounts {
            let prepared = match &mount.source {
                MountSource::Host(path) => self.prepare_host(guest, &request.id, path).await?,
                MountSource::Image { image, .. } => {
                    return Err(VolumeError::NotSupported {
                        what: "an image volume",
                        path: image.into(),
                    }
                    .into());
                }
            };
            request.mounts.push(described(mount, prepared));
        }
        Ok(())
    }

    async fn prepare_host(
        &mut self,
        guest: &Guest,
        id: &str,
        path: &Path,
    ) -> Result<protocol::Mount, PodError> {
        let volumes = &self.shared.host.volumes;
        let uid = &self.pod.spec.name.uid;
        let found = tokio::task::block_in_place(|| volumes.find(uid, id, path))?;
        match found {
            Found::Guest(found) => {
                let name = found.volume.name.clone();
                let made = guest.agent.ensure_volume(found.volume).await;
                made.map_err(|source| VolumeError::Make {
                    name: name.clone(),
                    source,
                })?;
                Ok(protocol::Mount {
                    source: Some(protocol::mount::Source::Volume(name)),
                    sub_path: text(&found.sub_path),
                    made_as: found.made_as,
                    ..Default::default()
                })
            }
            Found::Shared(path) => Err(VolumeError::NotSupported {
                what: "a directory of the host's",
                path,
            }
            .into()),
        }
    }
}

/// What does not depend on the kind of volume.
fn described(mount: &Mount, prepared: protocol::Mount) -> protocol::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => protocol::Propagation::Private,
        Propagation::HostToContainer => protocol::Propagation::HostToContainer,
    };
    protocol::Mount {
        container_path: mount.container_path.clone(),
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_readonly,
        propagation: propagation.into(),
        ..prepared
    }
}
