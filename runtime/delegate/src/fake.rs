// SPDX-License-Identifier: Apache-2.0
//! A small CRI server for tests: it has what the test put into it, and can be slow, old or gone.

mod images;

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageServiceServer;
use bulkhead_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

pub use images::image_id;

/// What the server has. A test reads and changes it.
#[derive(Debug, Default)]
pub struct World {
    pub pods: Vec<cri::PodSandbox>,
    pub containers: Vec<cri::Container>,
    pub container_stats: Vec<cri::ContainerStats>,
    pub pod_stats: Vec<cri::PodSandboxStats>,
    pub descriptors: Vec<cri::MetricDescriptor>,
    pub metrics: Vec<cri::PodSandboxMetrics>,
    pub status: cri::StatusResponse,
    /// RPCs that the server does not have.
    pub missing: BTreeSet<&'static str>,
    /// The RPCs that were called.
    pub calls: Vec<&'static str>,
    pub ran: Vec<cri::RunPodSandboxRequest>,
    pub created: Vec<cri::CreateContainerRequest>,
    pub images: Vec<cri::Image>,
    /// Whether a container is refused whose image was not pulled.
    pub needs_images: bool,
    /// The password without which nothing is pulled.
    pub secret: Option<String>,
    /// The pulls that were asked for.
    pub pulls: Vec<cri::PullImageRequest>,
    made: usize,
}

/// The server. Clones share the world.
#[derive(Clone, Debug)]
pub struct Fake {
    name: &'static str,
    world: Arc<Mutex<World>>,
    frozen: watch::Sender<bool>,
    events: broadcast::Sender<cri::ContainerEventResponse>,
}

/// A running server. It is gone when this is dropped, with all its connections, like a killed process.
#[derive(Debug)]
pub struct Running(Option<Runtime>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Fake {
    /// A server whose ids begin with its name.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            world: Arc::default(),
            frozen: watch::Sender::new(false),
            events: broadcast::Sender::new(100),
        }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves on the socket in a thread of its own.
    ///
    /// # Panics
    /// If it cannot listen.
    #[allow(clippy::unwrap_used)]
    pub fn serve(&self, socket: &Path) -> Running {
        let _ = std::fs::remove_file(socket);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(socket).unwrap()
        };
        let server = tonic::transport::Server::builder()
            .add_service(RuntimeServiceServer::new(self.clone()))
            .add_service(ImageServiceServer::new(self.clone()))
            .serve_with_incoming(UnixListenerStream::new(listener));
        runtime.spawn(server);
        Running(Some(runtime))
    }

    /// Answers nothing until it is thawed, like a stopped process.
    pub fn freeze(&self, frozen: bool) {
        self.frozen.send_replace(frozen);
    }

    /// Tells an event to all who listen.
    pub fn tell(&self, event: cri::ContainerEventResponse) {
        let _ = self.events.send(event);
    }

    /// How many clients listen to events.
    pub fn listeners(&self) -> usize {
        self.events.receiver_count()
    }

    async fn enter(&self, rpc: &'static str) -> Result<MutexGuard<'_, World>, Status> {
        let _ = self.frozen.subscribe().wait_for(|frozen| !frozen).await;
        let mut world = self.world();
        world.calls.push(rpc);
        if world.missing.contains(rpc) {
            return Err(Status::unimplemented(format!("unknown method {rpc}")));
        }
        Ok(world)
    }
}

impl World {
    fn pod(&mut self, id: &str) -> Result<&mut cri::PodSandbox, Status> {
        let found = self.pods.iter_mut().find(|pod| pod.id == id);
        found.ok_or_else(|| Status::not_found(format!("no pod {id}")))
    }

    fn container(&mut self, id: &str) -> Result<&mut cri::Container, Status> {
        let found = self.containers.iter_mut().find(|one| one.id == id);
        found.ok_or_else(|| Status::not_found(format!("no container {id}")))
    }

    fn new_id(&mut self, name: &str, kind: &str) -> String {
        self.made += 1;
        format!("{name}-{kind}-{}", self.made)
    }
}

