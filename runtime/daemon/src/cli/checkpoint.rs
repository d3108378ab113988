// SPDX-License-Identifier: Apache-2.0
//! `bulkhead checkpoint` and `bulkhead restore`: save a running pod into a directory, and bring one back from there.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_proto::cri;
use tonic::Request;

use super::CliError;
use super::client::{Client, failed};
use crate::cri::{FROM_CHECKPOINT, SETTINGS};
use crate::random::new_id;

/// How long either may take.
pub const LIMIT: Duration = Duration::from_secs(600);
/// How many digits make the default name of a pod that is brought back.
const NAME_DIGITS: usize = 8;

#[derive(Debug, clap::Args)]
pub struct RestoreArguments {
    /// The new pod's name [default: restored- and some digits].
    #[arg(long)]
    name: Option<String>,
    /// The new pod's Kubernetes namespace.
    #[arg(long, default_value = "default")]
    namespace: String,
    /// A directory for the logs of its containers [default: they have none].
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Do not start the containers.
    #[arg(long)]
    created: bool,
    /// What `bulkhead checkpoint` wrote. It is not changed.
    directory: PathBuf,
}

/// Saves a pod. The directory is made if it is not there.
pub async fn save(client: &mut Client, pod: &str, directory: &Path) -> Result<(), CliError> {
    let output_path = made(directory)?;
    let (pod, running) = running(client, pod).await?;
    let mut request = Request::new(cri::CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        output_path,
        container_ids: running.into_iter().map(|one| one.id).collect(),
        ..Default::default()
    });
    request.set_timeout(LIMIT);
    let saved = client.runtime.checkpoint_pod(request).await;
    saved.map_err(failed(format!("save pod {}", pod.id)))?;
    Ok(())
}

/// A pod, found by its id or a unique prefix of it, and its containers that run.
pub async fn running(
    client: &mut Client,
    pod: &str,
) -> Result<(cri::PodSandboxStatus, Vec<cri::ContainerStatus>), CliError> {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.to_owned(),
        verbose: false,
    };
    let status = client.runtime.pod_sandbox_status(request).await;
    let status = status.map_err(failed(format!("pod {pod}")))?.into_inner();
    let mut containers = status.containers_statuses;
    let is_running = i32::from(cri::ContainerState::ContainerRunning);
    containers.retain(|one| one.state == is_running);
    Ok((status.status.unwrap_or_default(), containers))
}

/// Brings a pod back, and lets its containers go on. Prints the ids.
pub async fn restore(client: &mut Client, arguments: RestoreArguments) -> Result<(), CliError> {
    let uid = new_id();
    let digits = uid.get(..NAME_DIGITS).unwrap_or(&uid);
    let name = arguments.name.unwrap_or(format!("restored-{digits}"));
    let checkpoint_path = absolute(&arguments.directory)?;
    let log_directory = match &arguments.logs {
        Some(logs) => made(logs)?,
        None => String::new(),
    };
    let mut request = Request::new(cri::RestorePodRequest {
        checkpoint_path,
        config: Some(cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name,
                uid: uid.clone(),
                namespace: arguments.namespace,
                attempt: 0,
            }),
            log_directory,
            ..Default::default()
        }),
        options: [(SETTINGS.to_owned(), FROM_CHECKPOINT.to_owned())].into(),
        ..Default::default()
    });
    request.set_timeout(LIMIT);
    let restored = client.runtime.restore_pod(request).await;
    let what = format!("bring back {}", arguments.directory.display());
    let restored = restored.map_err(failed(what))?.into_inner();
    println!("{}", restored.pod_sandbox_id);
    for container in restored.restored_containers {
        if !arguments.created {
            let request = cri::StartContainerRequest {
                container_id: container.container_id.clone(),
            };
            let started = client.runtime.start_container(request).await;
            started.map_err(failed(format!("start container {}", container.name)))?;
        }
        println!("{} {}", container.container_id, container.name);
    }
    Ok(())
}

/// A directory that only its owner may enter, made if it is not there; as text, for CRI.
fn made(directory: &Path) -> Result<String, CliError> {
    let mut builder = DirBuilder::new();
    let made = match builder.recursive(true).mode(0o700).create(directory) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    };
    made.map_err(|source| CliError::File {
        operation: "make the directory",
        path: directory.to_owned(),
        source,
    })?;
    absolute(directory)
}

fn absolute(path: &Path) -> Result<String, CliError> {
    let found = path.canonicalize();
    let found = found.map_err(|source| CliError::File {
        operation: "find",
        path: path.to_owned(),
        source,
    })?;
    Ok(found.to_string_lossy().into_owned())
}
