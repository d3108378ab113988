// SPDX-License-Identifier: Apache-2.0
//! `StartContainer`: starts a container's process, connects its standard streams, and follows it to its end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use bulkhead_proto::agent::PidNamespace;
use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::oneshot;

use super::launch::{Launched, Outcome, Pids, launch};
use super::state::{Event, State};
use super::{Container, ContainerError, Containers};
use crate::init::Role;
use crate::init::config::{Failure, Hooks, InitConfig};
use crate::reaper::Exit;
use crate::streams::buffer::Source;
use crate::sys;

impl Containers {
    /// Starts the container. Returns it and its state when the program has been executed. If that was not possible, the
    /// container has exited.
    pub async fn start(&self, id: &str) -> Result<(Arc<Container>, State), ContainerError> {
        let _admission = self.admit().await?;
        let container = self.get(id)?;
        let _operation = container.operation.lock().await;
        match container.snapshot().0 {
            State::Created => {}
            State::Restored { pid } => {
                let running = self.start_restored(&container, pid)?;
                return Ok((Arc::clone(&container), running));
            }
            State::Running { .. } | State::Exited(_) => return Err(container.illegal("start")),
        }
        let started_at = Instant::now();
        let (mut launched, streams) = self.launch_container(&container)?;
        let failure = match launched.wait_for_exec().await {
            Outcome::Executed { terminal, identity } => {
                match connect(&container, streams, terminal) {
                    Ok(()) => {
                        // Cannot be set already, because a container starts only once.
                        let _ = container.identity.set(identity);
                        let running = self.started(&container, launched, started_at)?;
                        return Ok((Arc::clone(&container), running));
                    }
                    Err(e) => Failure::other(format!("read the container's output: {e}")),
                }
            }
            Outcome::Failed(failure) => failure,
        };
        launched.kill();
        container.cgroup.kill();
        let exit = launched.exit.await;
        let at = exit.map_or_else(|_| Instant::now(), |exit| exit.at);
        let failed = Event::FailedToStart {
            at,
            exit_code: failure.exit_code,
            oom_killed: container.cgroup.was_oom_killed(),
            message: failure.message,
        };
        let exited = self.advance(&container, failed)?;
        container.log.container_exited();
        Ok((Arc::clone(&container), exited))
    }

    fn started(
        &self,
        container: &Arc<Container>,
        launched: Launched,
        at: Instant,
    ) -> Result<State, ContainerError> {
        let pid = launched.pid;
        let pidfd = Arc::clone(&launched.pidfd);
        *container
            .pidfd
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(pidfd);
        let running = self.advance(container, Event::Started { pid, at })?;
        tokio::spawn(self.clone().follow(Arc::clone(container), launched.exit));
        Ok(running)
    }

