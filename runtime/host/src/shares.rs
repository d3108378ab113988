// SPDX-License-Identifier: Apache-2.0
//! The file server of a guest: a jailed process that serves host directories by virtio-fs.
//!
//! It is started in two steps, like a VMM: [`spawn`] makes the process, then the caller stores its identity, and
//! [`Starting::serve`] lets it enter its jail and connects it to the VMM. [`mounts`] adds shares to its mount namespace
//! while it runs; it never opens a path of the host itself. It keeps running when the daemon restarts, and ends with
//! its VMM.

pub mod mounts;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_share::{READY, ShareConfig};
use command_fds::{CommandFdExt, FdMapping};
use tokio::io::AsyncReadExt;

use crate::control;
use crate::cores;
use crate::files::{Files, last_lines, open_regular};
use crate::process::{Identity, VmmProcess};

/// The number of the socket's file descriptor in the file server.
const SOCKET_FD: i32 = 3;
/// How long it may take to enter its jail.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How many lines of its log an error shows.
const LAST_LINES: usize = 3;

/// An error about host directories of a guest.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("share {path} with the guest")]
    Source { path: PathBuf, source: io::Error },
    #[error(
        "{path} cannot be shared with a guest: it is {what}; only directories and regular files can be shared"
    )]
    Kind { path: PathBuf, what: &'static str },
    #[error(
        "{path} is on a mount of the host that is neither shared nor a slave, so the container cannot see later mounts \
         of the host (HOST_TO_CONTAINER): run `mount --make-rshared` on it, or mount it PRIVATE"
    )]
    NotPropagated { path: PathBuf },
    #[error("{path} cannot be recursively read-only and also show later mounts of the host")]
    Contradiction { path: PathBuf },
    #[error("{0} directories are already shared with this guest, and more are not possible")]
    TooMany(usize),
    #[error(
        "the file server of this guest has ended, so its shared directories fail with EIO: remove the sandbox"
    )]
    Ended,
    #[error("file server: {step}{said}")]
    Server {
        step: &'static str,
        source: io::Error,
        said: String,
    },
    #[error("connect the file server to the VM")]
    Join(#[from] control::ControlError),
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// A file server that waits for its configuration. If this is dropped, the file server ends.
#[derive(Debug)]
pub struct Starting {
    process: Arc<VmmProcess>,
    input: ChildStdin,
    output: ChildStdout,
    /// The VMM's end of the connection.
    socket: UnixStream,
    files: Files,
}

/// Starts the file server of the guest whose files are `files`, and whose VMM is `vmm`.
pub fn spawn(program: &Path, files: Files, vmm: Identity) -> Result<Starting, ShareError> {
    let failed = |source| server(&files, "start it", source);
    let (socket, servers) = UnixStream::pair().map_err(failed)?;
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    let log = open_regular(&files.share_log(), &mut options).map_err(failed)?;
    let mut command = Command::new(program);
    command
        .arg("share")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .process_group(0);
    let socket_for_it = FdMapping {
        parent_fd: servers.into(),
        child_fd: SOCKET_FD,
    };
    command
        .fd_mappings(vec![socket_for_it])
        .map_err(|e| failed(io::Error::other(e.to_string())))?;
    let mut child = command.spawn().map_err(failed)?;
    let pipes = child.stdin.take().zip(child.stdout.take());
    let process = VmmProcess::of_child(child).map_err(failed)?;
    if let Err(e) = process.set_oom_score_adj(0) {
        tracing::debug!("oom_score_adj of the file server: {e}");
    }
    cores::join(vmm, process.identity())
        .map_err(|e| server(&files, "give it the VM's cores", e))?;
    let (input, output) = pipes.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
    Ok(Starting {
        process: Arc::new(process),
        input,
        output,
        socket,
        files,
    })
}

impl Starting {
    pub fn process(&self) -> &Arc<VmmProcess> {
        &self.process
    }

    /// Sends the configuration and waits until the file server serves. After an error, the process has been killed.
    pub async fn serve(self) -> Result<(), ShareError> {
        let process = Arc::clone(&self.process);
        let served = faults::around(Step::ServeFiles, self.serve_steps()).await;
        if served.is_err() {
            process.kill();
            process.ended().await;
        }
        served
    }

    async fn serve_steps(self) -> Result<(), ShareError> {
        let Self {
            mut input,
            output,
            socket,
            files,
            ..
        } = self;
        let failed = |step| {
            let files = &files;
            move |source| server(files, step, source)
        };
        let config = ShareConfig {
            socket_fd: SOCKET_FD,
        };
        let text = serde_json::to_vec(&config).map_err(io::Error::other);
        // The text is far shorter than a pipe's capacity, so this does not block.
        let given = text.and_then(|text| input.write_all(&text));
        given.map_err(failed("send it the configuration"))?;
        drop(input);
        let output = tokio::process::ChildStdout::from_std(output);
        let mut output = output.map_err(failed("read its output"))?;
        let mut word = [0; READY.len()];
        let heard = tokio::time::timeout(READY_TIMEOUT, output.read_exact(&mut word)).await;
        match heard {
            Ok(Ok(_)) if word == READY => {}
            Ok(Ok(_)) => return Err(failed("its answer")(io::ErrorKind::InvalidData.into())),
            Ok(Err(e)) => return Err(failed("it ended before it was ready")(e)),
            Err(_) => return Err(failed("wait for it")(io::ErrorKind::TimedOut.into())),
        }
        Ok(control::connect_files(&files.control(), OwnedFd::from(socket)).await?)
    }
}

fn server(files: &Files, step: &'static str, source: io::Error) -> ShareError {
    let said = match last_lines(&files.share_log(), LAST_LINES) {
        said if said.is_empty() => said,
        said => format!(" (it said: {said})"),
    };
    ShareError::Server { step, source, said }
}
