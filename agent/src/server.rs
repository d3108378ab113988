// SPDX-License-Identifier: Apache-2.0
//! The agent's side of the vsock: control calls, byte streams, and the connection that shows that the guest lives.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent::agent_server::AgentServer;
use bulkhead_proto::agent::{
    CONTROL_PORT, LogStream, MirrorStream, OpenStream, PortForwardStream, READY_PORT, Ready,
    STREAM_PORT, StreamOpened, open_stream,
};
use bulkhead_text::chain;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;

use crate::container::Containers;
use crate::hotplug::Hotplug;
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::service::Service;
use crate::streams::{forward, log, messages};
use crate::users::PodUsers;
use crate::volumes::{Volumes, mirror_stream};

const HOST_CID: u32 = 2;
const MAX_CALLS: usize = 128;
const MAX_REQUEST_BYTES: usize = 8 << 20;
/// Two output streams of the largest size, and some space for the message around them.
const MAX_ANSWER_BYTES: usize = 40 << 20;
const MAX_STREAMS: usize = 2048;
/// The header contains a command's arguments.
const MAX_HEADER_BYTES: usize = 1 << 20;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves the host. Returns only if the control server, the reaper or the listener for streams ends.
pub async fn serve() -> io::Result<()> {
    let control = listen(CONTROL_PORT)?;
    let streams = listen(STREAM_PORT)?;
    let reaper = Reaper::default();
    let users = PodUsers::default();
    let volumes = Volumes::new(users.clone());
    let containers = Containers::new(reaper.clone(), volumes.clone(), users.clone());
    let service = Service {
        volumes,
        sandbox: Arc::new(Sandbox::new(users)),
        hotplug: Hotplug::default(),
        containers: containers.clone(),
    };
    let server = AgentServer::new(service)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let calls = Server::builder()
        .concurrency_limit_per_connection(MAX_CALLS)
        .add_service(server)
        .serve_with_incoming(
            control
                .incoming()
                .filter(|stream| stream.as_ref().map_or(true, is_from_host)),
        );
    let ready = report_ready().await?;
    tokio::select! {
        result = calls => result.map_err(io::Error::other),
        result = reaper.run() => result,
        () = serve_streams(streams, containers) => Ok(()),
        result = until_closed(ready) => result,
    }
}

fn listen(port: u32) -> io::Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
}

/// Whether the host has connected. Processes of the guest must not use these ports.
fn is_from_host(stream: &VsockStream) -> bool {
    stream.peer_addr().is_ok_and(|peer| peer.cid() == HOST_CID)
}

async fn report_ready() -> io::Result<VsockStream> {
    let mut stream = VsockStream::connect(VsockAddr::new(HOST_CID, READY_PORT)).await?;
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let ready = Ready {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: release,
    };
    messages::write(&mut stream, &ready).await?;
    Ok(stream)
}

/// Never returns. Reads from the ready connection, on which the host does not write, until its end. Then waits for
/// ever: the daemon may only have restarted, and the pod goes on. Or this VM is a template, whose ready connection the
/// host closes before it makes copies of the VM.
async fn until_closed(mut ready: VsockStream) -> io::Result<()> {
    let mut ignored = [0; 64];
    while matches!(ready.read(&mut ignored).await, Ok(length) if length > 0) {}
    // A connection that only one side has closed would be in the kernel of every copy.
    drop(ready);
    std::future::pending().await
}

async fn serve_streams(listener: VsockListener, containers: Containers) {
    let slots = Arc::new(Semaphore::new(MAX_STREAMS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Probably out of file descriptors or memory, which may pass.
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            continue;
        };
        if is_from_host(&stream) {
            let containers = containers.clone();
            tokio::spawn(async move {
                // An error means that the host has closed the stream. That is no reason for a message.
                let _ = serve_stream(stream, &containers).await;
                drop(slot);
            });
        }
    }
}

/// Reads what the host wants on a new stream and serves that. A refusal is a message with the reason.
async fn serve_stream(mut stream: VsockStream, containers: &Containers) -> io::Result<()> {
    let open = timeout(
        HEADER_TIMEOUT,
        messages::read::<OpenStream>(&mut stream, MAX_HEADER_BYTES),
    )
    .await??;
    match open.kind {
        Some(open_stream::Kind::Log(LogStream { container_id })) => {
            let container = match containers.get(&container_id) {
                Ok(container) => container,
                Err(e) => return refuse(&mut stream, e.to_string()).await,
            };
            log::replace_reader(&container.log);
            let start = container.log.start();
            messages::write(
                &mut stream,
                &StreamOpened {
                    error: String::new(),
                    log_offset: start,
                },
            )
            .await?;
            let (reader, writer) = stream.into_split();
            log::serve(&container.log, start, reader, writer).await
        }
        Some(open_stream::Kind::Exec(request)) => {
            let exec = match containers.exec_stream(request).await {
                Ok(exec) => exec,
                Err(e) => return refuse(&mut stream, chain(&e)).await,
            };
            messages::write(&mut stream, &StreamOpened::default()).await?;
            let (reader, writer) = stream.into_split();
            exec.serve(reader, writer).await
        }
        Some(open_stream::Kind::Attach(request)) => {
            let attachment = match containers.attach(&request) {
                Ok(attachment) => attachment,
                Err(e) => return refuse(&mut stream, chain(&e)).await,
            };
            messages::write(&mut stream, &StreamOpened::default()).await?;
            let (reader, writer) = stream.into_split();
            attachment.serve(reader, writer).await
        }
        Some(open_stream::Kind::PortForward(PortForwardStream { port })) => {
            let server = match forward::connect(port).await {
                Ok(server) => server,
                Err(e) => return refuse(&mut stream, e).await,
            };
            messages::write(&mut stream, &StreamOpened::default()).await?;
            forward::serve(stream, server).await
        }
        Some(open_stream::Kind::Mirror(MirrorStream { volume })) => {
            let mirror = match containers.volumes().mirror(&volume) {
                Ok(mirror) => mirror,
                Err(e) => return refuse(&mut stream, e.to_string()).await,
            };
            messages::write(&mut stream, &StreamOpened::default()).await?;
            mirror_stream::serve(mirror, stream).await
        }
        None => refuse(&mut stream, "unknown kind of stream".to_owned()).await,
    }
}

async fn refuse(stream: &mut VsockStream, error: String) -> io::Result<()> {
    messages::write(
        stream,
        &StreamOpened {
            error,
            log_offset: 0,
        },
    )
    .await?;
    stream.shutdown().await
}
