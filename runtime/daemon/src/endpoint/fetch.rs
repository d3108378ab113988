// SPDX-License-Identifier: Apache-2.0
//! Gets an image for a container whose pod is on one side, if only another side has it.
//!
//! A client that names no pod when it asks for an image (crictl, critest, kubelet after it was started again) hears that
//! the image is there, and pulls nothing. So it may be on the wrong side when `CreateContainer` comes. Then it is pulled
//! on the right one: without credentials, because those that opened it were another pod's. So a pod gets nothing that it
//! could not have pulled itself.

use std::time::Duration;

use bulkhead_delegate::Limit;
use bulkhead_proto::cri;
use tonic::Status;

use super::sides::Side;
use super::{Endpoint, Own};

impl<O: Own> Endpoint<O> {
    /// Pulls the images of a container that is about to be created in a pod of this side, as far as only others have
    /// them.
    pub(super) async fn fetch_images(
        &self,
        side: &Side,
        request: &cri::CreateContainerRequest,
        caller: Option<Duration>,
    ) -> Result<(), Status> {
        for image in images(request) {
            self.fetch(side, image, caller).await?;
        }
        Ok(())
    }

    /// Pulls an image that this side does not have and another one has.
    async fn fetch(
        &self,
        side: &Side,
        image: &cri::ImageSpec,
        caller: Option<Duration>,
    ) -> Result<(), Status> {
        // If this side cannot say whether it has the image, it says so again when the container is created.
        if !matches!(self.find(side, image).await, Ok(None)) {
            return Ok(());
        }
        let others = self.sides.all();
        for other in others.iter().filter(|other| !other.is_same(side)) {
            // A delegate that does not answer may have it, but nobody can say by what name.
            let Ok(Some(found)) = self.find(other, image).await else {
                continue;
            };
            let Some(name) = name(image, &found) else {
                continue;
            };
            tracing::info!("pulling {name} without credentials: only another side has it");
            let wanted = cri::PullImageRequest {
                image: Some(cri::ImageSpec {
                    image: name.to_owned(),
                    ..image.clone()
                }),
                ..Default::default()
            };
            let pulled = self.pull_on(side, wanted, caller).await;
            pulled.map_err(|error| {
                Status::not_found(format!(
                    "{} is not there, and a pull of {name} without credentials failed: {}",
                    image.image,
                    error.message()
                ))
            })?;
            if !matches!(self.find(side, image).await, Ok(None)) {
                break;
            }
        }
        Ok(())
    }

    async fn find(
        &self,
        side: &Side,
        image: &cri::ImageSpec,
    ) -> Result<Option<cri::Image>, Status> {
        let request = cri::ImageStatusRequest {
            image: Some(image.clone()),
            verbose: false,
        };
        Ok(self.images(side).status(request, Limit::Read).await?.image)
    }
}

/// The images that a container needs: its own, and those of its image volumes.
fn images(request: &cri::CreateContainerRequest) -> impl Iterator<Item = &cri::ImageSpec> {
    let config = request.config.iter();
    config.flat_map(|config| {
        let volumes = config
            .mounts
            .iter()
            .filter_map(|mount| mount.image.as_ref());
        config.image.iter().chain(volumes)
    })
}

/// By what name to pull an image that another side has found. kubelet asks by its id, for which a registry cannot be
/// asked: then by its digest, which is exact, or else by a tag.
fn name<'a>(image: &'a cri::ImageSpec, found: &'a cri::Image) -> Option<&'a str> {
    let digits = found.id.strip_prefix("sha256:").unwrap_or(&found.id);
    if image.image != found.id && image.image != digits {
        return Some(&image.image);
    }
    let mut names = found.repo_digests.iter().chain(&found.repo_tags);
    names.next().map(String::as_str)
}
