// SPDX-License-Identifier: Apache-2.0
//! `ExecStream`: runs a command in a running container, with a client of the host at its standard streams.
//!
//! The command is not killed when the client leaves. Its pipes close or its terminal hangs up, and the command
//! continues or ends, as it would when an ssh connection breaks.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_proto::agent::{ExecStream, StreamEnd};
use bulkhead_text::chain;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use super::command::{Command, Stdio, input_pipe, null, pipe, watch as watch_fd};
use super::{ContainerError, Containers};
use crate::streams::buffer::Source;
use crate::streams::output;
use crate::streams::records::ToHost;
use crate::streams::session::{self, Sinks};

type Pipe = Arc<AsyncFd<OwnedFd>>;

/// A command that is being started, with the agent's ends of its streams.
#[derive(Debug)]
pub struct StreamedExec {
    command: Command,
    stdin: Option<Pipe>,
    outputs: Vec<(Source, Pipe)>,
    wants_input: bool,
    _permit: OwnedSemaphorePermit,
}

impl Containers {
    pub async fn exec_stream(&self, request: ExecStream) -> Result<StreamedExec, ContainerError> {
        if request.args.is_empty() {
            return Err(ContainerError::Invalid("no command is given".to_owned()));
        }
        let admission = self.admit().await?;
        let container = self.get(&request.container_id)?;
        let permit = Arc::clone(&self.shared.execs)
            .try_acquire_owned()
            .map_err(|_| ContainerError::TooMany("execs"))?;
        let mut exec = Streams::default();
        let stdio = if request.terminal {
            None
        } else {
            Some(exec.pipes(&request)?)
        };
        Ok(StreamedExec {
            command: self.launch_exec(admission, &container, request.args, stdio)?,
            stdin: exec.stdin,
            outputs: exec.outputs,
            wants_input: request.stdin,
            _permit: permit,
        })
    }
}

/// The agent's ends of a command's pipes, as far as they have been created.
#[derive(Default)]
struct Streams {
    stdin: Option<Pipe>,
    outputs: Vec<(Source, Pipe)>,
}

impl Streams {
    fn pipes(&mut self, request: &ExecStream) -> Result<Stdio, ContainerError> {
        let stdin = if request.stdin {
            let (ours, theirs) = input_pipe()?;
            self.stdin = Some(Arc::new(ours));
            theirs
        } else {
            null()?
        };
        Ok(Stdio {
            stdin,
            stdout: self.output(Source::Stdout, request.stdout)?,
            stderr: self.output(Source::Stderr, request.stderr)?,
        })
    }

    fn output(&mut self, source: Source, wanted: bool) -> Result<OwnedFd, ContainerError> {
        if !wanted {
            return null();
        }
        let (ours, theirs) = pipe()?;
        self.outputs.push((source, Arc::new(ours)));
        Ok(theirs)
    }
}

impl StreamedExec {
    /// Serves until the command has ended and its output has been sent, or the client has left.
    pub async fn serve(
        mut self,
        reader: impl AsyncRead + Unpin,
        writer: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let terminal = match self.started().await {
            Ok(terminal) => terminal,
            Err(e) => {
                let end = StreamEnd {
                    error: chain(&e),
                    ..StreamEnd::default()
                };
                let sinks = Sinks::<Pipe> {
                    stdin: None,
                    terminal: None,
                };
                return session::run(reader, writer, sinks, |_| async { end }).await;
            }
        };
        let exit = self.command.outlive();
        let outputs = self.outputs;
        let sinks = Sinks {
            stdin: self.stdin,
            terminal,
        };
        session::run(reader, writer, sinks, |host| async move {
            let (running, ended) = watch::channel(false);
            let exited = async {
                let exit = exit.await;
                running.send_replace(true);
                exit
            };
            let (exit, ()) = tokio::join!(exited, pump_all(&outputs, host, ended));
            match exit {
                Ok(Ok(exit)) => StreamEnd {
                    exit_code: exit.code,
                    ..StreamEnd::default()
                },
                Ok(Err(e)) => lost(&chain(&e)),
                Err(_) => lost("the agent lost track of the command"),
            }
        })
        .await
    }

    async fn started(&mut self) -> Result<Option<Pipe>, ContainerError> {
        let Some(terminal) = self.command.started().await? else {
            return Ok(None);
        };
        let terminal = Arc::new(watch_fd(terminal)?);
        self.outputs.push((Source::Stdout, Arc::clone(&terminal)));
        if self.wants_input {
            self.stdin = Some(Arc::clone(&terminal));
        }
        Ok(Some(terminal))
    }
}

fn lost(error: &str) -> StreamEnd {
    StreamEnd {
        error: error.to_owned(),
        ..StreamEnd::default()
    }
}

/// Sends all output to the client. There are at most two streams: standard output and standard error.
async fn pump_all(
    outputs: &[(Source, Pipe)],
    host: mpsc::Sender<ToHost>,
    ended: watch::Receiver<bool>,
) {
    let pump = |index: usize| {
        let (host, ended) = (host.clone(), ended.clone());
        async move {
            if let Some((source, pipe)) = outputs.get(index) {
                output::pump(*source, pipe, &host, ended).await;
            }
        }
    };
    tokio::join!(pump(0), pump(1));
}
