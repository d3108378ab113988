// SPDX-License-Identifier: Apache-2.0
//! The `ImageService` in front of several sides, each with images of its own.
//!
//! Which sides a call means: the one of the handler in the request; else the one of the pod for which kubelet asks
//! ([`super::seen`]); else all. So an image is pulled where its pod runs, with the credentials of that pod and for no
//! other, and is said to be there only to pods that can use it. Lists, removal and file systems are of all sides.

mod kept;
mod merge;
mod side;
#[cfg(test)]
mod tests;

use std::time::Duration;

use bulkhead_delegate::{Health, Limit};
use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageService;
use futures_util::future::join_all;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

use super::inventory::Inventory;
use super::seen::Named;
use super::sides::Side;
use super::{Endpoint, Own};
use crate::cri::{BoxStream, caller_timeout, stream_list};
pub(super) use kept::KeptImages;

/// The service.
#[derive(Debug)]
pub struct ImageEndpoint<O> {
    pods: Endpoint<O>,
}

type Answer<T> = Result<Response<T>, Status>;

impl<O: Own> ImageEndpoint<O> {
    pub fn new(pods: Endpoint<O>) -> Self {
        Self { pods }
    }

    /// The side that a request means. `None`: all sides.
    async fn side_of(
        &self,
        spec: Option<&cri::ImageSpec>,
        pod: Option<&cri::PodSandboxConfig>,
    ) -> Result<Option<Side>, Status> {
        let Some(spec) = spec else {
            return Ok(None);
        };
        if !spec.runtime_handler.is_empty() {
            return self.pods.sides.of_handler(&spec.runtime_handler).map(Some);
        }
        let Some(named) = Named::of(spec, pod) else {
            return Ok(None);
        };
        if let Some(side) = self.pods.seen.find(named.annotations()) {
            return Ok(Some(side));
        }
        let side = self.find_pod(named).await;
        if let Some(side) = &side {
            self.pods.seen.learn(named.annotations(), side);
        }
        Ok(side)
    }

    /// Looks for a pod in the lists of all sides, ours first: it waits for no delegate if the pod is one of ours.
    async fn find_pod(&self, named: Named<'_>) -> Option<Side> {
        let request = Request::new(cri::ListPodSandboxRequest { filter: None });
        let ours = self.pods.ours.list_pod_sandbox(request).await.ok()?;
        if ours.into_inner().items.iter().any(|pod| named.is(pod)) {
            return Some(Side::Ours);
        }
        let inventories = &self.pods.inventories;
        join_all(inventories.iter().map(Inventory::refresh_pods)).await;
        let found = inventories
            .iter()
            .position(|inventory| inventory.roll().pods().any(|pod| named.is(pod)));
        found.map(|index| Side::Delegate(index, String::new()))
    }

    /// Asks a side for something that others answer, too. Nobody waits again for a delegate that was slow before its watch
    /// has heard from it.
    async fn ask<T>(
        &self,
        side: &Side,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        match self.pods.sides.delegate_at(side) {
            Some(delegate) if delegate.health() == Health::Slow => Err(Status::deadline_exceeded(
                format!("the delegate {} does not answer in time", delegate.name()),
            )),
            _ => answer.await,
        }
    }

    /// The images of one side. Those of a delegate that does not answer are what it listed last, because kubelet forgets
    /// whose credentials have opened an image that is not listed.
    async fn list_side(
        &self,
        side: &Side,
        filter: Option<cri::ImageFilter>,
    ) -> Result<Vec<cri::Image>, Status> {
        let name = filter.as_ref().and_then(|filter| filter.image.as_ref());
        let name = name.map_or_else(String::new, |image| image.image.clone());
        let asked = Instant::now();
        let listed = self.ask(side, self.pods.images(side).list(filter)).await;
        let Some(kept) = self.pods.kept_of(side) else {
            return listed;
        };
        match listed {
            Ok(images) => {
                if name.is_empty() {
                    kept.keep(asked, images.clone()).await;
                }
                Ok(images)
            }
            Err(error) => kept.last(&name).await.ok_or(error),
        }
    }

    async fn list(&self, filter: Option<cri::ImageFilter>) -> Result<Vec<cri::Image>, Status> {
        let wanted = filter.as_ref().and_then(|filter| filter.image.as_ref());
        let handler = wanted.map_or("", |image| &image.runtime_handler);
        if !handler.is_empty() {
            return self
                .list_side(&self.pods.sides.of_handler(handler)?, filter)
                .await;
        }
        let sides = self.pods.sides.all();
        let lists = sides
            .iter()
            .map(|side| self.list_side(side, filter.clone()));
        let lists: Result<Vec<_>, Status> = join_all(lists).await.into_iter().collect();
        Ok(merge::lists(lists?))
    }

