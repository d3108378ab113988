// SPDX-License-Identifier: Apache-2.0
//! An agent for tests that attacks its daemon. It takes the place of `bulkhead-agent` in a guest.
//!
//! It boots as the real one does and answers every call as if all went well, but it runs no containers. What it does
//! beyond that, a test orders by the words of commands:
//!
//! - `ExecSync` with [`orders`]: what comes as news, as statistics, as bytes on the control port; what a root user of the
//!   guest does to the devices ([`devices`]).
//! - The command of a container says what its log is, the command of a streaming exec what its stream is, the port of
//!   a port-forward what its connection is ([`streams`]).
//!
//! The messages of calls are in [`service`], news and statistics that lie in [`lies`], HTTP/2 that no honest server
//! speaks in [`wire`].

mod containers;
mod devices;
mod lies;
mod orders;
mod service;
mod streams;
#[allow(unsafe_code)]
mod sys;
mod wire;

use std::fs;
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_proto::agent::agent_server::AgentServer;
use bulkhead_proto::agent::{CONTROL_PORT, READY_PORT, Ready, STREAM_PORT};
use rustix::mount::MountFlags;
use tokio::runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;

use orders::Orders;
use service::Service;

pub const HOST_CID: u32 = 2;
/// Enough for an answer to an exec with all the output that it may have.
const MAX_ANSWER_BYTES: usize = 80 << 20;

/// How long the answer to an order may take.
const ANSWER: Duration = Duration::from_millis(200);

fn main() {
    let run = || -> io::Result<()> {
        prepare()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        runtime?.block_on(serve())
    };
    let ended = run();
    eprintln!("hostile agent: {ended:?}");
    service::power_off();
}

fn prepare() -> io::Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target)?;
        rustix::mount::mount(kind, target, kind, MountFlags::empty(), None)?;
    }
    sys::raise_open_files(60_000)
}

async fn serve() -> io::Result<()> {
    let orders = Arc::new(Orders::default());
    let control = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, CONTROL_PORT))?;
    let streams = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))?;
    let (honest, connections) = mpsc::channel(16);
    let calls = Server::builder()
        .add_service(
            AgentServer::new(Service::new(Arc::clone(&orders)))
                .max_encoding_message_size(MAX_ANSWER_BYTES),
        )
        .serve_with_incoming(ReceiverStream::new(connections));
    let ready = VsockStream::connect(VsockAddr::new(HOST_CID, READY_PORT));
    let mut ready = ready.await?;
    let words = Ready {
        agent_version: "hostile\x1b[2J".to_owned(),
        kernel_release: "\x1b[2J".repeat(50),
    };
    streams::write_message(&mut ready, &words).await?;
    let flooding = Arc::clone(&orders);
    tokio::spawn(async move {
        flooding.ready.notified().await;
        streams::flood(ready).await;
    });
    tokio::spawn(streams::serve(streams, Arc::clone(&orders)));
    tokio::select! {
        result = calls => result.map_err(io::Error::other),
        result = accept(control, honest, orders) => result,
    }
}

/// Takes connections to the control port: for the honest server, or for [`wire`] as long as that is ordered.
async fn accept(
    listener: VsockListener,
    honest: mpsc::Sender<io::Result<VsockStream>>,
    orders: Arc<Orders>,
) -> io::Result<()> {
    let last = Arc::new(Mutex::new(None));
    let ending = Arc::clone(&last);
    let ordered = Arc::clone(&orders);
    // What the honest server has ends when something else is ordered, so that the daemon connects anew.
    tokio::spawn(async move {
        loop {
            ordered.control_changed.notified().await;
            // The order itself is still to be answered.
            tokio::time::sleep(ANSWER).await;
            let open: Option<VsockStream> = lock(&ending).take();
            if let Some(open) = open {
                let _ = open.shutdown(Shutdown::Both);
            }
        }
    });
    loop {
        let (stream, _) = listener.accept().await?;
        if let Some((wire, until)) = orders.control() {
            tokio::spawn(wire::speak(stream, wire, until));
            continue;
        }
        *lock(&last) = rustix::io::dup(&stream).map(VsockStream::from).ok();
        if honest.send(Ok(stream)).await.is_err() {
            return Ok(());
        }
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
