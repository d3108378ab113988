// SPDX-License-Identifier: Apache-2.0
//! Passes on what makes a pod or container at a delegate: with the handler's name there, and noted in the inventory.

use bulkhead_delegate::Limit;
use bulkhead_proto::cri;
use tonic::{Request, Response, Status};

use super::roll::Change;
use super::{Endpoint, Own};
use crate::clock::now;
use crate::cri::caller_timeout;

type Answer<T> = Result<Response<T>, Status>;

impl<O: Own> Endpoint<O> {
    /// Runs a pod on a delegate, with the handler that is passed on.
    pub(super) async fn run_there(
        &self,
        index: usize,
        handler: String,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let inventory = self.inventory(index)?;
        let limit = Limit::Change(caller_timeout(request.metadata()));
        let mut request = request.into_inner();
        let sent = std::mem::replace(&mut request.runtime_handler, handler);
        let config = request.config.clone().unwrap_or_default();
        let mut pod = cri::PodSandbox {
            id: String::new(),
            metadata: config.metadata,
            state: cri::PodSandboxState::SandboxReady.into(),
            created_at: now(),
            labels: config.labels,
            annotations: config.annotations,
            runtime_handler: request.runtime_handler.clone(),
        };
        let call = inventory
            .delegate
            .runtime(limit, request, |mut client, request| async move {
                client.run_pod_sandbox(request).await
            });
        let answer = call.await?;
        pod.id.clone_from(&answer.pod_sandbox_id);
        inventory.note(Change::Ran(pod, sent));
        Ok(Response::new(answer))
    }

    /// Creates a container in a delegate's pod. The image's handler is translated like the pod's.
    pub(super) async fn create_there(
        &self,
        index: usize,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let inventory = self.inventory(index)?;
        let limit = Limit::Change(caller_timeout(request.metadata()));
        let mut request = request.into_inner();
        let image = request
            .config
            .as_mut()
            .and_then(|config| config.image.as_mut());
        if let Some(image) = image {
            image.runtime_handler = self.sides.as_passed(index, &image.runtime_handler);
        }
        let nothing = cri::ContainerConfig::default();
        let config = request.config.as_ref().unwrap_or(&nothing);
        let image = config.image.clone();
        let mut container = cri::Container {
            id: String::new(),
            pod_sandbox_id: request.pod_sandbox_id.clone(),
            metadata: config.metadata.clone(),
            image_ref: image
                .as_ref()
                .map_or_else(String::new, |image| image.image.clone()),
            image,
            state: cri::ContainerState::ContainerCreated.into(),
            created_at: now(),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            image_id: String::new(),
        };
        let call = inventory
            .delegate
            .runtime(limit, request, |mut client, request| async move {
                client.create_container(request).await
            });
        let answer = call.await?;
        container.id.clone_from(&answer.container_id);
        inventory.note(Change::Created(container));
        Ok(Response::new(answer))
    }

    /// Restores a pod at a delegate. The next list shows it.
    pub(super) async fn restore_there(
        &self,
        index: usize,
        handler: String,
        mut request: Request<cri::RestorePodRequest>,
    ) -> Answer<cri::RestorePodResponse> {
        let inventory = self.inventory(index)?;
        let limit = Limit::Change(caller_timeout(request.metadata()));
        request.get_mut().runtime_handler = handler;
        let answer = inventory.pass_on(limit, request, |mut client, request| async move {
            client.restore_pod(request).await
        });
        Ok(answer.await?)
    }
}
