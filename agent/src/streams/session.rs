// SPDX-License-Identifier: Apache-2.0
//! Connects one client of the host to a process's standard streams, for exec and attach.
//!
//! ```text
//! host ──records──> listen ──> Input ──> feed ──> the process
//!                      └─ window size ─> the terminal
//! host <──records── write <── queue <── output pumps, feed's reports, the end
//! ```
//!
//! All of this runs in one task. It ends when the work has ended (the process, or the container's output) or when
//! the host closes the stream, whichever comes first. Then every descriptor is closed.

use std::future::{Future, pending};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent::StreamEnd;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::input::Input;
use super::records::{self, FromHost, ToHost};

/// How many records may wait for the host. Each has at most 64 KiB.
const QUEUED_RECORDS: usize = 2;
const READ_BUFFER_BYTES: usize = 64 << 10;
/// How long a process may take to read the last input of a host that has left.
const LAST_INPUT_TIME: Duration = Duration::from_secs(10);

/// Where input and window sizes from the host go.
#[derive(Debug)]
pub struct Sinks<S> {
    pub stdin: Option<S>,
    pub terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

/// Runs a session. `work` gets a channel for its output to the host, and returns how the stream ends.
pub async fn run<S, F>(
    reader: impl AsyncRead + Unpin,
    writer: impl AsyncWrite + Unpin,
    sinks: Sinks<S>,
    work: impl FnOnce(mpsc::Sender<ToHost>) -> F,
) -> io::Result<()>
where
    S: AsRef<AsyncFd<OwnedFd>>,
    F: Future<Output = StreamEnd>,
{
    let (host, queue) = mpsc::channel(QUEUED_RECORDS);
    let input = Input::default();
    let working = work(host.clone());
    let talking = async {
        let feeding = async {
            input.feed(sinks.stdin, &host).await;
            pending().await
        };
        let end = tokio::select! {
            end = working => end,
            end = feeding => end,
        };
        // Fails if the host has left. Then there is nobody to tell.
        let _ = host.send(ToHost::end(&end)).await;
        drop(host);
    };
    let listening = async {
        let heard = listen(reader, &input, sinks.terminal.as_deref()).await;
        input.end();
        let _ = timeout(LAST_INPUT_TIME, input.drained()).await;
        heard
    };
    tokio::select! {
        heard = listening => heard,
        ((), written) = async { tokio::join!(talking, write(queue, writer)) } => written,
    }
}

/// Receives records until the host closes the stream, which is not an error.
async fn listen(
    reader: impl AsyncRead + Unpin,
    input: &Input,
    terminal: Option<&AsyncFd<OwnedFd>>,
) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    while let Some(record) = records::read(&mut reader).await? {
        match record {
            FromHost::Input(bytes) => input.push(bytes)?,
            FromHost::EndOfInput => input.end(),
            FromHost::WindowSize { columns, rows } => {
                if let Some(terminal) = terminal {
                    let size = Winsize {
                        ws_col: columns,
                        ws_row: rows,
                        ws_xpixel: 0,
                        ws_ypixel: 0,
                    };
                    // Fails if the terminal has hung up. Then its size does not matter.
                    let _ = tcsetwinsize(terminal.get_ref(), size);
                }
            }
        }
    }
    Ok(())
}

async fn write(
    mut queue: mpsc::Receiver<ToHost>,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    while let Some(ToHost(bytes)) = queue.recv().await {
        writer.write_all(&bytes).await?;
    }
    writer.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::{Sinks, run};
    use crate::streams::buffer::Source;
    use crate::streams::records::ToHost;
    use crate::sys;
    use bulkhead_proto::agent::StreamEnd;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use tokio::io::unix::AsyncFd;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    type Pipe = Arc<AsyncFd<OwnedFd>>;

    fn pipe() -> (std::fs::File, Pipe) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        (reader.into(), Arc::new(sys::watch(writer).unwrap()))
    }

    #[tokio::test]
    async fn output_then_the_end_then_nothing() {
        let (mut host, ours) = tokio::io::duplex(1 << 16);
        let (reader, writer) = tokio::io::split(ours);
        let sinks = Sinks::<Pipe> {
            stdin: None,
            terminal: None,
        };
        let running = run(reader, writer, sinks, |host| async move {
            let _ = host.send(ToHost::output(Source::Stdout, b"hi")).await;
            StreamEnd {
                exit_code: 3,
                ..StreamEnd::default()
            }
        });
        running.await.unwrap();
        let mut all = Vec::new();
        host.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"\x01\0\0\0\x02hi\x03\0\0\0\x02\x08\x03");
    }

    #[tokio::test]
    async fn the_last_input_of_a_host_that_leaves_is_written_and_the_pipe_closed() {
        let (mut host, ours) = tokio::io::duplex(1 << 16);
        let (reader, writer) = tokio::io::split(ours);
        let (mut process, stdin) = pipe();
        let sinks = Sinks {
            stdin: Some(stdin),
            terminal: None,
        };
        host.write_all(b"\0\0\0\0\x02hi").await.unwrap();
        drop(host);
        run(reader, writer, sinks, |_| std::future::pending())
            .await
            .unwrap();
        let mut all = String::new();
        process.read_to_string(&mut all).unwrap();
        assert_eq!(all, "hi");
    }

    #[tokio::test]
    async fn a_host_that_breaks_the_protocol_is_an_error() {
        let (mut host, ours) = tokio::io::duplex(1 << 16);
        let (reader, writer) = tokio::io::split(ours);
        let sinks = Sinks::<Pipe> {
            stdin: None,
            terminal: None,
        };
        host.write_all(b"\x07\0\0\0\0").await.unwrap();
        let error = run(reader, writer, sinks, |_| std::future::pending())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    }
}
