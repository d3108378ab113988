// SPDX-License-Identifier: Apache-2.0
//! `bulkhead`: the daemon and the commands for people without crictl.
//!
//! All of it is this library, so that fuzz targets can reach the parsers in it (`fuzzing`, with the feature of that
//! name). Its other user is the program in `main.rs`.

#![forbid(unsafe_code)]

mod callers;
mod check;
mod cli;
mod clock;
mod config;
mod cri;
mod descriptors;
mod endpoint;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod intact;
mod logs;
mod modes;
mod notify;
mod pod;
mod random;
mod scratch;
mod serve;
mod store;
mod streaming;

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_text::chain;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::notify::Notifier;

#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version,
    about = "A Kubernetes container runtime: every pod in its own microVM"
)]
struct Arguments {
    /// The daemon's socket, for the commands that connect to it.
    #[arg(long, global = true, env = "BULKHEAD_SOCKET", default_value = config::DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve CRI until SIGTERM. Pods keep running, and the next daemon takes them over.
    Serve {
        /// The configuration file [default: /etc/bulkhead/config.toml, if it exists].
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Check whether this machine can run pods, and tell what to do if not; or whether a VM that runs is kept in.
    Check {
        /// Check the processes of this pod's VM instead: the pod's id, or a unique prefix of it. The daemon must run.
        #[arg(long, value_name = "POD", conflicts_with = "config")]
        vm: Option<String>,
        /// The configuration file [default: /etc/bulkhead/config.toml, if it exists].
        #[arg(long)]
        config: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the points at which a test can kill this program or make it fail.
    #[cfg(feature = "faults")]
    Faults,
    /// Check a file of records. The daemon runs this at its start.
    #[command(name = intact::COMMAND, hide = true)]
    CheckRecords { path: PathBuf },
    #[command(flatten)]
    Client(cli::Command),
}

/// The whole program.
#[tokio::main(worker_threads = 2)]
pub async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Command::Serve { config } => serve(config).await,
        Command::Check {
            vm: Some(pod),
            json,
            ..
        } => match check::vm::run(&arguments.socket, &pod, json).await {
            Ok(code) => code,
            Err(e) => fail(&e),
        },
        Command::Check { config, json, .. } => match Config::load(config.as_deref()) {
            Ok(config) => check::run(&config, json).await,
            Err(e) => fail(&e),
        },
        #[cfg(feature = "faults")]
        Command::Faults => {
            bulkhead_faults::all().for_each(|point| println!("{point}"));
            ExitCode::SUCCESS
        }
        Command::CheckRecords { path } => intact::check_here(&path),
        Command::Client(command) => cli::execute(command, &arguments.socket).await,
    }
}

async fn serve(config: Option<PathBuf>) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    descriptors::raise_limit();
    #[cfg(feature = "faults")]
    if let Some(directory) = std::env::var_os("BULKHEAD_FAULTS") {
        bulkhead_faults::arm(directory.into());
    }
    let config = match Config::load(config.as_deref()) {
        Ok(config) => config,
        Err(e) => return fail(&e),
    };
    let variable = |name| std::env::var(name).ok();
    let notifier = Notifier::new(
        std::env::var_os("NOTIFY_SOCKET"),
        variable("WATCHDOG_USEC").as_deref(),
        variable("WATCHDOG_PID").as_deref(),
    );
    match serve::run(config, notifier).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("bulkhead: {}", chain(error));
    ExitCode::FAILURE
}
