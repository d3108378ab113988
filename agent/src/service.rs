// SPDX-License-Identifier: Apache-2.0
//! The agent's gRPC service: each handler parses the request, calls the operation and answers. [`codes`] maps errors to
//! gRPC codes. [`mod@watch`] reports changes to the daemon.

mod checkpoint;
mod codes;
mod watch;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent as proto;
use bulkhead_proto::agent::agent_server::Agent;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::clock;
use crate::container::{Containers, ExecRequest};
use crate::disk::scratch;
use crate::hotplug::Hotplug;
use crate::power;
use crate::sandbox::{self, Sandbox};
use crate::volumes::Volumes;
use watch::watch;

const WATCH_QUEUE: usize = 16;
const KILL_BEFORE_SHUTDOWN: Duration = Duration::from_millis(20);

#[derive(Clone, Debug)]
pub struct Service {
    pub sandbox: Arc<Sandbox>,
    pub hotplug: Hotplug,
    pub containers: Containers,
    pub volumes: Volumes,
}

/// Runs an operation to its end, even if the daemon closes the connection, so that nothing stays half done.
async fn complete<T: Send + 'static, E: Into<Status> + Send + 'static>(
    operation: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(operation)
        .await
        .map_err(|e| Status::internal(e.to_string()))?
        .map_err(Into::into)
}

/// The same for an operation that blocks.
async fn blocking<T: Send + 'static, E: Into<Status> + Send + 'static>(
    operation: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(operation)
        .await
        .map_err(|e| Status::internal(e.to_string()))?
        .map_err(Into::into)
}

#[tonic::async_trait]
impl Agent for Service {
    async fn configure_sandbox(
        &self,
        request: Request<proto::ConfigureSandboxRequest>,
    ) -> Result<Response<proto::ConfigureSandboxResponse>, Status> {
        let sandbox = Arc::clone(&self.sandbox);
        complete(async move { sandbox.configure(request.into_inner()).await }).await?;
        Ok(Response::new(proto::ConfigureSandboxResponse {}))
    }

    async fn set_clock(
        &self,
        request: Request<proto::SetClockRequest>,
    ) -> Result<Response<proto::SetClockResponse>, Status> {
        clock::set(request.into_inner().clock_unix_nanoseconds)?;
        Ok(Response::new(proto::SetClockResponse {}))
    }

    async fn read_clock(
        &self,
        _request: Request<proto::ReadClockRequest>,
    ) -> Result<Response<proto::ReadClockResponse>, Status> {
        Ok(Response::new(proto::ReadClockResponse {
            clock_unix_nanoseconds: clock::now(),
        }))
    }

    async fn adjust_clock(
        &self,
        request: Request<proto::AdjustClockRequest>,
    ) -> Result<Response<proto::AdjustClockResponse>, Status> {
        let request = request.into_inner();
        if request.step {
            clock::step(request.add_nanoseconds)?;
        } else {
            clock::correct(request.add_nanoseconds, request.interval_seconds)?;
        }
        Ok(Response::new(proto::AdjustClockResponse {}))
    }

    async fn heartbeat(
        &self,
        _request: Request<proto::HeartbeatRequest>,
    ) -> Result<Response<proto::HeartbeatResponse>, Status> {
        Ok(Response::new(proto::HeartbeatResponse {}))
    }

    async fn ensure_volume(
        &self,
        request: Request<proto::EnsureVolumeRequest>,
    ) -> Result<Response<proto::EnsureVolumeResponse>, Status> {
        if !self.sandbox.is_configured().await {
            return Err(Status::failed_precondition("the sandbox is not configured"));
        }
        let volumes = self.volumes.clone();
        blocking(move || volumes.ensure(request.into_inner().volume)).await?;
        Ok(Response::new(proto::EnsureVolumeResponse {}))
    }

    async fn remove_volume(
        &self,
        request: Request<proto::RemoveVolumeRequest>,
    ) -> Result<Response<proto::RemoveVolumeResponse>, Status> {
        let volumes = self.volumes.clone();
        blocking(move || volumes.remove(&request.into_inner().name)).await?;
        Ok(Response::new(proto::RemoveVolumeResponse {}))
    }

    async fn read_volume(
        &self,
        request: Request<proto::ReadVolumeRequest>,
    ) -> Result<Response<proto::ReadVolumeResponse>, Status> {
        let volumes = self.volumes.clone();
        let request = request.into_inner();
        let content =
            blocking(move || volumes.read_end(&request.name, request.limit_bytes)).await?;
        Ok(Response::new(proto::ReadVolumeResponse {
            content: content.into(),
        }))
    }

    async fn read_environment_files(
        &self,
        request: Request<proto::ReadEnvironmentFilesRequest>,
    ) -> Result<Response<proto::ReadEnvironmentFilesResponse>, Status> {
        let volumes = self.volumes.clone();
        let volume = request.into_inner().volume;
        let files = blocking(move || volumes.environment_files(&volume)).await?;
        Ok(Response::new(proto::ReadEnvironmentFilesResponse { files }))
    }

    async fn create_container(
        &self,
        request: Request<proto::CreateContainerRequest>,
    ) -> Result<Response<proto::CreateContainerResponse>, Status> {
        if !self.sandbox.is_configured().await {
            return Err(Status::failed_precondition("the sandbox is not configured"));
        }
        let containers = self.containers.clone();
        complete(async move { containers.create(request.into_inner()).await }).await?;
        Ok(Response::new(proto::CreateContainerResponse {}))
    }

