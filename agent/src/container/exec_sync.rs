// SPDX-License-Identifier: Apache-2.0
//! `ExecSync`: runs a command in a running container and returns its output and its exit code.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until, timeout};

use super::command::{Stdio, null, pipe};
use super::{ContainerError, Containers};

/// The most bytes of each stream that are kept, whatever limit the request has.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// How long to wait for the end of output after the command has ended: a descendant may hold it open.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const CHUNK_BYTES: usize = 32 << 10;

#[derive(Debug)]
pub struct ExecRequest {
    pub args: Vec<String>,
    pub timeout: Option<Duration>,
    pub output_limit_bytes: u64,
}

/// The result of a command. A command that exceeded its time limit was killed.
#[derive(Debug, Default)]
pub struct ExecOutcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
    pub timed_out: bool,
    pub truncated: bool,
}

impl Containers {
    /// Runs a command to its end or its time limit, and collects its output on the way.
    pub async fn exec(
        &self,
        id: &str,
        request: ExecRequest,
    ) -> Result<ExecOutcome, ContainerError> {
        if request.args.is_empty() {
            return Err(ContainerError::Invalid("no command is given".to_owned()));
        }
        let admission = self.admit().await?;
        let container = self.get(id)?;
        let _permit = self
            .shared
            .execs
            .try_acquire()
            .map_err(|_| ContainerError::TooMany("execs"))?;
        let deadline = request.timeout.map(|timeout| Instant::now() + timeout);
        let limit = usize::try_from(request.output_limit_bytes)
            .unwrap_or(MAX_OUTPUT_BYTES)
            .min(MAX_OUTPUT_BYTES);
        let (stdout, stdout_writer) = pipe()?;
        let (stderr, stderr_writer) = pipe()?;
        let (mut stdout, mut stderr) = (Output::new(stdout, limit), Output::new(stderr, limit));
        let stdio = Stdio {
            stdin: null()?,
            stdout: stdout_writer,
            stderr: stderr_writer,
        };
        let mut command = self.launch_exec(admission, &container, request.args, Some(stdio))?;

        let exit = {
            let ended = command.run();
            let output = async { tokio::join!(stdout.read_all(), stderr.read_all()) };
            tokio::pin!(ended, output);
            let late = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::pin!(late);
            let mut drained = false;
            let exit = loop {
                tokio::select! {
                    exit = &mut ended => break Some(exit?),
                    _ = &mut output, if !drained => drained = true,
                    () = &mut late => break None,
                }
            };
            if exit.is_some() && !drained {
                let _ = timeout(DRAIN_TIMEOUT, output).await;
            }
            exit
        };
        if exit.is_none() {
            command.kill().await;
            let rest = async { tokio::join!(stdout.read_all(), stderr.read_all()) };
            let _ = timeout(DRAIN_TIMEOUT, rest).await;
        }
        Ok(ExecOutcome {
            truncated: stdout.truncated || stderr.truncated,
            stdout: stdout.bytes,
            stderr: stderr.bytes,
            exit_code: exit.map_or(128 + libc::SIGKILL, |exit| exit.code),
            timed_out: exit.is_none(),
        })
    }
}

/// One stream of a command's output, up to its limit.
struct Output {
    pipe: AsyncFd<OwnedFd>,
    limit: usize,
    bytes: Vec<u8>,
    truncated: bool,
}

impl Output {
    fn new(pipe: AsyncFd<OwnedFd>, limit: usize) -> Self {
        Self {
            pipe,
            limit,
            bytes: Vec::new(),
            truncated: false,
        }
    }

    /// Reads to the end. Drops what exceeds the limit, but reads it, so that the command does not block.
    async fn read_all(&mut self) {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let Ok(mut ready) = self.pipe.readable().await else {
                return;
            };
            match rustix::io::read(self.pipe.get_ref(), &mut chunk) {
                Ok(0) => return,
                Ok(length) => {
                    let kept = length.min(self.limit - self.bytes.len());
                    self.bytes.extend_from_slice(&chunk[..kept]);
                    self.truncated |= kept < length;
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}
