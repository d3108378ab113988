// SPDX-License-Identifier: Apache-2.0
//! `bulkhead run`: runs one container in its own pod, prints its output, and removes the pod afterwards.
//!
//! ```text
//! pull ─> RunPodSandbox ─> CreateContainer ─> StartContainer ─> log until it ends ─> StopPodSandbox, RemovePodSandbox
//!              └────────────── an error, Ctrl-C or SIGTERM ──────────────────────────────────^
//! ```

use std::path::Path;
use std::time::Duration;

use bulkhead_proto::cri;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::client::{Client, failed, image_spec};
use super::logs::LogReader;
use super::{CliError, exit_code, pull};
use crate::cri::{MASKED_PATHS, READONLY_PATHS};

const CONTAINER: &str = "main";
const LOG: &str = "main.log";
/// Shells report a command that was ended by a signal as this plus the signal's number.
const BY_SIGNAL: u8 = 128;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The pod's name and hostname [default: run- and the process id].
    #[arg(long)]
    name: Option<String>,
    /// Set an environment variable.
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The directory that the command starts in.
    #[arg(short, long, default_value = "")]
    workdir: String,
    /// The user that the command runs as, by number.
    #[arg(short, long)]
    user: Option<i64>,
    /// The most memory that the container may use, in MiB.
    #[arg(short, long, value_name = "MIB", value_parser = clap::value_parser!(i64).range(4..=1 << 20))]
    memory: Option<i64>,
    /// Print on standard error how long each step took.
    #[arg(long)]
    timing: bool,
    image: String,
    /// The command and its arguments [default: the image's].
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs a container until it ends, and returns its exit code.
pub async fn run(client: &Client, arguments: Arguments) -> Result<u8, CliError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Signals)?;
    let logs = tempfile::Builder::new()
        .prefix("bulkhead-run-")
        .tempdir()
        .map_err(|source| CliError::File {
            operation: "make a directory for logs in",
            path: std::env::temp_dir(),
            source,
        })?;
    let mut run = Run {
        pod: pod_config(&arguments, logs.path()),
        container: container_config(&arguments)?,
        client: client.clone(),
        timing: arguments.timing,
    };
    let ended = tokio::select! {
        ended = run.live(logs.path()) => ended,
        () = received(&mut interrupt) => Ok(BY_SIGNAL + 2),
        () = received(&mut terminate) => Ok(BY_SIGNAL + 15),
    };
    let removed = run.remove().await;
    let code = ended?;
    removed?;
    Ok(code)
}

async fn received(signal: &mut Signal) {
    if signal.recv().await.is_none() {
        std::future::pending().await
    }
}

struct Run {
    client: Client,
    pod: cri::PodSandboxConfig,
    container: cri::ContainerConfig,
    timing: bool,
}

impl Run {
    /// Makes the pod and its container, and follows the log until the container ends. Returns its exit code. The caller
    /// removes the pod.
    async fn live(&mut self, logs: &Path) -> Result<u8, CliError> {
        self.image().await?;
        let request = cri::RunPodSandboxRequest {
            config: Some(self.pod.clone()),
            runtime_handler: String::new(),
        };
        let clock = Clock::start(self.timing);
        let pod = self
            .client
            .runtime
            .run_pod_sandbox(request)
            .await
            .map_err(failed("run pod"))?;
        clock.stop("pod ready");
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.into_inner().pod_sandbox_id,
            config: Some(self.container.clone()),
            sandbox_config: Some(self.pod.clone()),
        };
        let clock = Clock::start(self.timing);
        let created = self.client.runtime.create_container(request).await;
        let id = created
            .map_err(failed("create container"))?
            .into_inner()
            .container_id;
        clock.stop("container created");
        let clock = Clock::start(self.timing);
        let request = cri::StartContainerRequest {
            container_id: id.clone(),
        };
        if let Err(status) = self.client.runtime.start_container(request).await {
            return self.not_started(&id, status).await;
        }
        clock.stop("container started");
        let clock = Clock::start(self.timing);
        let status = LogReader::new(logs.join(LOG))
            .follow(&mut self.client, &id)
            .await?;
        clock.stop("container ended");
        if !matches!(status.reason.as_str(), "" | "Completed" | "Error") {
            let said = [status.reason, status.message];
            let said: Vec<_> = said
                .iter()
                .filter(|text| !text.is_empty())
                .map(String::as_str)
                .collect();
            eprintln!("bulkhead: {}", said.join(": "));
        }
        Ok(exit_code(status.exit_code))
    }

    /// Reports a container that could not be started. Returns the exit code for that.
    async fn not_started(&mut self, id: &str, error: tonic::Status) -> Result<u8, CliError> {
        let status = self.client.container(id).await?;
        let error = failed("start container")(error);
        if status.state() != cri::ContainerState::ContainerExited {
            return Err(error);
        }
        eprintln!("bulkhead: {error}");
        Ok(start_failure_code(&status.message).unwrap_or_else(|| exit_code(status.exit_code)))
    }

    /// Pulls the image if it is missing.
    async fn image(&mut self) -> Result<(), CliError> {
        let image = self.container.image.clone().unwrap_or_default().image;
        let request = cri::ImageStatusRequest {
            image: Some(image_spec(&image)),
            verbose: false,
        };
        let found = self
            .client
            .images
            .image_status(request)
            .await
            .map_err(failed("look for the image"))?;
        if found.into_inner().image.is_some() {
            return Ok(());
        }
        let clock = Clock::start(self.timing);
        pull::pull(&self.client, &image).await?;
        clock.stop("image pulled");
        Ok(())
    }

    /// Stops and removes the pod. It is found by its label, because after an interrupted RunPodSandbox its id is not
    /// known.
    async fn remove(&mut self) -> Result<(), CliError> {
        let clock = Clock::start(self.timing);
        let filter = cri::PodSandboxFilter {
            label_selector: self.pod.labels.clone(),
            ..Default::default()
        };
        let request = cri::ListPodSandboxRequest {
            filter: Some(filter),
        };
        let pods = self
            .client
            .runtime
            .list_pod_sandbox(request)
            .await
            .map_err(failed("look for the pod"))?;
        for pod in pods.into_inner().items {
            let stop = cri::StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            self.client
                .runtime
                .stop_pod_sandbox(stop)
                .await
                .map_err(failed("stop pod"))?;
            let remove = cri::RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
            };
            self.client
                .runtime
                .remove_pod_sandbox(remove)
                .await
                .map_err(failed("remove pod"))?;
            clock.stop("pod removed");
        }
        Ok(())
    }
}