    async fn start_container(
        &self,
        request: Request<proto::StartContainerRequest>,
    ) -> Result<Response<proto::StartContainerResponse>, Status> {
        let containers = self.containers.clone();
        let started = async move { containers.start(&request.into_inner().id).await };
        let (container, state) = complete(started).await?;
        Ok(Response::new(proto::StartContainerResponse {
            status: Some(watch::status(&container, &state)),
            ..Default::default()
        }))
    }

    async fn signal_container(
        &self,
        request: Request<proto::SignalContainerRequest>,
    ) -> Result<Response<proto::SignalContainerResponse>, Status> {
        let request = request.into_inner();
        self.containers
            .signal(&request.id, request.signal, request.all)?;
        Ok(Response::new(proto::SignalContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<proto::RemoveContainerRequest>,
    ) -> Result<Response<proto::RemoveContainerResponse>, Status> {
        let containers = self.containers.clone();
        complete(async move { containers.remove(&request.into_inner().id).await }).await?;
        Ok(Response::new(proto::RemoveContainerResponse {}))
    }

    async fn update_container_resources(
        &self,
        request: Request<proto::UpdateContainerResourcesRequest>,
    ) -> Result<Response<proto::UpdateContainerResourcesResponse>, Status> {
        let request = request.into_inner();
        let containers = self.containers.clone();
        blocking(move || {
            let resources = request.resources.unwrap_or_default();
            containers.update(&request.id, &resources, request.oom_score_adj)
        })
        .await?;
        Ok(Response::new(proto::UpdateContainerResourcesResponse {}))
    }

    async fn update_sandbox_resources(
        &self,
        request: Request<proto::UpdateSandboxResourcesRequest>,
    ) -> Result<Response<proto::UpdateSandboxResourcesResponse>, Status> {
        let resources = request.into_inner().resources.unwrap_or_default();
        blocking(move || sandbox::limit(&resources)).await?;
        Ok(Response::new(proto::UpdateSandboxResourcesResponse {}))
    }

    async fn size_sandbox(
        &self,
        request: Request<proto::SizeSandboxRequest>,
    ) -> Result<Response<proto::SizeSandboxResponse>, Status> {
        let hotplug = self.hotplug.clone();
        let answer = blocking(move || hotplug.size(&request.into_inner())).await?;
        Ok(Response::new(answer))
    }

    async fn statistics(
        &self,
        request: Request<proto::StatisticsRequest>,
    ) -> Result<Response<proto::StatisticsResponse>, Status> {
        let containers = self.containers.clone();
        let request = request.into_inner();
        let answer = blocking(move || Ok::<_, Status>(containers.statistics(&request))).await?;
        Ok(Response::new(answer))
    }

    type WatchStream = Pin<
        Box<dyn tokio_stream::Stream<Item = Result<proto::WatchEvent, Status>> + Send + 'static>,
    >;

    async fn watch(
        &self,
        _request: Request<proto::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(watch(self.containers.clone(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn exec_sync(
        &self,
        request: Request<proto::ExecSyncRequest>,
    ) -> Result<Response<proto::ExecSyncResponse>, Status> {
        let request = request.into_inner();
        let timeout = u64::try_from(request.timeout_milliseconds)
            .ok()
            .filter(|timeout| *timeout > 0);
        let exec = ExecRequest {
            args: request.args,
            timeout: timeout.map(Duration::from_millis),
            output_limit_bytes: request.output_limit_bytes,
        };
        let outcome = self.containers.exec(&request.id, exec).await?;
        Ok(Response::new(proto::ExecSyncResponse {
            stdout: outcome.stdout.into(),
            stderr: outcome.stderr.into(),
            exit_code: outcome.exit_code,
            timed_out: outcome.timed_out,
            truncated: outcome.truncated,
        }))
    }

    async fn freeze_containers(
        &self,
        request: Request<proto::FreezeContainersRequest>,
    ) -> Result<Response<proto::FreezeContainersResponse>, Status> {
        if !self.sandbox.is_configured().await {
            return Err(Status::failed_precondition("the sandbox is not configured"));
        }
        let containers = self.containers.clone();
        let request = request.into_inner();
        let lease = Duration::from_millis(request.lease_milliseconds);
        complete(async move { containers.freeze(&request.ids, lease).await }).await?;
        Ok(Response::new(proto::FreezeContainersResponse {}))
    }

    async fn thaw_containers(
        &self,
        _request: Request<proto::ThawContainersRequest>,
    ) -> Result<Response<proto::ThawContainersResponse>, Status> {
        let containers = self.containers.clone();
        complete(async move { containers.thaw().await }).await?;
        Ok(Response::new(proto::ThawContainersResponse {}))
    }

    async fn restore_sandbox(
        &self,
        request: Request<proto::RestoreSandboxRequest>,
    ) -> Result<Response<proto::RestoreSandboxResponse>, Status> {
        let (sandbox, containers) = (Arc::clone(&self.sandbox), self.containers.clone());
        let request = request.into_inner();
        complete(async move { checkpoint::restore(&sandbox, &containers, request).await }).await?;
        Ok(Response::new(proto::RestoreSandboxResponse {}))
    }

    async fn shutdown(
        &self,
        _request: Request<proto::ShutdownRequest>,
    ) -> Result<Response<proto::ShutdownResponse>, Status> {
        self.containers.kill_all();
        tokio::time::sleep(KILL_BEFORE_SHUTDOWN).await;
        self.volumes.release();
        scratch::release_scratch();
        power::off()
    }
}
