// SPDX-License-Identifier: Apache-2.0
//! CRI's `RuntimeService`: one short method per RPC. The work is done in the other files of this module.

use bulkhead_cdi::Directories;
use bulkhead_proto::cri;
use bulkhead_proto::cri::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status};

use super::images::ImageServer;
use super::lists::{BoxStream, stream_list};
use super::{checkpoint, container, metrics, patience, sandbox, stats, status, streaming};
use crate::config::CgroupDriver;
use crate::pod::{PodError, Pods};
use crate::streaming::Streaming;

/// The service. It has no state of its own; that is in the pods.
#[derive(Clone, Debug)]
pub struct RuntimeServer {
    pods: Pods,
    streaming: Streaming,
    cgroup_driver: CgroupDriver,
    images: ImageServer,
    cdi: Directories,
}

type Answer<T> = Result<Response<T>, Status>;

/// Whether an id is one of this runtime's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    No,
    /// It is the beginning of one or more.
    Beginning,
    Whole,
}

impl Found {
    fn of<T>(id: &str, found: Result<T, PodError>, whole: impl FnOnce(&T) -> &str) -> Self {
        match found {
            Ok(found) if whole(&found) == id => Self::Whole,
            Ok(_) | Err(PodError::Ambiguous { .. }) => Self::Beginning,
            Err(_) => Self::No,
        }
    }
}

impl RuntimeServer {
    pub fn new(
        pods: Pods,
        streaming: Streaming,
        cgroup_driver: CgroupDriver,
        images: ImageServer,
        cdi: Directories,
    ) -> Self {
        Self {
            pods,
            streaming,
            cgroup_driver,
            images,
            cdi,
        }
    }

    /// The service of the images that these pods use.
    pub fn images(&self) -> &ImageServer {
        &self.images
    }

    pub fn find_pod(&self, id: &str) -> Found {
        Found::of(id, self.pods.pod(id), |view| &view.pod.id)
    }

    pub fn find_container(&self, id: &str) -> Found {
        Found::of(id, self.pods.container(id), |(_, record)| &record.id)
    }
}

#[tonic::async_trait]
impl RuntimeService for RuntimeServer {
    type StreamPodSandboxesStream = BoxStream<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = BoxStream<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = BoxStream<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = BoxStream<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = BoxStream<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = BoxStream<cri::ContainerEventResponse>;

    async fn version(
        &self,
        _request: Request<cri::VersionRequest>,
    ) -> Answer<cri::VersionResponse> {
        Ok(Response::new(status::version()))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let verbose = request.into_inner().verbose;
        Ok(Response::new(status::status(&self.pods, verbose).await))
    }

