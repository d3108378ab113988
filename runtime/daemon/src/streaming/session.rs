// SPDX-License-Identifier: Apache-2.0
//! Exec and attach: one client at the standard streams of a process, independent of the client's protocol.
//!
//! [`super::spdy_process`] and [`super::websocket`] make a [`Client`] of a connection. The session ends with the
//! process (or the container's output), with the client, or with the guest. A client that does not read stops only its
//! own session: then nothing is read from the guest for it, and the agent keeps the process and other clients going.

use std::future::{Future, pending};
use std::time::Duration;

use bulkhead_guest::protocol::{AttachStream, ExecStream};
use bulkhead_guest::streams::{FromProcess, ProcessInput, ProcessOutput, ProcessStreams};
use bulkhead_proto::agent::record::{INPUT_WINDOW_BYTES, MAX_PAYLOAD_BYTES};
use bulkhead_text::chain;
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::status::Ended;
use super::tokens::{Request, Streams};
use crate::pod::{PodError, Pods};

/// How long the client's last input may take to reach the process after the client has left.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// The longest text that can be a window size. Real ones are far shorter.
const SIZE_BYTES: usize = 1024;

/// The client has left.
#[derive(Debug, thiserror::Error)]
#[error("the client has left")]
pub struct Left;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

#[derive(Debug, PartialEq, Eq)]
pub enum FromClient {
    Input(Bytes),
    EndOfInput,
}

/// The size of the client's terminal window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

/// The way to the client.
pub trait Output: Send {
    fn write(
        &mut self,
        source: Source,
        bytes: Bytes,
    ) -> impl Future<Output = Result<(), Left>> + Send;

    /// Tells the client how the session ended, and closes the connection. `None` means that the client ended it.
    fn finish(self, ended: Option<Ended>) -> impl Future<Output = ()> + Send;
}

/// A connected client, with all its streams.
#[derive(Debug)]
pub struct Client<O> {
    /// Closed when the client has left and all its input has been received.
    pub input: mpsc::Receiver<FromClient>,
    pub sizes: watch::Receiver<Size>,
    pub output: O,
    pub left: CancellationToken,
}

/// Serves a client until the session ends. `request` must be exec or attach.
pub async fn serve<O: Output>(pods: &Pods, request: Request, mut client: Client<O>) {
    let (what, opened) = match request {
        Request::Exec {
            container,
            args,
            streams,
        } => {
            let opened = exec(pods, container, args, streams).await;
            ("error executing command in container", opened)
        }
        Request::Attach { container, streams } => {
            let opened = attach(pods, container, streams).await;
            ("error attaching to container", opened)
        }
        // The server passes these on to [`super::forward`] instead.
        Request::PortForward { .. } => return,
    };
    let failed = |why: String| Ended::Failed(format!("{what}: {why}"));
    let ended = match opened {
        Ok(process) => match run(process, &mut client).await {
            Some(Ended::Failed(why)) => Some(failed(why)),
            ended => ended,
        },
        Err(error) => Some(failed(chain(&error))),
    };
    // The connection is still read while it closes. Without a receiver, further input is discarded.
    drop(client.input);
    client.output.finish(ended).await;
}

async fn exec(
    pods: &Pods,
    container_id: String,
    args: Vec<String>,
    streams: Streams,
) -> Result<ProcessStreams, PodError> {
    let request = ExecStream {
        container_id,
        args,
        terminal: streams.terminal,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
    };
    pods.exec_stream(request).await
}

async fn attach(
    pods: &Pods,
    container_id: String,
    streams: Streams,
) -> Result<ProcessStreams, PodError> {
    let request = AttachStream {
        container_id,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
        stdin_once: false,
    };
    pods.attach_stream(request).await
}

/// Copies between the process and the client. Returns how the process ended, or `None` if the client left first.
async fn run<O: Output>(process: ProcessStreams, client: &mut Client<O>) -> Option<Ended> {
    let (gone, gone_so_far) = watch::channel(0);
    let Client {
        input,
        sizes,
        output,
        left,
    } = client;
    let leaving = async {
        left.cancelled().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        ended = from_process(process.output, output, &gone) => Some(ended),
        () = to_process(process.input, input, sizes.clone(), gone_so_far) => None,
        () = leaving => None,
    }
}

