// SPDX-License-Identifier: Apache-2.0
//! `AttachStream`: connects a client of the host to the standard streams of a container's first process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use bulkhead_proto::agent::{AttachStream, StreamEnd};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Container, ContainerError, Containers};
use crate::streams::buffer::Source;
use crate::streams::records::ToHost;
use crate::streams::session::{self, Sinks};
use crate::streams::tap::{Next, Tap, Wanted};

/// One attached client.
#[derive(Debug)]
pub struct Attachment {
    tap: Arc<Tap>,
    stdin: Option<AttachedInput>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    notices: Source,
}

impl Containers {
    /// Attaches a client: it gets the container's output from now on.
    pub fn attach(&self, request: &AttachStream) -> Result<Attachment, ContainerError> {
        let container = self.get(&request.container_id)?;
        container.running_pidfd("attach to")?;
        let tap = Arc::new(Tap::new(Wanted {
            stdout: request.stdout,
            stderr: request.stderr,
        }));
        container.log.tap(&tap);
        let input = container.stdin().filter(|_| request.stdin);
        let terminal = container.terminal();
        Ok(Attachment {
            tap,
            notices: if request.stderr && terminal.is_none() {
                Source::Stderr
            } else {
                Source::Stdout
            },
            stdin: input.map(|fd| AttachedInput {
                fd,
                // A terminal's input does not end. Its reader sees a hangup when the container ends.
                once: (request.stdin_once && terminal.is_none()).then_some(container),
            }),
            terminal,
        })
    }
}

/// The container's standard input. With `once` it is closed when this is dropped.
#[derive(Debug)]
struct AttachedInput {
    fd: Arc<AsyncFd<OwnedFd>>,
    once: Option<Arc<Container>>,
}

impl AsRef<AsyncFd<OwnedFd>> for AttachedInput {
    fn as_ref(&self) -> &AsyncFd<OwnedFd> {
        &self.fd
    }
}

impl Drop for AttachedInput {
    fn drop(&mut self) {
        if let Some(container) = &self.once {
            let stdin = container.stdin.lock();
            *stdin.unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

impl Attachment {
    /// Serves until the container's output has ended or the client has left.
    pub async fn serve(
        self,
        reader: impl AsyncRead + Unpin,
        writer: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let (tap, notices) = (self.tap, self.notices);
        let sinks = Sinks {
            stdin: self.stdin,
            terminal: self.terminal,
        };
        session::run(reader, writer, sinks, |host| async move {
            while let Some(next) = tap.next().await {
                let record = match next {
                    Next::Output(source, bytes) => ToHost::output(source, &bytes),
                    Next::Skipped(bytes) => ToHost::output(notices, notice(bytes).as_bytes()),
                };
                if host.send(record).await.is_err() {
                    break;
                }
            }
            StreamEnd::default()
        })
        .await
    }
}

fn notice(bytes: u64) -> String {
    format!(
        "\r\n[bulkhead: {bytes} bytes of output are missing here: this client was too slow]\r\n"
    )
}
