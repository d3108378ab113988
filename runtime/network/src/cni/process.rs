// SPDX-License-Identifier: Apache-2.0
//! Runs one plugin, in its own process group, with a time limit and a limit on its output.
//!
//! A plugin that hangs, or that writes without end, is killed with all its children.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::sys::set_usual_umask;

/// The most bytes of a plugin's output that are read.
pub const OUTPUT_BYTES: u64 = 1 << 20;
/// How much of a plugin's standard error is kept. The rest is read and discarded.
const COMPLAINT_BYTES: usize = 4096;
/// How long a killed plugin may take to end.
const GONE: Duration = Duration::from_secs(1);

/// How a plugin ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// Its whole standard output.
    pub output: Vec<u8>,
    /// The beginning of its standard error.
    pub complaint: Vec<u8>,
}

/// Why a plugin did not end by itself.
#[derive(Debug)]
pub enum Broken {
    /// It took longer than its time limit.
    Late,
    /// It wrote more than [`OUTPUT_BYTES`].
    Endless,
    Io(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Runs `program` with `input` on standard input.
pub async fn run(
    program: &Path,
    environment: &[(&'static str, OsString)],
    input: &[u8],
    limit: Duration,
) -> Result<Ended, Broken> {
    let mut command = Command::new(program);
    command
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    set_usual_umask(&mut command);
    let mut child = command.spawn()?;
    let mut group = Group::of(&child);
    let ended = tokio::time::timeout(limit, talk(&mut child, input)).await;
    match ended {
        Ok(Ok(ended)) => {
            group.0 = None;
            Ok(ended)
        }
        Ok(Err(broken)) => {
            group.kill();
            let _ = tokio::time::timeout(GONE, child.wait()).await;
            Err(broken)
        }
        Err(_) => {
            group.kill();
            let _ = tokio::time::timeout(GONE, child.wait()).await;
            Err(Broken::Late)
        }
    }
}

/// A process group. Dropping this kills the group, unless its leader has ended by itself. As long as the leader was not
/// waited for, the group's number cannot be reused.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Self(id.map(Pid::from_raw))
    }

    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // It fails if no process is left.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Writes the input, reads the output, and then waits for the plugin. The wait comes last, because the process group
/// can be killed safely only before it.
async fn talk(child: &mut Child, input: &[u8]) -> Result<Ended, Broken> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // A plugin need not read all its input, so an error here is ignored. Its output matters.
            let _ = stdin.write_all(input).await;
        }
        Ok(())
    };
    let read = async {
        match stdout {
            Some(stdout) => all(stdout).await,
            None => Ok(Vec::new()),
        }
    };
    let listen = async {
        match stderr {
            Some(stderr) => Ok(beginning(stderr).await?),
            None => Ok(Vec::new()),
        }
    };
    let ((), output, complaint) = tokio::try_join!(write, read, listen)?;
    Ok(Ended {
        status: child.wait().await?,
        output,
        complaint,
    })
}

async fn all(stream: impl AsyncRead + Unpin) -> Result<Vec<u8>, Broken> {
    let mut bytes = Vec::new();
    let most = OUTPUT_BYTES.saturating_add(1);
    let read = stream.take(most).read_to_end(&mut bytes).await?;
    if u64::try_from(read).is_ok_and(|read| read < most) {
        Ok(bytes)
    } else {
        Err(Broken::Endless)
    }
}

async fn beginning(mut stream: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(kept);
        }
        let room = COMPLAINT_BYTES.saturating_sub(kept.len());
        kept.extend(buffer.iter().take(read.min(room)));
    }
}