    /// Waits for the end of the first process, then kills the rest and records the exit.
    async fn follow(self, container: Arc<Container>, exit: oneshot::Receiver<Exit>) {
        let Ok(Exit { code, at }) = exit.await else {
            return;
        };
        // Kills descendants, too. If the PID namespace is shared, they would not end with the first process.
        container.cgroup.kill();
        let oom_killed = container.cgroup.was_oom_killed();
        *container
            .pidfd
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        for stream in [&container.stdin, &container.terminal] {
            *stream.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        if let Err(e) = self.advance(
            &container,
            Event::Exited {
                at,
                exit_code: code,
                oom_killed,
            },
        ) {
            eprintln!("bulkhead-agent: {e}");
        }
        container.log.container_exited();
        container.ended.send_replace(true);
    }

    /// Creates the container's process with its streams and namespaces. It has not executed its program yet.
    fn launch_container(
        &self,
        container: &Container,
    ) -> Result<(Launched, Streams), ContainerError> {
        let (child, streams) =
            streams(container).map_err(ContainerError::system("create standard streams"))?;
        let spec = &container.spec;
        let config = InitConfig {
            rootfs: container.rootfs.to_string_lossy().into_owned(),
            cgroup_procs: container.cgroup.procs(),
            process: Some(container.process.clone()),
            readonly_rootfs: spec.readonly_rootfs,
            privileged: spec.privileged,
            masked_paths: spec.masked_paths.clone(),
            readonly_paths: spec.readonly_paths.clone(),
            seccomp: container.seccomp.instructions.clone(),
            seccomp_flags: container.seccomp.flags,
            mounts: container.mounts.clone(),
            devices: container.devices.clone(),
            hooks: hooks(container),
            ..InitConfig::default()
        };
        let shared = self.pid_namespace(container)?;
        let pids = match (spec.pid_namespace(), &shared) {
            (_, Some(pidfd)) => Pids::Of(pidfd.as_fd()),
            (PidNamespace::Guest, None) => Pids::Guest,
            (_, None) => Pids::New,
        };
        let launched = launch(
            &self.shared,
            Role::Container,
            config,
            child.borrow(),
            &pids,
            None,
        )
        .map_err(ContainerError::system("create a process"))?;
        Ok((launched, streams))
    }

    /// A pidfd of a process in the PID namespace that the container has to join, if it has to join one.
    fn pid_namespace(&self, container: &Container) -> Result<Option<Arc<OwnedFd>>, ContainerError> {
        match container.spec.pid_namespace() {
            PidNamespace::Container | PidNamespace::Guest => Ok(None),
            PidNamespace::Pod => {
                let shared = &self.shared;
                let pause = shared.pod_pids.get(&shared.reaper, &shared.users);
                pause
                    .map(Some)
                    .map_err(ContainerError::system("create the pod's PID namespace"))
            }
            PidNamespace::Target => self
                .get(&container.spec.pid_target)?
                .running_pidfd("sharing its PID namespace")
                .map(Some),
        }
    }
}

/// What runs in the container before its program. `None`: nothing.
fn hooks(container: &Container) -> Option<Hooks> {
    let spec = &container.spec;
    let programs = spec.start_hooks.clone();
    (!programs.is_empty()).then(|| Hooks {
        programs,
        container_id: container.id(),
        annotations: spec.annotations.clone(),
    })
}

/// The agent's ends of a container's standard streams.
#[derive(Debug)]
struct Streams {
    stdin: Option<OwnedFd>,
    outputs: Vec<(Source, OwnedFd)>,
}

/// Connects the container's output to its log. Input and terminal are kept for clients that attach.
fn connect(
    container: &Container,
    mut streams: Streams,
    terminal: Option<OwnedFd>,
) -> io::Result<()> {
    let mut stdin = streams.stdin.map(sys::watch).transpose()?.map(Arc::new);
    if let Some(terminal) = terminal {
        let output = terminal.try_clone()?;
        let terminal = Arc::new(sys::watch(terminal)?);
        streams.outputs.push((Source::Stdout, output));
        stdin = container.process.stdin.then(|| Arc::clone(&terminal));
        let place = container.terminal.lock();
        *place.unwrap_or_else(PoisonError::into_inner) = Some(terminal);
    }
    let place = container.stdin.lock();
    *place.unwrap_or_else(PoisonError::into_inner) = stdin;
    container.log.attach(streams.outputs)
}

/// The container's ends of its standard streams.
struct ChildStreams {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl ChildStreams {
    fn borrow(&self) -> [BorrowedFd<'_>; 3] {
        [self.stdin.as_fd(), self.stdout.as_fd(), self.stderr.as_fd()]
    }
}

pub(super) fn null() -> io::Result<OwnedFd> {
    Ok(open(
        "/dev/null",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Creates the standard streams. A process with a terminal opens that itself and starts with /dev/null.
fn streams(container: &Container) -> io::Result<(ChildStreams, Streams)> {
    if container.process.terminal {
        let child = ChildStreams {
            stdin: null()?,
            stdout: null()?,
            stderr: null()?,
        };
        return Ok((
            child,
            Streams {
                stdin: None,
                outputs: Vec::new(),
            },
        ));
    }
    let (stdin, stdin_writer) = if container.process.stdin {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        (reader, Some(writer))
    } else {
        (null()?, None)
    };
    let (out, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (err, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let outputs = vec![(Source::Stdout, out), (Source::Stderr, err)];
    Ok((
        ChildStreams {
            stdin,
            stdout,
            stderr,
        },
        Streams {
            stdin: stdin_writer,
            outputs,
        },
    ))
}
