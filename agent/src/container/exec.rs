// SPDX-License-Identifier: Apache-2.0
//! `ExecSync`: a command in a running container, its output, its exit code.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until, timeout};

use super::launch::{Launched, Outcome, Pids, launch};
use super::start::null;
use super::{Container, ContainerError, Containers};
use crate::cgroup::Cgroup;
use crate::init::Role;
use crate::init::config::InitConfig;
use crate::reaper::Exit;
use crate::sys;

/// What is kept of each stream at most, whatever is asked for.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// How long a descendant may hold the output open after the command has ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const REAP_TIMEOUT: Duration = Duration::from_secs(5);
const CHUNK_BYTES: usize = 32 << 10;

#[derive(Debug)]
pub struct ExecRequest {
    pub args: Vec<String>,
    pub timeout: Option<Duration>,
    pub output_limit_bytes: u64,
}

#[derive(Debug, Default)]
pub struct ExecOutcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
    pub timed_out: bool,
    pub truncated: bool,
}

impl Containers {
    pub async fn exec(
        &self,
        id: &str,
        request: ExecRequest,
    ) -> Result<ExecOutcome, ContainerError> {
        if request.args.is_empty() {
            return Err(ContainerError::Invalid("no command is given".to_owned()));
        }
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
        let (mut command, stdout, stderr) = self.launch_exec(&container, request.args)?;
        let mut stdout = Output::new(stdout, limit)?;
        let mut stderr = Output::new(stderr, limit)?;

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

    fn launch_exec(
        &self,
        container: &Arc<Container>,
        args: Vec<String>,
    ) -> Result<(Command, OwnedFd, OwnedFd), ContainerError> {
        static EXECS: AtomicU64 = AtomicU64::new(0);
        let pidfd = container.running_pidfd("exec in")?;
        let system = ContainerError::system;
        let null = null().map_err(system("open /dev/null"))?;
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| system("make a pipe")(e.into()));
        let (stdout, stdout_writer) = pipe()?;
        let (stderr, stderr_writer) = pipe()?;
        let number = EXECS.fetch_add(1, Ordering::Relaxed);
        let group = container.cgroup.create_child(&format!("exec-{number}"))?;
        let mut process = container.process.clone();
        process.args = args;
        process.terminal = false;
        let config = InitConfig {
            cgroup_procs: group.procs(),
            process: Some(process),
            seccomp: container.seccomp.instructions.clone(),
            seccomp_flags: container.seccomp.flags,
            ..InitConfig::default()
        };
        let stdio = [null.as_fd(), stdout_writer.as_fd(), stderr_writer.as_fd()];
        let pids = Pids::Of(pidfd.as_fd());
        let launched = launch(
            &self.shared.reaper,
            Role::Exec,
            &config,
            stdio,
            &pids,
            Some(pidfd.as_fd()),
        )
        .inspect_err(|_| group.remove_if_empty())
        .map_err(system("make a process"))?;
        Ok((
            Command {
                launched,
                group,
                ended: false,
            },
            stdout,
            stderr,
        ))
    }
}

struct Command {
    launched: Launched,
    group: Cgroup,
    ended: bool,
}

impl Command {
    /// Until the command's own process has ended.
    async fn run(&mut self) -> Result<Exit, ContainerError> {
        let outcome = self.launched.wait_for_exec().await;
        let exit = (&mut self.launched.exit).await;
        self.ended = true;
        match outcome {
            Outcome::Executed { .. } => {
                exit.map_err(|_| ContainerError::Exec("the agent lost track of it".to_owned()))
            }
            Outcome::Failed(failure) => Err(ContainerError::Exec(format!(
                "unable to start container process: {}",
                failure.message
            ))),
        }
    }

    /// It and all its descendants.
    async fn kill(&mut self) {
        self.group.kill();
        self.launched.kill();
        let _ = timeout(REAP_TIMEOUT, &mut self.launched.exit).await;
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        if !self.ended {
            // Nobody waits for it any more.
            self.group.kill();
            self.launched.kill();
        }
        // What a command left running stays, in its group, until the container is removed.
        self.group.remove_if_empty();
    }
}

/// One stream of a command's output, as much of it as is kept.
struct Output {
    pipe: AsyncFd<OwnedFd>,
    limit: usize,
    bytes: Vec<u8>,
    truncated: bool,
}

impl Output {
    fn new(pipe: OwnedFd, limit: usize) -> Result<Self, ContainerError> {
        let pipe = sys::watch(pipe).map_err(ContainerError::system("read the command's output"))?;
        Ok(Self {
            pipe,
            limit,
            bytes: Vec::new(),
            truncated: false,
        })
    }

    /// What is over the limit is read too, so that the command does not block on it.
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
