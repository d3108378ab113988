// SPDX-License-Identifier: Apache-2.0
//! CRI's `RuntimeService` in front of all sides: one short method per RPC.

use bulkhead_delegate::Limit;
use bulkhead_proto::cri;
use bulkhead_proto::cri::runtime_service_server::RuntimeService;
use futures_util::future::join;
use tonic::{Request, Response, Status};

use super::holder::{self, Holder, Kind};
use super::inventory::Inventory;
use super::roll::Change;
use super::sides::Side;
use super::{Endpoint, Own, events, metrics, status};
use crate::cri::{BoxStream, caller_timeout, stream_list};

type Answer<T> = Result<Response<T>, Status>;

/// Sends a call about a pod or container to the side that has it. What a delegate did is noted in its inventory. A
/// macro, because the methods have different types.
macro_rules! pass_on {
    ($self:ident, $request:ident, pod, $($rest:tt)*) => {{
        let id = $request.get_ref().pod_sandbox_id.clone();
        let holder = $self.pod(&id).await?;
        pass_on!(holder, id, $self, $request, $($rest)*)
    }};
    ($self:ident, $request:ident, container, $($rest:tt)*) => {{
        let id = $request.get_ref().container_id.clone();
        let holder = $self.container(&id).await?;
        pass_on!(holder, id, $self, $request, $($rest)*)
    }};
    ($holder:ident, $id:ident, $self:ident, $request:ident, $limit:ident, $rpc:ident $(, $note:path)?) => {
        match $holder {
            Holder::Ours => $self.ours.$rpc($request).await,
            Holder::Delegate(index) => {
                let inventory = $self.inventory(index)?;
                let limit = $limit(&$request);
                let answer = inventory.pass_on(limit, $request, |mut client, request| async move {
                    client.$rpc(request).await
                });
                let answer = answer.await?;
                $(inventory.note($note($id));)?
                Ok(answer)
            }
        }
    };
}

fn read<T>(_: &Request<T>) -> Limit {
    Limit::Read
}

fn change<T>(request: &Request<T>) -> Limit {
    Limit::Change(caller_timeout(request.metadata()))
}

impl<O: Own> Endpoint<O> {
    async fn pod(&self, id: &str) -> Result<Holder, Status> {
        holder::find(Kind::Pod, id, self.ours.find_pod(id), &self.inventories).await
    }

    async fn container(&self, id: &str) -> Result<Holder, Status> {
        let ours = self.ours.find_container(id);
        holder::find(Kind::Container, id, ours, &self.inventories).await
    }

    pub(super) fn inventory(&self, index: usize) -> Result<&Inventory, Status> {
        let found = self.inventories.get(index);
        found.ok_or_else(|| Status::internal(format!("there is no delegate {index}")))
    }
}

#[tonic::async_trait]
impl<O: Own> RuntimeService for Endpoint<O> {
    type StreamPodSandboxesStream = BoxStream<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = BoxStream<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = BoxStream<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = BoxStream<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = BoxStream<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = BoxStream<cri::ContainerEventResponse>;

    async fn version(&self, request: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        self.ours.version(request).await
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let verbose = request.get_ref().verbose;
        let (ours, ()) = join(self.ours.status(request), self.first_status()).await;
        let merged = status::merge(ours?.into_inner(), &self.sides, verbose);
        Ok(Response::new(merged))
    }

