// SPDX-License-Identifier: Apache-2.0
//! Connects streaming clients with a pod's processes and ports.

use bulkhead_guest::protocol::{AttachStream, ExecStream};
use bulkhead_guest::streams::{self, ProcessStreams};
use bulkhead_host::Guest;

use super::Pods;
use super::errors::PodError;
use super::life::record::ContainerRecord;

impl Pods {
    /// A running container and its guest, found by the container's id or a unique prefix of it. The error for a
    /// container that does not run names `event`.
    pub fn running(
        &self,
        id: &str,
        event: &'static str,
    ) -> Result<(ContainerRecord, Guest), PodError> {
        let (view, record) = self.container(id)?;
        match &view.guest {
            Some(guest) if record.state.is_running() => Ok((record, guest.clone())),
            _ => Err(PodError::container_is(&record, event)),
        }
    }

    /// The id and guest of a ready pod, found by its id or a unique prefix of it.
    pub fn ready(&self, id: &str, event: &'static str) -> Result<(String, Guest), PodError> {
        let view = self.pod(id)?;
        Ok((view.pod.id.clone(), view.ready_guest(event)?))
    }

    /// Starts a command in the container that `request` names.
    pub async fn exec_stream(&self, mut request: ExecStream) -> Result<ProcessStreams, PodError> {
        let (record, guest) = self.running(&request.container_id, "exec")?;
        request.container_id.clone_from(&record.id);
        let opened = ProcessStreams::exec(&guest.files.vsock(), request).await;
        opened.map_err(|source| PodError::Stream {
            id: record.id,
            source,
        })
    }

    /// Attaches to a container's standard streams.
    pub async fn attach_stream(
        &self,
        mut request: AttachStream,
    ) -> Result<ProcessStreams, PodError> {
        let (record, guest) = self.running(&request.container_id, "attach")?;
        request.container_id.clone_from(&record.id);
        request.stdin_once = record.spec.stdin_once;
        let opened = ProcessStreams::attach(&guest.files.vsock(), request).await;
        opened.map_err(|source| PodError::Stream {
            id: record.id,
            source,
        })
    }

    /// Connects to a port on the loopback interface of a pod.
    pub async fn port_forward(
        &self,
        pod: &str,
        port: u16,
    ) -> Result<tokio::net::UnixStream, PodError> {
        let (id, guest) = self.ready(pod, "port forwarding")?;
        let connected = streams::port_forward(&guest.files.vsock(), port).await;
        connected.map_err(|source| PodError::Stream { id, source })
    }
}
