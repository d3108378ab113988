// SPDX-License-Identifier: Apache-2.0
//! A command that runs in a container in addition to its first process: how it starts and how it ends.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::freeze::Admission;
use super::launch::{Launched, Outcome, Pids, launch};
use super::state::State;
use super::{Container, ContainerError, Containers, start};
use crate::cgroup::Cgroup;
use crate::init::Role;
use crate::init::config::InitConfig;
use crate::reaper::Exit;
use crate::sys;

const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// The command's ends of its standard streams.
#[derive(Debug)]
pub struct Stdio {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// A stream that is not used: /dev/null.
pub fn null() -> Result<OwnedFd, ContainerError> {
    start::null().map_err(ContainerError::system("open /dev/null"))
}

/// A pipe for output of the command: the agent's end and the command's end.
pub fn pipe() -> Result<(AsyncFd<OwnedFd>, OwnedFd), ContainerError> {
    let (reader, writer) = raw_pipe()?;
    Ok((watch(reader)?, writer))
}

/// A pipe for input of the command: the agent's end and the command's end.
pub fn input_pipe() -> Result<(AsyncFd<OwnedFd>, OwnedFd), ContainerError> {
    let (reader, writer) = raw_pipe()?;
    Ok((watch(writer)?, reader))
}

fn raw_pipe() -> Result<(OwnedFd, OwnedFd), ContainerError> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|e| ContainerError::system("create a pipe")(e.into()))
}

pub fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, ContainerError> {
    sys::watch(fd).map_err(ContainerError::system("watch a standard stream"))
}

impl Containers {
    /// Starts a command in a running container. Without `stdio` it gets a terminal of its own. It is admitted until its
    /// program runs.
    pub(super) fn launch_exec(
        &self,
        admission: Admission,
        container: &Arc<Container>,
        args: Vec<String>,
        stdio: Option<Stdio>,
    ) -> Result<Command, ContainerError> {
        let pidfd = container.running_pidfd("exec in")?;
        let State::Running { pid: first, .. } = container.snapshot().0 else {
            return Err(container.illegal("exec in"));
        };
        let mut process = container.process.clone();
        process.args = args;
        process.terminal = stdio.is_none();
        let config = InitConfig {
            cgroup_procs: container.cgroup.for_exec(first).procs(),
            process: Some(process),
            seccomp: container.seccomp.instructions.clone(),
            seccomp_flags: container.seccomp.flags,
            ..InitConfig::default()
        };
        let stdio = match stdio {
            Some(stdio) => stdio,
            // Used until the process has opened its terminal.
            None => Stdio {
                stdin: null()?,
                stdout: null()?,
                stderr: null()?,
            },
        };
        let stdio = [&stdio.stdin, &stdio.stdout, &stdio.stderr].map(AsFd::as_fd);
        let launched = launch(
            &self.shared,
            Role::Exec,
            config,
            stdio,
            &Pids::Of(pidfd.as_fd()),
            Some(pidfd.as_fd()),
        )
        .map_err(ContainerError::system("create a process"))?;
        Ok(Command {
            launched,
            admission: Some(admission),
            cgroup: container.cgroup.clone(),
            ended: false,
        })
    }
}

/// A started command. If it is dropped before the command's end, the command is killed, see [`Command::outlive`].
#[derive(Debug)]
pub struct Command {
    launched: Launched,
    admission: Option<Admission>,
    /// The container's.
    cgroup: Cgroup,
    ended: bool,
}

impl Command {
    /// Waits for the end of the command's own process.
    pub async fn run(&mut self) -> Result<Exit, ContainerError> {
        self.started().await?;
        self.exited().await
    }

    /// Waits until the program runs. Returns the agent's side of its terminal, if it has one.
    pub async fn started(&mut self) -> Result<Option<OwnedFd>, ContainerError> {
        let outcome = self.launched.wait_for_exec().await;
        self.admission = None;
        match outcome {
            Outcome::Executed { terminal, .. } => Ok(terminal),
            Outcome::Failed(failure) => {
                let _ = self.exited().await;
                Err(ContainerError::Exec(format!(
                    "unable to start container process: {}",
                    failure.message
                )))
            }
        }
    }

    pub async fn exited(&mut self) -> Result<Exit, ContainerError> {
        let exit = (&mut self.launched.exit).await;
        self.ended = true;
        exit.map_err(|_| ContainerError::Exec("the agent lost track of the command".to_owned()))
    }

    /// Lets the command run without this handle. The receiver gets its exit.
    pub fn outlive(mut self) -> tokio::sync::oneshot::Receiver<Result<Exit, ContainerError>> {
        let (sender, exit) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let exit = self.exited().await;
            // Fails if nobody waits for the exit any more.
            let _ = sender.send(exit);
        });
        exit
    }

    /// Kills the command with the rest of its session.
    pub async fn kill(&mut self) {
        self.kill_session();
        let _ = timeout(REAP_TIMEOUT, &mut self.launched.exit).await;
    }

    fn kill_session(&self) {
        self.launched.kill();
        self.cgroup.kill_session(self.launched.pid);
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        if !self.ended {
            // Nobody waits for the command any more.
            self.kill_session();
        }
    }
}