    async fn runtime_config(
        &self,
        _request: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        Ok(Response::new(status::runtime_config(self.cgroup_driver)))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        let config = request.into_inner().runtime_config;
        if let Some(network) = config.and_then(|config| config.network_config) {
            status::set_pod_cidr(&self.pods, &network.pod_cidr)?;
        }
        Ok(Response::new(cri::UpdateRuntimeConfigResponse {}))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let patience = patience::of(request.metadata());
        Ok(Response::new(
            sandbox::run(&self.pods, request.into_inner(), patience).await?,
        ))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        self.pods.stop(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        self.pods
            .remove(&request.into_inner().pod_sandbox_id)
            .await?;
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        Ok(Response::new(
            sandbox::status(&self.pods, request.into_inner()).await?,
        ))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter;
        let items = sandbox::list(&self.pods, filter.as_ref());
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let filter = request.into_inner().filter;
        let items = sandbox::list(&self.pods, filter.as_ref());
        Ok(Response::new(stream_list(items, |pod_sandboxes| {
            cri::StreamPodSandboxesResponse { pod_sandboxes }
        })))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        Ok(Response::new(
            container::create(&self.pods, &self.cdi, request.into_inner()).await?,
        ))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        self.pods
            .start_container(&request.into_inner().container_id)
            .await?;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        let grace = container::seconds(request.timeout);
        self.pods
            .stop_container(&request.container_id, grace)
            .await?;
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        self.pods
            .remove_container(&request.into_inner().container_id)
            .await?;
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let filter = request.into_inner().filter;
        let containers = container::list(&self.pods, filter.as_ref());
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let filter = request.into_inner().filter;
        let items = container::list(&self.pods, filter.as_ref());
        Ok(Response::new(stream_list(items, |containers| {
            cri::StreamContainersResponse { containers }
        })))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        Ok(Response::new(container::status(
            &self.pods,
            &request.into_inner(),
        )?))
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        container::update(&self.pods, request.into_inner()).await?;
        Ok(Response::new(cri::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        self.pods
            .reopen_log(&request.into_inner().container_id)
            .await?;
        Ok(Response::new(cri::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        Ok(Response::new(
            container::exec_sync(&self.pods, request.into_inner()).await?,
        ))
    }

    async fn get_container_events(
        &self,
        _request: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let listener = self
            .pods
            .listen()
            .map_err(|e| Status::resource_exhausted(e.to_string()))?;
        // A listener that was too slow gets the events of its queue and then this error. It has to list and listen
        // again.
        let events = futures_util::stream::unfold(Some(listener), |listener| async move {
            let mut listener = listener?;
            match listener.next().await {
                Ok(notice) => Some((Ok(container::event(&notice)), Some(listener))),
                Err(cut_off) => Some((Err(Status::data_loss(cut_off.to_string())), None)),
            }
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let url = streaming::exec(&self.pods, &self.streaming, request.into_inner())?;
        Ok(Response::new(url))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let url = streaming::attach(&self.pods, &self.streaming, request.into_inner())?;
        Ok(Response::new(url))
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        let url = streaming::port_forward(&self.pods, &self.streaming, request.into_inner())?;
        Ok(Response::new(url))
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        Ok(Response::new(
            stats::container(&self.pods, request.into_inner()).await?,
        ))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let filter = request.into_inner().filter;
        let stats = stats::list_containers(&self.pods, filter).await;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        Ok(Response::new(
            stats::pod(&self.pods, request.into_inner()).await?,
        ))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter;
        let stats = stats::list_pods(&self.pods, filter).await;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn checkpoint_container(
        &self,
        _request: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        Err(Status::unimplemented(
            "a container's processes share their kernel with the rest of its VM and cannot be saved without it: save the \
             whole pod with CheckpointPod (`bulkhead checkpoint`)",
        ))
    }

    async fn checkpoint_pod(
        &self,
        request: Request<cri::CheckpointPodRequest>,
    ) -> Answer<cri::CheckpointPodResponse> {
        let patience = patience::of(request.metadata());
        Ok(Response::new(
            checkpoint::save(&self.pods, request.into_inner(), patience).await?,
        ))
    }

    async fn restore_pod(
        &self,
        request: Request<cri::RestorePodRequest>,
    ) -> Answer<cri::RestorePodResponse> {
        let patience = patience::of(request.metadata());
        Ok(Response::new(
            checkpoint::restore(&self.pods, &self.cdi, request.into_inner(), patience).await?,
        ))
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        let descriptors = metrics::descriptors();
        Ok(Response::new(cri::ListMetricDescriptorsResponse {
            descriptors,
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        let pod_metrics = metrics::list(&self.pods).await;
        Ok(Response::new(cri::ListPodSandboxMetricsResponse {
            pod_metrics,
        }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        sandbox::update(&self.pods, request.into_inner()).await?;
        Ok(Response::new(cri::UpdatePodSandboxResourcesResponse {}))
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let filter = request.into_inner().filter;
        let items = stats::list_containers(&self.pods, filter).await;
        Ok(Response::new(stream_list(items, |container_stats| {
            cri::StreamContainerStatsResponse { container_stats }
        })))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let filter = request.into_inner().filter;
        let items = stats::list_pods(&self.pods, filter).await;
        Ok(Response::new(stream_list(items, |pod_sandbox_stats| {
            cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        })))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let items = metrics::list(&self.pods).await;
        Ok(Response::new(stream_list(items, |pod_sandbox_metrics| {
            cri::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        })))
    }
}
