// SPDX-License-Identifier: Apache-2.0
//! The fake server's images. The id of an image is made from its name, so it is the same on every server.

use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageService;
use tonic::{Request, Status};

use super::{Answer, BoxStream, Fake, Response, World};

/// What a pulled image takes.
const IMAGE_BYTES: u64 = 100;

impl World {
    pub(super) fn image(&self, spec: Option<cri::ImageSpec>) -> Option<&cri::Image> {
        let name = spec.unwrap_or_default().image;
        let mut images = self.images.iter();
        images.find(|image| image.id == name || image.repo_tags.contains(&name))
    }
}

/// The id of the image with this name.
pub fn image_id(name: &str) -> String {
    format!("sha256:{name}")
}

#[tonic::async_trait]
impl ImageService for Fake {
    type StreamImagesStream = BoxStream<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        let world = self.enter("list_images").await?;
        let wanted = request.into_inner().filter.and_then(|filter| filter.image);
        let images = match wanted {
            Some(spec) if !spec.image.is_empty() => {
                world.image(Some(spec)).into_iter().cloned().collect()
            }
            _ => world.images.clone(),
        };
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        _: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let images = self.enter("stream_images").await?.images.clone();
        let message = cri::StreamImagesResponse { images };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(message)))))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let world = self.enter("image_status").await?;
        Ok(Response::new(cri::ImageStatusResponse {
            image: world.image(request.into_inner().image).cloned(),
            ..Default::default()
        }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let mut world = self.enter("pull_image").await?;
        let request = request.into_inner();
        world.pulls.push(request.clone());
        let password = request.auth.map(|auth| auth.password);
        if world.secret.is_some() && world.secret != password {
            return Err(Status::unknown("the registry wants another password"));
        }
        let name = request.image.unwrap_or_default().image;
        let id = image_id(&name);
        if !world.images.iter().any(|image| image.id == id) {
            world.images.push(cri::Image {
                id: id.clone(),
                repo_tags: vec![name],
                size: IMAGE_BYTES,
                ..Default::default()
            });
        }
        Ok(Response::new(cri::PullImageResponse { image_ref: id }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let mut world = self.enter("remove_image").await?;
        let id = world
            .image(request.into_inner().image)
            .map(|image| image.id.clone());
        world.images.retain(|image| Some(&image.id) != id.as_ref());
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        drop(self.enter("image_fs_info").await?);
        let usage = cri::FilesystemUsage {
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: format!("/{}", self.name),
            }),
            ..Default::default()
        };
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![usage],
            container_filesystems: Vec::new(),
        }))
    }
}