/// Prints how long a step took, if `--timing` was given.
struct Clock(Option<std::time::Instant>);

impl Clock {
    fn start(wanted: bool) -> Self {
        Self(wanted.then(std::time::Instant::now))
    }

    fn stop(&self, step: &str) {
        if let Some(started) = self.0 {
            let elapsed: Duration = started.elapsed();
            eprintln!("{step}: {} ms", elapsed.as_millis());
        }
    }
}

fn pod_config(arguments: &Arguments, logs: &Path) -> cri::PodSandboxConfig {
    let own = format!("run-{}", std::process::id());
    let name = arguments.name.clone().unwrap_or_else(|| own.clone());
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.clone(),
            uid: own.clone(),
            namespace: "bulkhead-run".to_owned(),
            attempt: 0,
        }),
        hostname: name,
        log_directory: logs.display().to_string(),
        labels: [("bulkhead.run".to_owned(), own)].into(),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(own_processes()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A PID namespace for the container alone, so that the command is process 1 in it.
fn own_processes() -> cri::NamespaceOption {
    cri::NamespaceOption {
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    }
}

fn container_config(arguments: &Arguments) -> Result<cri::ContainerConfig, CliError> {
    let variable = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok(cri::KeyValue {
            key: name.to_owned(),
            value: value.into(),
        }),
        _ => Err(CliError::Environment(text.clone())),
    };
    Ok(cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: CONTAINER.to_owned(),
            attempt: 0,
        }),
        image: Some(image_spec(&arguments.image)),
        // As in docker: the command replaces the image's arguments, and the image's entrypoint stays.
        args: arguments.command.clone(),
        envs: arguments
            .env
            .iter()
            .map(variable)
            .collect::<Result<_, _>>()?,
        working_dir: arguments.workdir.clone(),
        log_path: LOG.to_owned(),
        linux: Some(cri::LinuxContainerConfig {
            resources: arguments.memory.map(|mib| cri::LinuxContainerResources {
                memory_limit_in_bytes: mib << 20,
                ..Default::default()
            }),
            security_context: Some(cri::LinuxContainerSecurityContext {
                namespace_options: Some(own_processes()),
                run_as_user: arguments.user.map(|value| cri::Int64Value { value }),
                // In CRI, what is not set is not restricted. So set what kubelet sets.
                masked_paths: MASKED_PATHS.map(str::to_owned).to_vec(),
                readonly_paths: READONLY_PATHS.map(str::to_owned).to_vec(),
                seccomp: Some(cri::SecurityProfile {
                    profile_type: cri::security_profile::ProfileType::RuntimeDefault.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }),
        ..Default::default()
    })
}

/// The exit code that a shell has for a command that it cannot run: 127 if there is none, 126 if it is not executable.
/// CRI has one code for all failed starts, so the reason is in the message only.
fn start_failure_code(message: &str) -> Option<u8> {
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if says(&["executable file not found", "no such file or directory"]) {
        return Some(127);
    }
    says(&["permission denied", "is a directory", "exec format error"]).then_some(126)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(words: &[&str]) -> Arguments {
        let words = ["run"].iter().chain(words);
        <Line as clap::Parser>::try_parse_from(words)
            .unwrap()
            .arguments
    }

    #[test]
    fn what_follows_the_image_is_the_commands() {
        let arguments = parse(&["-e", "A=b=c", "busybox", "ls", "-l", "--name", "x"]);
        assert_eq!(arguments.command, ["ls", "-l", "--name", "x"]);
        assert_eq!(arguments.name, None);
        let config = container_config(&arguments).unwrap();
        assert_eq!(config.envs[0].value, b"b=c");
        assert_eq!(config.args.len(), 4);
    }

    #[test]
    fn a_command_that_cannot_run_gives_a_shells_exit_code() {
        for (message, code) in [
            (
                "exec: \"x\": executable file not found in $PATH: unknown",
                Some(127),
            ),
            (
                "exec: \"/x\": stat /x: no such file or directory: unknown",
                Some(127),
            ),
            ("exec: \"/x\": permission denied: unknown", Some(126)),
            ("exec: \"/\": is a directory: unknown", Some(126)),
            ("exec: \"/x\": exec format error: unknown", Some(126)),
            ("set limit \"RLIMIT_NOFILE\": Operation not permitted", None),
        ] {
            assert_eq!(start_failure_code(message), code, "{message}");
        }
    }

    #[test]
    fn a_variable_without_a_value_is_named() {
        let error = container_config(&parse(&["-e", "oops", "busybox"])).unwrap_err();
        assert!(error.to_string().contains("\"oops\""), "{error}");
    }
}
