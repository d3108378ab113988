// SPDX-License-Identifier: Apache-2.0
//! The agent's calls. Each is answered as if it had been done, but for what was ordered.

use std::pin::Pin;
use std::sync::Arc;

use bulkhead_proto::agent as proto;
use bulkhead_proto::agent::agent_server::Agent;
use bulkhead_proto::agent::container_status::State;
use bulkhead_proto::agent::watch_event::Event;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::containers::Container;
use crate::lies::News;
use crate::lock;
use crate::orders::Orders;
use crate::sys;

/// The exit code of a container that was killed.
const KILLED: i32 = 137;
/// The most bytes of output that the daemon takes from an exec, for each of two streams.
const OUTPUT_BYTES: usize = 16 << 20;

#[derive(Debug)]
pub struct Service {
    orders: Arc<Orders>,
}

impl Service {
    pub fn new(orders: Arc<Orders>) -> Self {
        Self { orders }
    }

    fn change(&self, id: &str, state: State) {
        self.orders.containers.change(id, state);
        self.orders.tell();
    }
}

/// Ends the VM. Does not return.
pub fn power_off() -> ! {
    sys::power_off();
    loop {
        std::thread::park();
    }
}

fn status(id: &str, container: &Container) -> proto::ContainerStatus {
    let mut status = proto::ContainerStatus {
        id: id.to_owned(),
        pid: 7,
        exit_code: KILLED,
        ..Default::default()
    };
    status.set_state(container.state);
    status
}