    /// The image as any side has it. A delegate that does not answer is left out.
    async fn status_anywhere(
        &self,
        request: cri::ImageStatusRequest,
    ) -> Result<cri::ImageStatusResponse, Status> {
        let sides = self.pods.sides.all();
        let asked = sides.iter().map(|side| {
            let images = self.pods.images(side);
            let request = request.clone();
            async move {
                let answer = self.ask(side, images.status(request, Limit::List));
                (side, answer.await)
            }
        });
        let answers = present(join_all(asked).await)?;
        Ok(merge::statuses(answers))
    }

    /// Pulls an image on all sides. It must arrive everywhere.
    async fn pull_everywhere(
        &self,
        request: cri::PullImageRequest,
        caller: Option<Duration>,
    ) -> Result<cri::PullImageResponse, Status> {
        let sides = self.pods.sides.all();
        let pulls = sides.iter().map(|side| {
            let request = request.clone();
            self.pods.pull_on(side, request, caller)
        });
        let pulled: Result<Vec<_>, Status> = join_all(pulls).await.into_iter().collect();
        let first = pulled?.into_iter().next();
        first.ok_or_else(|| Status::internal("no side has pulled the image"))
    }
}

impl<O: Own> Endpoint<O> {
    /// What is kept of a side's images, if it is a delegate.
    fn kept_of(&self, side: &Side) -> Option<&KeptImages> {
        match side {
            Side::Ours => None,
            Side::Delegate(index, _) => self.kept_images.get(*index),
        }
    }

    /// Pulls an image on one side. From then on it stays listed, even if the delegate goes away before the next list.
    pub(super) async fn pull_on(
        &self,
        side: &Side,
        request: cri::PullImageRequest,
        caller: Option<Duration>,
    ) -> Result<cri::PullImageResponse, Status> {
        let images = self.images(side);
        let answer = images.pull(request, caller).await?;
        if let Some(kept) = self.kept_of(side) {
            let asked = Instant::now();
            match images.list(None).await {
                Ok(images) => kept.keep(asked, images).await,
                Err(_) => kept.forget().await,
            }
        }
        Ok(answer)
    }
}

#[tonic::async_trait]
impl<O: Own> ImageService for ImageEndpoint<O> {
    type StreamImagesStream = BoxStream<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        let images = self.list(request.into_inner().filter).await?;
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let images = self.list(request.into_inner().filter).await?;
        let message = |images| cri::StreamImagesResponse { images };
        Ok(Response::new(stream_list(images, message)))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let answer = match self.side_of(request.image.as_ref(), None).await? {
            Some(side) => self.pods.images(&side).status(request, Limit::Read).await?,
            None => self.status_anywhere(request).await?,
        };
        Ok(Response::new(answer))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let caller = caller_timeout(request.metadata());
        let request = request.into_inner();
        let pod = request.sandbox_config.as_ref();
        let answer = match self.side_of(request.image.as_ref(), pod).await? {
            Some(side) => self.pods.pull_on(&side, request, caller).await?,
            None => self.pull_everywhere(request, caller).await?,
        };
        Ok(Response::new(answer))
    }

    /// Removes an image from all sides. If one of them does not answer, the image is not gone, and kubelet must not
    /// forget it.
    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let caller = caller_timeout(request.metadata());
        let request = request.into_inner();
        let handler = request
            .image
            .as_ref()
            .map_or("", |image| &image.runtime_handler);
        let sides = match handler {
            "" => self.pods.sides.all(),
            handler => vec![self.pods.sides.of_handler(handler)?],
        };
        let removals = sides.iter().map(|side| {
            let request = request.clone();
            async move { self.pods.images(side).remove(request, caller).await }
        });
        for removed in join_all(removals).await {
            match removed {
                Err(error) if error.code() != Code::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let mut sides = self.pods.sides.all();
        // kubelet takes the first file systems for the node's.
        sides.sort_by_key(|side| *side != Side::Ours);
        let asked = sides.iter().map(|side| async move {
            let images = self.pods.images(side);
            (side, self.ask(side, images.file_systems()).await)
        });
        let answers = present(join_all(asked).await)?;
        Ok(Response::new(merge::file_systems(answers)))
    }
}

/// The answers without those that delegates failed to give. Ours must be there.
fn present<T>(answers: Vec<(&Side, Result<T, Status>)>) -> Result<Vec<T>, Status> {
    let mut present = Vec::new();
    for (side, answer) in answers {
        match answer {
            Ok(answer) => present.push(answer),
            Err(error) if *side == Side::Ours => return Err(error),
            Err(error) => tracing::debug!("a delegate is left out: {error}"),
        }
    }
    Ok(present)
}