    async fn runtime_config(
        &self,
        request: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        self.ours.runtime_config(request).await
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        let message = request.get_ref().clone();
        let answer = self.ours.update_runtime_config(request).await?;
        self.tell_all(message).await;
        Ok(answer)
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let message = request.get_ref();
        let side = self
            .sides
            .of_new_pod(&message.runtime_handler, message.config.as_ref())?;
        if let Some(config) = &message.config {
            self.seen.learn(&config.annotations, &side);
        }
        match side {
            Side::Ours => self.ours.run_pod_sandbox(request).await,
            Side::Delegate(index, handler) => self.run_there(index, handler, request).await,
        }
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        pass_on!(
            self,
            request,
            pod,
            change,
            stop_pod_sandbox,
            Change::PodStopped
        )
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        pass_on!(
            self,
            request,
            pod,
            change,
            remove_pod_sandbox,
            Change::PodRemoved
        )
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let id = request.get_ref().pod_sandbox_id.clone();
        let holder = self.pod(&id).await?;
        let answer: Answer<_> = pass_on!(holder, id, self, request, read, pod_sandbox_status);
        let mut answer = answer?;
        if let (Holder::Delegate(index), Some(pod)) = (holder, &mut answer.get_mut().status) {
            self.inventory(index)?.show_handler(pod, index, &self.sides);
        }
        Ok(answer)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let items = self.all_pods(request.into_inner().filter).await?;
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.all_pods(request.into_inner().filter).await?;
        Ok(Response::new(stream_list(items, |pod_sandboxes| {
            cri::StreamPodSandboxesResponse { pod_sandboxes }
        })))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let holder = self.pod(&request.get_ref().pod_sandbox_id).await?;
        if let Some(config) = &request.get_ref().sandbox_config {
            self.seen.learn(&config.annotations, &holder.into());
        }
        let caller = caller_timeout(request.metadata());
        self.fetch_images(&holder.into(), request.get_ref(), caller)
            .await?;
        match holder {
            Holder::Ours => self.ours.create_container(request).await,
            Holder::Delegate(index) => self.create_there(index, request).await,
        }
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        pass_on!(
            self,
            request,
            container,
            change,
            start_container,
            Change::Started
        )
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        pass_on!(
            self,
            request,
            container,
            change,
            stop_container,
            Change::Stopped
        )
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        pass_on!(
            self,
            request,
            container,
            change,
            remove_container,
            Change::Removed
        )
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let containers = self.all_containers(request.into_inner().filter).await?;
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = self.all_containers(request.into_inner().filter).await?;
        Ok(Response::new(stream_list(items, |containers| {
            cri::StreamContainersResponse { containers }
        })))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        pass_on!(self, request, container, read, container_status)
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        pass_on!(self, request, container, change, update_container_resources)
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        pass_on!(self, request, container, change, reopen_container_log)
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        pass_on!(self, request, container, change, exec_sync)
    }

    async fn get_container_events(
        &self,
        request: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let ours = self.ours.get_container_events(request).await?.into_inner();
        let all = events::merge(ours, &self.inventories, &self.sides);
        Ok(Response::new(all))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        pass_on!(self, request, container, read, exec)
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        pass_on!(self, request, container, read, attach)
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        pass_on!(self, request, pod, read, port_forward)
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        pass_on!(self, request, container, read, container_stats)
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let stats = self
            .all_container_stats(request.into_inner().filter)
            .await?;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        pass_on!(self, request, pod, read, pod_sandbox_stats)
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let stats = self.all_pod_stats(request.into_inner().filter).await?;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        pass_on!(self, request, container, change, checkpoint_container)
    }

    async fn checkpoint_pod(
        &self,
        request: Request<cri::CheckpointPodRequest>,
    ) -> Answer<cri::CheckpointPodResponse> {
        pass_on!(self, request, pod, change, checkpoint_pod)
    }

    async fn restore_pod(
        &self,
        request: Request<cri::RestorePodRequest>,
    ) -> Answer<cri::RestorePodResponse> {
        let message = request.get_ref();
        let config = message.config.as_ref();
        match self.sides.of_new_pod(&message.runtime_handler, config)? {
            Side::Ours => self.ours.restore_pod(request).await,
            Side::Delegate(index, handler) => self.restore_there(index, handler, request).await,
        }
    }

    async fn list_metric_descriptors(
        &self,
        request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        let ours = self.ours.list_metric_descriptors(request);
        let (ours, theirs) = join(ours, self.descriptors()).await;
        let mut descriptors = ours?.into_inner().descriptors;
        for theirs in theirs {
            metrics::add_descriptors(&mut descriptors, theirs);
        }
        Ok(Response::new(cri::ListMetricDescriptorsResponse {
            descriptors,
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        let pod_metrics = self.all_metrics().await?;
        Ok(Response::new(cri::ListPodSandboxMetricsResponse {
            pod_metrics,
        }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        pass_on!(self, request, pod, change, update_pod_sandbox_resources)
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let items = self
            .all_container_stats(request.into_inner().filter)
            .await?;
        Ok(Response::new(stream_list(items, |container_stats| {
            cri::StreamContainerStatsResponse { container_stats }
        })))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let items = self.all_pod_stats(request.into_inner().filter).await?;
        Ok(Response::new(stream_list(items, |pod_sandbox_stats| {
            cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        })))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let items = self.all_metrics().await?;
        Ok(Response::new(stream_list(items, |pod_sandbox_metrics| {
            cri::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        })))
    }
}

#[cfg(test)]
#[path = "runtime_tests.rs"]
mod tests;