async fn from_process(
    mut process: ProcessOutput,
    output: &mut impl Output,
    gone: &watch::Sender<u64>,
) -> Ended {
    let mut reads = true;
    loop {
        let (source, bytes) = match process.next().await {
            Ok(FromProcess::Stdout(bytes)) => (Source::Stdout, bytes),
            Ok(FromProcess::Stderr(bytes)) => (Source::Stderr, bytes),
            Ok(FromProcess::InputGone(total)) => {
                gone.send_replace(total);
                continue;
            }
            Ok(FromProcess::Exited(code)) => return Ended::Exited(code),
            Ok(FromProcess::Failed(why)) => return Ended::Failed(why),
            Err(error) => return Ended::Failed(chain(&error)),
        };
        // Go on even if the client has left, because its last input may still be on its way to the process.
        reads = reads && output.write(source, bytes).await.is_ok();
    }
}

/// Returns when the client has left and all its input has been sent.
async fn to_process(
    process: ProcessInput,
    input: &mut mpsc::Receiver<FromClient>,
    sizes: watch::Receiver<Size>,
    gone: watch::Receiver<u64>,
) {
    if forward(process, input, sizes, gone).await.is_err() {
        // The guest is gone. The other direction finds out why.
        pending::<()>().await;
    }
}

/// Copies input and window sizes to the process. Input waits while the agent's window is full; window sizes do not.
async fn forward(
    mut process: ProcessInput,
    input: &mut mpsc::Receiver<FromClient>,
    mut sizes: watch::Receiver<Size>,
    mut gone: watch::Receiver<u64>,
) -> std::io::Result<()> {
    let window = INPUT_WINDOW_BYTES as u64;
    let (mut sent, mut waiting, mut ended) = (0u64, Bytes::new(), false);
    let (mut sizes_come, mut gone_comes) = (true, true);
    loop {
        let on_the_way = sent.saturating_sub(*gone.borrow_and_update());
        let room = usize::try_from(window.saturating_sub(on_the_way)).unwrap_or(0);
        if !waiting.is_empty() && room > 0 {
            let part = waiting.split_to(waiting.len().min(room).min(MAX_PAYLOAD_BYTES));
            process.write(&part).await?;
            sent = sent.saturating_add(part.len() as u64);
            continue;
        }
        tokio::select! {
            changed = sizes.changed(), if sizes_come => {
                sizes_come = changed.is_ok();
                if sizes_come {
                    let Size { columns, rows } = *sizes.borrow_and_update();
                    process.window_size(columns, rows).await?;
                }
            }
            changed = gone.changed(), if gone_comes && !waiting.is_empty() => {
                gone_comes = changed.is_ok();
            }
            said = input.recv(), if waiting.is_empty() => match said {
                Some(FromClient::Input(bytes)) if !ended => waiting = bytes,
                Some(FromClient::EndOfInput) if !ended => {
                    ended = true;
                    process.end().await?;
                }
                Some(_) => {}
                None => return Ok(()),
            },
        }
    }
}

/// Parses window sizes as clients send them: JSON objects one after the other, in pieces of any length.
#[derive(Debug, Default)]
pub struct SizeParser {
    buffer: Vec<u8>,
}

#[derive(Debug, Deserialize)]
struct RawSize {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

impl SizeParser {
    /// Adds bytes, and returns the last size that is complete. Anything that is not a size is discarded.
    pub fn push(&mut self, bytes: &[u8]) -> Option<Size> {
        self.buffer.extend_from_slice(bytes);
        let mut stream = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<RawSize>();
        let (mut last, mut broken) = (None, false);
        for size in stream.by_ref() {
            match size {
                Ok(size) => last = Some(size),
                Err(error) => {
                    broken = !error.is_eof();
                    break;
                }
            }
        }
        let done = stream.byte_offset();
        if broken || self.buffer.len().saturating_sub(done) > SIZE_BYTES {
            self.buffer = Vec::new();
        } else {
            self.buffer.drain(..done);
        }
        last.map(|RawSize { width, height }| Size {
            columns: width,
            rows: height,
        })
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