/// Writes the RPCs that no test needs.
macro_rules! runtime_service {
    ({ $($written:tt)* } $($rpc:ident: $request:ident -> $answer:ident),* $(,)?) => {
        #[tonic::async_trait]
        impl RuntimeService for Fake {
            $($written)*
            $(async fn $rpc(&self, _: Request<cri::$request>) -> Answer<cri::$answer> {
                drop(self.enter(stringify!($rpc)).await?);
                Ok(Response::new(cri::$answer::default()))
            })*
        }
    };
}

runtime_service! {
    {
        type StreamPodSandboxesStream = BoxStream<cri::StreamPodSandboxesResponse>;
        type StreamContainersStream = BoxStream<cri::StreamContainersResponse>;
        type StreamContainerStatsStream = BoxStream<cri::StreamContainerStatsResponse>;
        type StreamPodSandboxStatsStream = BoxStream<cri::StreamPodSandboxStatsResponse>;
        type StreamPodSandboxMetricsStream = BoxStream<cri::StreamPodSandboxMetricsResponse>;
        type GetContainerEventsStream = BoxStream<cri::ContainerEventResponse>;

        async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
            drop(self.enter("version").await?);
            Ok(Response::new(cri::VersionResponse {
                runtime_name: self.name.to_owned(),
                runtime_version: "1".to_owned(),
                ..Default::default()
            }))
        }

        async fn status(&self, _: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
            Ok(Response::new(self.enter("status").await?.status.clone()))
        }

        async fn run_pod_sandbox(
            &self,
            request: Request<cri::RunPodSandboxRequest>,
        ) -> Answer<cri::RunPodSandboxResponse> {
            let mut world = self.enter("run_pod_sandbox").await?;
            let request = request.into_inner();
            let id = world.new_id(self.name, "pod");
            let config = request.config.clone().unwrap_or_default();
            world.pods.push(cri::PodSandbox {
                id: id.clone(),
                metadata: config.metadata,
                labels: config.labels,
                runtime_handler: request.runtime_handler.clone(),
                ..Default::default()
            });
            world.ran.push(request);
            Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id: id }))
        }

        async fn stop_pod_sandbox(
            &self,
            request: Request<cri::StopPodSandboxRequest>,
        ) -> Answer<cri::StopPodSandboxResponse> {
            let mut world = self.enter("stop_pod_sandbox").await?;
            if let Ok(pod) = world.pod(&request.get_ref().pod_sandbox_id) {
                pod.state = cri::PodSandboxState::SandboxNotready.into();
            }
            Ok(Response::new(cri::StopPodSandboxResponse {}))
        }

        async fn remove_pod_sandbox(
            &self,
            request: Request<cri::RemovePodSandboxRequest>,
        ) -> Answer<cri::RemovePodSandboxResponse> {
            let mut world = self.enter("remove_pod_sandbox").await?;
            let id = &request.get_ref().pod_sandbox_id;
            world.pods.retain(|pod| pod.id != *id);
            world.containers.retain(|one| one.pod_sandbox_id != *id);
            Ok(Response::new(cri::RemovePodSandboxResponse {}))
        }

        async fn pod_sandbox_status(
            &self,
            request: Request<cri::PodSandboxStatusRequest>,
        ) -> Answer<cri::PodSandboxStatusResponse> {
            let mut world = self.enter("pod_sandbox_status").await?;
            let pod = world.pod(&request.get_ref().pod_sandbox_id)?.clone();
            Ok(Response::new(cri::PodSandboxStatusResponse {
                status: Some(cri::PodSandboxStatus {
                    id: pod.id,
                    metadata: pod.metadata,
                    state: pod.state,
                    runtime_handler: pod.runtime_handler,
                    ..Default::default()
                }),
                ..Default::default()
            }))
        }

        async fn list_pod_sandbox(
            &self,
            request: Request<cri::ListPodSandboxRequest>,
        ) -> Answer<cri::ListPodSandboxResponse> {
            let world = self.enter("list_pod_sandbox").await?;
            let id = request.into_inner().filter.unwrap_or_default().id;
            let items = world.pods.iter().filter(|pod| pod.id.starts_with(&id));
            Ok(Response::new(cri::ListPodSandboxResponse { items: items.cloned().collect() }))
        }

        async fn stream_pod_sandboxes(
            &self,
            _: Request<cri::StreamPodSandboxesRequest>,
        ) -> Answer<Self::StreamPodSandboxesStream> {
            let pods = self.enter("stream_pod_sandboxes").await?.pods.clone();
            let messages = pods.into_iter().map(|pod| {
                Ok(cri::StreamPodSandboxesResponse { pod_sandboxes: vec![pod] })
            });
            Ok(Response::new(Box::pin(tokio_stream::iter(messages.collect::<Vec<_>>()))))
        }

        async fn create_container(
            &self,
            request: Request<cri::CreateContainerRequest>,
        ) -> Answer<cri::CreateContainerResponse> {
            let mut world = self.enter("create_container").await?;
            let request = request.into_inner();
            world.pod(&request.pod_sandbox_id)?;
            let config = request.config.clone().unwrap_or_default();
            if world.needs_images && world.image(config.image.clone()).is_none() {
                return Err(Status::not_found("the image is not here"));
            }
            let id = world.new_id(self.name, "container");
            world.containers.push(cri::Container {
                id: id.clone(),
                pod_sandbox_id: request.pod_sandbox_id.clone(),
                metadata: config.metadata,
                labels: config.labels,
                image: config.image,
                ..Default::default()
            });
            world.created.push(request);
            Ok(Response::new(cri::CreateContainerResponse { container_id: id }))
        }

        async fn start_container(
            &self,
            request: Request<cri::StartContainerRequest>,
        ) -> Answer<cri::StartContainerResponse> {
            let mut world = self.enter("start_container").await?;
            let container = world.container(&request.get_ref().container_id)?;
            container.state = cri::ContainerState::ContainerRunning.into();
            Ok(Response::new(cri::StartContainerResponse {}))
        }

        async fn stop_container(
            &self,
            request: Request<cri::StopContainerRequest>,
        ) -> Answer<cri::StopContainerResponse> {
            let mut world = self.enter("stop_container").await?;
            if let Ok(container) = world.container(&request.get_ref().container_id) {
                container.state = cri::ContainerState::ContainerExited.into();
            }
            Ok(Response::new(cri::StopContainerResponse {}))
        }

        async fn remove_container(
            &self,
            request: Request<cri::RemoveContainerRequest>,
        ) -> Answer<cri::RemoveContainerResponse> {
            let mut world = self.enter("remove_container").await?;
            let id = &request.get_ref().container_id;
            world.containers.retain(|one| one.id != *id);
            Ok(Response::new(cri::RemoveContainerResponse {}))
        }

        async fn list_containers(
            &self,
            _: Request<cri::ListContainersRequest>,
        ) -> Answer<cri::ListContainersResponse> {
            let containers = self.enter("list_containers").await?.containers.clone();
            Ok(Response::new(cri::ListContainersResponse { containers }))
        }

        async fn stream_containers(
            &self,
            _: Request<cri::StreamContainersRequest>,
        ) -> Answer<Self::StreamContainersStream> {
            let containers = self.enter("stream_containers").await?.containers.clone();
            let message = cri::StreamContainersResponse { containers };
            Ok(Response::new(Box::pin(tokio_stream::once(Ok(message)))))
        }

        async fn container_status(
            &self,
            request: Request<cri::ContainerStatusRequest>,
        ) -> Answer<cri::ContainerStatusResponse> {
            let mut world = self.enter("container_status").await?;
            let container = world.container(&request.get_ref().container_id)?.clone();
            Ok(Response::new(cri::ContainerStatusResponse {
                status: Some(cri::ContainerStatus {
                    id: container.id,
                    metadata: container.metadata,
                    state: container.state,
                    ..Default::default()
                }),
                ..Default::default()
            }))
        }

        async fn exec_sync(
            &self,
            request: Request<cri::ExecSyncRequest>,
        ) -> Answer<cri::ExecSyncResponse> {
            self.enter("exec_sync").await?.container(&request.get_ref().container_id)?;
            Ok(Response::new(cri::ExecSyncResponse {
                stdout: self.name.into(),
                ..Default::default()
            }))
        }

        async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
            self.enter("exec").await?.container(&request.get_ref().container_id)?;
            let url = format!("http://{}/exec", self.name);
            Ok(Response::new(cri::ExecResponse { url }))
        }

        async fn list_container_stats(
            &self,
            _: Request<cri::ListContainerStatsRequest>,
        ) -> Answer<cri::ListContainerStatsResponse> {
            let stats = self.enter("list_container_stats").await?.container_stats.clone();
            Ok(Response::new(cri::ListContainerStatsResponse { stats }))
        }

        async fn stream_container_stats(
            &self,
            _: Request<cri::StreamContainerStatsRequest>,
        ) -> Answer<Self::StreamContainerStatsStream> {
            let container_stats = self.enter("stream_container_stats").await?.container_stats.clone();
            let message = cri::StreamContainerStatsResponse { container_stats };
            Ok(Response::new(Box::pin(tokio_stream::once(Ok(message)))))
        }

        async fn list_pod_sandbox_stats(
            &self,
            _: Request<cri::ListPodSandboxStatsRequest>,
        ) -> Answer<cri::ListPodSandboxStatsResponse> {
            let stats = self.enter("list_pod_sandbox_stats").await?.pod_stats.clone();
            Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
        }

        async fn stream_pod_sandbox_stats(
            &self,
            _: Request<cri::StreamPodSandboxStatsRequest>,
        ) -> Answer<Self::StreamPodSandboxStatsStream> {
            let pod_sandbox_stats = self.enter("stream_pod_sandbox_stats").await?.pod_stats.clone();
            let message = cri::StreamPodSandboxStatsResponse { pod_sandbox_stats };
            Ok(Response::new(Box::pin(tokio_stream::once(Ok(message)))))
        }

        async fn get_container_events(
            &self,
            _: Request<cri::GetEventsRequest>,
        ) -> Answer<Self::GetContainerEventsStream> {
            drop(self.enter("get_container_events").await?);
            let events = tokio_stream::wrappers::BroadcastStream::new(self.events.subscribe());
            let events = events.map(|event| event.map_err(|e| Status::data_loss(e.to_string())));
            Ok(Response::new(Box::pin(events)))
        }

        async fn list_metric_descriptors(
            &self,
            _: Request<cri::ListMetricDescriptorsRequest>,
        ) -> Answer<cri::ListMetricDescriptorsResponse> {
            let descriptors = self.enter("list_metric_descriptors").await?.descriptors.clone();
            Ok(Response::new(cri::ListMetricDescriptorsResponse { descriptors }))
        }

        async fn list_pod_sandbox_metrics(
            &self,
            _: Request<cri::ListPodSandboxMetricsRequest>,
        ) -> Answer<cri::ListPodSandboxMetricsResponse> {
            let pod_metrics = self.enter("list_pod_sandbox_metrics").await?.metrics.clone();
            Ok(Response::new(cri::ListPodSandboxMetricsResponse { pod_metrics }))
        }

        async fn stream_pod_sandbox_metrics(
            &self,
            _: Request<cri::StreamPodSandboxMetricsRequest>,
        ) -> Answer<Self::StreamPodSandboxMetricsStream> {
            let pod_sandbox_metrics = self.enter("stream_pod_sandbox_metrics").await?.metrics.clone();
            let message = cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics };
            Ok(Response::new(Box::pin(tokio_stream::once(Ok(message)))))
        }
    }
    update_container_resources: UpdateContainerResourcesRequest -> UpdateContainerResourcesResponse,
    reopen_container_log: ReopenContainerLogRequest -> ReopenContainerLogResponse,
    attach: AttachRequest -> AttachResponse,
    port_forward: PortForwardRequest -> PortForwardResponse,
    container_stats: ContainerStatsRequest -> ContainerStatsResponse,
    pod_sandbox_stats: PodSandboxStatsRequest -> PodSandboxStatsResponse,
    update_runtime_config: UpdateRuntimeConfigRequest -> UpdateRuntimeConfigResponse,
    checkpoint_container: CheckpointContainerRequest -> CheckpointContainerResponse,
    checkpoint_pod: CheckpointPodRequest -> CheckpointPodResponse,
    restore_pod: RestorePodRequest -> RestorePodResponse,
    runtime_config: RuntimeConfigRequest -> RuntimeConfigResponse,
    update_pod_sandbox_resources: UpdatePodSandboxResourcesRequest -> UpdatePodSandboxResourcesResponse,
}