/// Sends what is true, then what is ordered, as fast as the daemon takes it.
async fn watch(orders: Arc<Orders>, sender: mpsc::Sender<Result<proto::WatchEvent, Status>>) {
    let mut news = orders.news.subscribe();
    let mut number = 0;
    loop {
        let lie: News = *news.borrow_and_update();
        let known = orders.containers.all();
        let known = known
            .iter()
            .map(|(id, one)| Event::Container(status(id, one)));
        for event in known.chain([Event::CaughtUp(true)]) {
            let event = Some(event);
            if sender.send(Ok(proto::WatchEvent { event })).await.is_err() {
                return;
            }
        }
        while matches!(news.has_changed(), Ok(false))
            && let Some(piece) = lie.piece(&orders.containers, number)
        {
            number += 1;
            if sender.send(Ok(piece)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            _ = news.changed() => {}
            () = sender.closed() => return,
        }
    }
}

/// The answer to an exec whose answer itself was ordered. `None` if there is no such order.
fn answer(kind: &str) -> Option<proto::ExecSyncResponse> {
    let mut answer = proto::ExecSyncResponse::default();
    match kind {
        "full" => {
            answer.stdout = vec![b'o'; OUTPUT_BYTES].into();
            answer.stderr = vec![b'e'; OUTPUT_BYTES].into();
        }
        "too-long" => answer.stdout = vec![b'o'; 3 * OUTPUT_BYTES].into(),
        "code" => answer.exit_code = i32::MIN,
        _ => return None,
    }
    Some(answer)
}

type Done<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Agent for Service {
    async fn configure_sandbox(
        &self,
        _request: Request<proto::ConfigureSandboxRequest>,
    ) -> Done<proto::ConfigureSandboxResponse> {
        Ok(Response::new(proto::ConfigureSandboxResponse {}))
    }

    async fn set_clock(
        &self,
        _request: Request<proto::SetClockRequest>,
    ) -> Done<proto::SetClockResponse> {
        Ok(Response::new(proto::SetClockResponse {}))
    }

    async fn read_clock(
        &self,
        _request: Request<proto::ReadClockRequest>,
    ) -> Done<proto::ReadClockResponse> {
        // As far from the host's clock as can be said.
        Ok(Response::new(proto::ReadClockResponse {
            clock_unix_nanoseconds: i64::MIN,
        }))
    }

    async fn adjust_clock(
        &self,
        _request: Request<proto::AdjustClockRequest>,
    ) -> Done<proto::AdjustClockResponse> {
        Ok(Response::new(proto::AdjustClockResponse {}))
    }

    async fn heartbeat(
        &self,
        _request: Request<proto::HeartbeatRequest>,
    ) -> Done<proto::HeartbeatResponse> {
        Ok(Response::new(proto::HeartbeatResponse {}))
    }

    async fn ensure_volume(
        &self,
        _request: Request<proto::EnsureVolumeRequest>,
    ) -> Done<proto::EnsureVolumeResponse> {
        Ok(Response::new(proto::EnsureVolumeResponse {}))
    }

    async fn remove_volume(
        &self,
        _request: Request<proto::RemoveVolumeRequest>,
    ) -> Done<proto::RemoveVolumeResponse> {
        Ok(Response::new(proto::RemoveVolumeResponse {}))
    }

    async fn read_volume(
        &self,
        request: Request<proto::ReadVolumeRequest>,
    ) -> Done<proto::ReadVolumeResponse> {
        let limit = usize::try_from(request.into_inner().limit_bytes).unwrap_or(0);
        let content = vec![b'x'; limit + 1].into();
        Ok(Response::new(proto::ReadVolumeResponse { content }))
    }

    async fn read_environment_files(
        &self,
        _request: Request<proto::ReadEnvironmentFilesRequest>,
    ) -> Done<proto::ReadEnvironmentFilesResponse> {
        let file = proto::EnvironmentFile::default();
        let files = vec![file; 300_000];
        Ok(Response::new(proto::ReadEnvironmentFilesResponse { files }))
    }

    async fn create_container(
        &self,
        request: Request<proto::CreateContainerRequest>,
    ) -> Done<proto::CreateContainerResponse> {
        let request = request.into_inner();
        let container = Container {
            args: request.process.unwrap_or_default().args,
            state: State::Created,
        };
        self.orders.containers.add(request.id, container);
        self.orders.tell();
        Ok(Response::new(proto::CreateContainerResponse {}))
    }

    async fn start_container(
        &self,
        request: Request<proto::StartContainerRequest>,
    ) -> Done<proto::StartContainerResponse> {
        let id = request.into_inner().id;
        self.change(&id, State::Running);
        let container = self.orders.containers.get(&id);
        let container = container.ok_or_else(|| Status::not_found(id.clone()))?;
        Ok(Response::new(proto::StartContainerResponse {
            status: Some(status(&id, &container)),
            ..Default::default()
        }))
    }

    async fn signal_container(
        &self,
        request: Request<proto::SignalContainerRequest>,
    ) -> Done<proto::SignalContainerResponse> {
        self.change(&request.into_inner().id, State::Exited);
        Ok(Response::new(proto::SignalContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<proto::RemoveContainerRequest>,
    ) -> Done<proto::RemoveContainerResponse> {
        self.orders.containers.remove(&request.into_inner().id);
        Ok(Response::new(proto::RemoveContainerResponse {}))
    }

    async fn update_container_resources(
        &self,
        _request: Request<proto::UpdateContainerResourcesRequest>,
    ) -> Done<proto::UpdateContainerResourcesResponse> {
        Ok(Response::new(proto::UpdateContainerResourcesResponse {}))
    }

    async fn update_sandbox_resources(
        &self,
        _request: Request<proto::UpdateSandboxResourcesRequest>,
    ) -> Done<proto::UpdateSandboxResourcesResponse> {
        Ok(Response::new(proto::UpdateSandboxResourcesResponse {}))
    }

    async fn size_sandbox(
        &self,
        _request: Request<proto::SizeSandboxRequest>,
    ) -> Done<proto::SizeSandboxResponse> {
        Ok(Response::new(proto::SizeSandboxResponse {
            memory_bytes: u64::MAX,
            cpus: u32::MAX,
        }))
    }

    async fn statistics(
        &self,
        _request: Request<proto::StatisticsRequest>,
    ) -> Done<proto::StatisticsResponse> {
        let figures = *lock(&self.orders.figures);
        Ok(Response::new(figures.answer(&self.orders.containers)))
    }

    type WatchStream = Pin<
        Box<dyn tokio_stream::Stream<Item = Result<proto::WatchEvent, Status>> + Send + 'static>,
    >;

    async fn watch(&self, _request: Request<proto::WatchRequest>) -> Done<Self::WatchStream> {
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(watch(Arc::clone(&self.orders), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn exec_sync(
        &self,
        request: Request<proto::ExecSyncRequest>,
    ) -> Done<proto::ExecSyncResponse> {
        let args = request.into_inner().args;
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        if let ["exec", kind] = words[..] {
            let answer = answer(kind);
            return answer.map(Response::new).ok_or_else(|| unknown(&words));
        }
        self.orders.give(&words).ok_or_else(|| unknown(&words))?;
        Ok(Response::new(proto::ExecSyncResponse::default()))
    }

    async fn freeze_containers(
        &self,
        _request: Request<proto::FreezeContainersRequest>,
    ) -> Done<proto::FreezeContainersResponse> {
        Ok(Response::new(proto::FreezeContainersResponse {}))
    }

    async fn thaw_containers(
        &self,
        _request: Request<proto::ThawContainersRequest>,
    ) -> Done<proto::ThawContainersResponse> {
        Ok(Response::new(proto::ThawContainersResponse {}))
    }

    async fn restore_sandbox(
        &self,
        _request: Request<proto::RestoreSandboxRequest>,
    ) -> Done<proto::RestoreSandboxResponse> {
        Ok(Response::new(proto::RestoreSandboxResponse {}))
    }

    async fn shutdown(
        &self,
        _request: Request<proto::ShutdownRequest>,
    ) -> Done<proto::ShutdownResponse> {
        // It goes on: a guest need not obey.
        Ok(Response::new(proto::ShutdownResponse {}))
    }
}

fn unknown(words: &[&str]) -> Status {
    Status::invalid_argument(format!("no such order: {words:?}"))
}
