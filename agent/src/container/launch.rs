// SPDX-License-Identifier: Apache-2.0
//! Starts a process that becomes a container's program, and receives its reports until the exec.

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent::Identity;
use prost::Message;
use rustix::fs::{FileType, Gid, Uid, fchown, fstat};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::Shared;
use crate::init::config::{Event, Failure, InitConfig, Report};
use crate::init::{self, Role};
use crate::patience::Limits;
use crate::power;
use crate::reaper::Exit;
use crate::sys;
use crate::sys::spawn::{Inside, PidNamespace, spawn_self};
use crate::users::PodUsers;

/// How long the steps before the exec may take. The host gives up soon after the second limit, and kubelet after that.
const START_LIMITS: Limits = Limits {
    own: Duration::from_secs(60),
    longest: Duration::from_secs(105),
};
const MAX_REPORT_BYTES: usize = 16 << 10;

/// The PID namespace of a new process.
#[derive(Debug)]
pub enum Pids<'a> {
    New,
    Guest,
    /// The namespace of the process behind a pidfd.
    Of(BorrowedFd<'a>),
}

/// A process that has not executed its program yet.
#[derive(Debug)]
pub struct Launched {
    pub pid: i32,
    pub pidfd: Arc<OwnedFd>,
    pub exit: oneshot::Receiver<Exit>,
    reports: AsyncFd<OwnedFd>,
}

/// What became of the process.
#[derive(Debug)]
pub enum Outcome {
    /// The program runs, or has run. `terminal` is the controlling side of its terminal, if it has one.
    Executed {
        terminal: Option<OwnedFd>,
        identity: Identity,
    },
    Failed(Failure),
}

/// Creates the process. `stdio` and `target` are borrowed; the caller closes its own copies afterwards.
pub fn launch(
    shared: &Shared,
    role: Role,
    mut config: InitConfig,
    stdio: [BorrowedFd<'_>; 3],
    pids: &Pids<'_>,
    target: Option<BorrowedFd<'_>>,
) -> io::Result<Launched> {
    let users = &shared.users;
    config.own_users = users.namespace().is_some();
    let cgroup = if config.own_users {
        own_pipes(&stdio, users)?;
        Some(File::options().write(true).open(&config.cgroup_procs)?)
    } else {
        None
    };
    let inside = users.namespace().map(|users| Inside {
        users,
        cgroup: cgroup.as_ref().map(AsFd::as_fd),
    });
    let score = config.process.as_ref().map_or(0, |one| one.oom_score_adj);
    let config = memory_file(&config.encode_to_vec())?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let [stdin, stdout, stderr] = stdio;
    let mut fds = vec![stdin, stdout, stderr, config.as_fd(), theirs.as_fd()];
    fds.extend(target);
    let role = match role {
        Role::Container => init::CONTAINER_ROLE_ARG,
        Role::Exec => init::EXEC_ROLE_ARG,
    };
    let reports = sys::watch(ours)?;
    let pid = match pids {
        Pids::New => spawn_self(role, &fds, PidNamespace::New, inside)?,
        Pids::Guest => spawn_self(role, &fds, PidNamespace::OfChildren, inside)?,
        Pids::Of(pidfd) => in_pid_namespace(*pidfd, || {
            spawn_self(role, &fds, PidNamespace::OfChildren, inside)
        })?,
    };
    // There was no await since the process was created, so the reaper cannot have collected it yet.
    let exit = shared.reaper.register(pid);
    let pidfd = pidfd(pid).inspect_err(|_| drop(sys::kill(pid, libc::SIGKILL)))?;
    if inside.is_some() {
        // The process may not lower its own score, so the agent does it. It fails if the process is gone.
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
    }
    Ok(Launched {
        pid,
        pidfd: Arc::new(pidfd),
        exit,
        reports,
    })
}

/// Gives pipes to the pod's root user. Otherwise a program in the pod's user namespace could not open `/dev/stdout`.
fn own_pipes(stdio: &[BorrowedFd<'_>], users: &PodUsers) -> io::Result<()> {
    let (uid, gid) = users.in_guest(0, 0)?;
    for fd in stdio {
        let kind = FileType::from_raw_mode(fstat(fd)?.st_mode);
        if kind == FileType::Fifo {
            fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
    }
    Ok(())
}

impl Launched {
    /// Waits for the exec or a failure. After a failure the process has ended or is about to.
    pub async fn wait_for_exec(&mut self) -> Outcome {
        match START_LIMITS.wait(self.hear()).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => self.abort(format!("receive a report of the new process: {error}")),
            Err(passed) => self.abort(format!("not started within {} seconds", passed.as_secs())),
        }
    }

    /// Receives reports until the process has executed its program (which closes the channel) or has failed.
    async fn hear(&mut self) -> io::Result<Outcome> {
        let mut terminal = None;
        let mut executing = None;
        loop {
            let (bytes, descriptor) = receive(&self.reports).await?;
            terminal = descriptor.or(terminal);
            if bytes.is_empty() {
                return Ok(match executing {
                    Some(identity) => Outcome::Executed { terminal, identity },
                    None => Outcome::Failed(Failure::other(
                        "the new process was killed before it could start",
                    )),
                });
            }
            match Report::decode(bytes.as_slice())
                .map_err(io::Error::other)?
                .event
            {
                Some(Event::Failed(failure)) => return Ok(Outcome::Failed(failure)),
                Some(Event::Executing(identity)) => executing = Some(identity),
                Some(Event::Terminal(_)) | None => {}
            }
        }
    }

    /// Kills the process, but not its descendants.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    fn abort(&self, message: String) -> Outcome {
        self.kill();
        Outcome::Failed(Failure::other(message))
    }
}

/// Receives one datagram, which is empty at the end, and the descriptor that came with it.
async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    loop {
        let mut ready = socket.readable().await?;
        let received = ready.try_io(|socket| {
            let mut bytes = vec![0; MAX_REPORT_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let message = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let descriptor = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            bytes.truncate(message.bytes);
            Ok((bytes, descriptor))
        });
        if let Ok(result) = received {
            return result;
        }
    }
}

/// Opens a pidfd. Call it while the process cannot have been collected.
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Calls `make`; processes that this thread creates meanwhile are in another PID namespace.
pub fn in_pid_namespace<T>(
    pidfd: BorrowedFd<'_>,
    make: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let own = rustix::fs::open(
        "/proc/self/ns/pid",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    move_into_thread_name_spaces(pidfd, ThreadNameSpaceType::PROCESS_ID)?;
    let made = make();
    if let Err(e) = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID)) {
        // All later processes would be in the wrong namespace, so this is fatal.
        power::fatal(&format!("return to the guest's PID namespace: {e}"));
    }
    made
}

fn memory_file(content: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(c"config", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(content)?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}
