// SPDX-License-Identifier: Apache-2.0
//! The commands for people without crictl. They use only CRI, over the daemon's socket.

mod checkpoint;
mod client;
mod exec;
mod list;
mod logs;
mod pull;
mod run;
mod templates;
mod warm;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use bulkhead_text::chain;

pub(crate) use client::Client;
pub(crate) use templates::ask as ask_for_templates;

/// The exit code if the command itself failed, as in `docker run` and `podman run`.
const OUR_FAILURE: u8 = 125;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Pull an image if it is missing, run a command in a pod of its own, remove the pod.
    Run(run::Arguments),
    /// List pods and their containers.
    Ps {
        /// Also show containers that have ended and pods that are not ready.
        #[arg(short, long)]
        all: bool,
    },
    /// List images.
    Images,
    /// List what VMs are forked from, and say how many were.
    Templates,
    /// Save a running pod into a directory. The pod goes on.
    Checkpoint {
        /// The pod's id, or a unique prefix of it.
        pod: String,
        /// Made if it is not there; must be empty.
        directory: PathBuf,
    },
    /// Bring back a pod that was saved, under a new name, and let its containers go on where they were.
    Restore(checkpoint::RestoreArguments),
    /// Save a running pod as which new pods of its namespace can begin: those with the annotation bulkhead.dev/warmed.
    Warm(warm::Arguments),
    /// Pull an image.
    Pull { image: String },
    /// Print what a container has written.
    Logs {
        /// The container's id, or a unique prefix of it.
        container: String,
        /// Follow the log until the container ends.
        #[arg(short, long)]
        follow: bool,
    },
    /// Run a command in a container; its output is printed when it has ended.
    Exec {
        /// Kill the command after this many seconds; 0 means no limit.
        #[arg(long, default_value_t = 0)]
        timeout: i64,
        /// The container's id, or a unique prefix of it.
        container: String,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(
        "no daemon answers on {socket}: start `bulkhead serve`, or name its socket with --socket"
    )]
    Connect {
        socket: PathBuf,
        source: tonic::transport::Error,
    },
    #[error("{what}: {message}")]
    Call { what: String, message: String },
    #[error("{operation} {path}")]
    File {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("write the output")]
    Output(#[source] io::Error),
    #[error("the daemon keeps no warmed pods: set sandbox.warmed to a directory")]
    NoneWarmed,
    #[error("{what} is {value:?}, which is no DNS label")]
    NoLabel { what: &'static str, value: String },
    #[error("no running container of the pod {0}: name one with --container")]
    NoContainer(String),
    #[error("container {container} was not ready after {limit:?}; the command said last: {said}")]
    NotReady {
        container: String,
        limit: Duration,
        said: String,
    },
    #[error("container {0} has no log")]
    NoLog(String),
    #[error("--env {0:?} is not NAME=VALUE")]
    Environment(String),
    #[error("wait for signals")]
    Signals(#[source] io::Error),
}

/// Runs one command against the daemon behind `socket`.
pub async fn execute(command: Command, socket: &Path) -> ExitCode {
    let failure = match command {
        Command::Run(_) | Command::Exec { .. } => OUR_FAILURE,
        _ => 1,
    };
    match dispatch(command, socket).await {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("bulkhead: {}", chain(&e));
            ExitCode::from(failure)
        }
    }
}

/// Runs the command. Returns the container's exit code if there is one.
async fn dispatch(command: Command, socket: &Path) -> Result<u8, CliError> {
    let mut client = Client::connect(socket).await?;
    match command {
        Command::Run(arguments) => return run::run(&client, arguments).await,
        Command::Exec {
            timeout,
            container,
            command,
        } => return exec::exec(&mut client, container, command, timeout).await,
        Command::Ps { all } => list::pods(&mut client, all).await?,
        Command::Images => list::images(&mut client).await?,
        Command::Templates => templates::print(&mut client).await?,
        Command::Checkpoint { pod, directory } => {
            checkpoint::save(&mut client, &pod, &directory).await?;
        }
        Command::Restore(arguments) => checkpoint::restore(&mut client, arguments).await?,
        Command::Warm(arguments) => warm::save(&mut client, arguments).await?,
        Command::Pull { image } => println!("{}", pull::pull(&client, &image).await?),
        Command::Logs { container, follow } => logs::print(&mut client, &container, follow).await?,
    }
    Ok(0)
}

/// Converts a container's exit code to that of a process.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(OUR_FAILURE)
}
