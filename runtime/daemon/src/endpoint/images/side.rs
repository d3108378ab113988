// SPDX-License-Identifier: Apache-2.0
//! The images of one side: each RPC, asked of our own server or of a delegate.

use std::time::Duration;

use bulkhead_delegate::{Delegate, Limit};
use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageService;
use tonic::{Request, Status};

use super::super::sides::Side;
use super::super::{Endpoint, Own};

/// One side's images.
#[derive(Debug)]
pub enum SideImages<'a, I> {
    Ours(&'a I),
    /// A delegate, and the handler that is passed on to it.
    Delegate(&'a Delegate, &'a str),
}

impl<O: Own> Endpoint<O> {
    /// The images of a side.
    pub fn images<'a>(&'a self, side: &'a Side) -> SideImages<'a, O::Images> {
        match (side, self.sides.delegate_at(side)) {
            (Side::Delegate(_, handler), Some(delegate)) => SideImages::Delegate(delegate, handler),
            _ => SideImages::Ours(self.ours.images()),
        }
    }
}

impl<I: ImageService> SideImages<'_, I> {
    pub async fn list(&self, filter: Option<cri::ImageFilter>) -> Result<Vec<cri::Image>, Status> {
        let images = match *self {
            Self::Ours(server) => {
                let request = Request::new(cri::ListImagesRequest { filter });
                server.list_images(request).await?.into_inner().images
            }
            Self::Delegate(delegate, handler) => {
                let image = filter.and_then(|filter| filter.image);
                let filter = image.map(|image| cri::ImageFilter {
                    image: Some(passed(image, handler)),
                });
                let request = cri::ListImagesRequest { filter };
                let answer =
                    delegate.images(Limit::List, request, |mut client, request| async move {
                        client.list_images(request).await
                    });
                answer.await?.images
            }
        };
        Ok(images)
    }

    pub async fn status(
        &self,
        mut request: cri::ImageStatusRequest,
        limit: Limit,
    ) -> Result<cri::ImageStatusResponse, Status> {
        match *self {
            Self::Ours(server) => Ok(server
                .image_status(Request::new(request))
                .await?
                .into_inner()),
            Self::Delegate(delegate, handler) => {
                request.image = request.image.map(|image| passed(image, handler));
                let answer = delegate.images(limit, request, |mut client, request| async move {
                    client.image_status(request).await
                });
                Ok(answer.await?)
            }
        }
    }

    pub async fn pull(
        &self,
        mut request: cri::PullImageRequest,
        caller: Option<Duration>,
    ) -> Result<cri::PullImageResponse, Status> {
        match *self {
            Self::Ours(server) => Ok(server.pull_image(Request::new(request)).await?.into_inner()),
            Self::Delegate(delegate, handler) => {
                request.image = request.image.map(|image| passed(image, handler));
                // kubelet sets no time limit: a large image may take long.
                let limit = caller.map_or(Limit::Endless, |limit| Limit::Change(Some(limit)));
                let answer = delegate.images(limit, request, |mut client, request| async move {
                    client.pull_image(request).await
                });
                Ok(answer.await?)
            }
        }
    }

    pub async fn remove(
        &self,
        mut request: cri::RemoveImageRequest,
        caller: Option<Duration>,
    ) -> Result<(), Status> {
        match *self {
            Self::Ours(server) => server.remove_image(Request::new(request)).await.map(drop),
            Self::Delegate(delegate, handler) => {
                request.image = request.image.map(|image| passed(image, handler));
                let limit = Limit::Change(caller);
                let answer = delegate.images(limit, request, |mut client, request| async move {
                    client.remove_image(request).await
                });
                Ok(answer.await.map(drop)?)
            }
        }
    }

    pub async fn file_systems(&self) -> Result<cri::ImageFsInfoResponse, Status> {
        let request = cri::ImageFsInfoRequest {};
        match *self {
            Self::Ours(server) => Ok(server
                .image_fs_info(Request::new(request))
                .await?
                .into_inner()),
            Self::Delegate(delegate, _) => {
                let answer =
                    delegate.images(Limit::List, request, |mut client, request| async move {
                        client.image_fs_info(request).await
                    });
                Ok(answer.await?)
            }
        }
    }
}

/// An image as a delegate is asked for it. Its handlers have other names than ours.
fn passed(image: cri::ImageSpec, handler: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        runtime_handler: handler.to_owned(),
        ..image
    }
}
