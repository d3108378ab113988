// SPDX-License-Identifier: Apache-2.0
//! RPCs that save pods and bring them back. `RestorePod` has one option, for callers that do not have the settings of what
//! was saved: [`SETTINGS`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bulkhead_cdi::Directories;
use bulkhead_proto::cri;
use tonic::Status;

use super::refusal::{ParseError, wrong};
use super::{parse, parse_cdi, parse_security};
use crate::pod::admission::Patience;
use crate::pod::checkpoint::{Manifest, Saved};
use crate::pod::life::spec::{ContainerSpec, PodLimits, PodSpec};
use crate::pod::{CheckpointError, Pods};

/// The option of `RestorePod` that says where settings come from. With [`FROM_CHECKPOINT`] they are those of the pod that was
/// saved, but for names, uid, labels, annotations, log directory and cgroup; `container_configs` must be empty.
pub const SETTINGS: &str = "settings";
pub const FROM_CHECKPOINT: &str = "checkpoint";

pub async fn save(
    pods: &Pods,
    request: cri::CheckpointPodRequest,
    patience: Patience,
) -> Result<cri::CheckpointPodResponse, Status> {
    if let Some(option) = request.options.keys().min() {
        return Err(wrong("checkpoint option", option).into());
    }
    let directory = PathBuf::from(request.output_path);
    let saved = pods.checkpoint(
        &request.pod_sandbox_id,
        directory,
        request.container_ids,
        patience,
    );
    saved.await?;
    Ok(cri::CheckpointPodResponse {})
}

pub async fn restore(
    pods: &Pods,
    cdi: &Directories,
    request: cri::RestorePodRequest,
    patience: Patience,
) -> Result<cri::RestorePodResponse, Status> {
    let keeps_settings = keeps_settings(&request.options)?;
    let mut spec = parse::pod(request.config, request.runtime_handler)?;
    let wanted = request.container_configs;
    if keeps_settings != wanted.is_empty() {
        let what = "number of container_configs (one for each saved container, or none with the option `settings`)";
        return Err(wrong(what, wanted.len()).into());
    }
    let path = PathBuf::from(request.checkpoint_path);
    let saved = tokio::task::spawn_blocking(move || Saved::open(Path::new(&path))).await;
    let saved = saved.map_err(|_| CheckpointError::Panicked);
    let saved = saved.flatten().map_err(crate::pod::PodError::from)?;
    let containers = if keeps_settings {
        spec = as_saved(spec, &saved.manifest);
        let saved = saved.manifest.containers.iter();
        saved.map(|one| one.spec.clone()).collect()
    } else {
        let parse = |config| container(&spec, config, cdi);
        tokio::task::block_in_place(|| wanted.into_iter().map(parse).collect::<Result<_, _>>())?
    };
    let (pod_sandbox_id, containers) = pods.restore(saved, spec, containers, patience).await?;
    let restored = |(name, container_id)| cri::RestoredContainer { name, container_id };
    Ok(cri::RestorePodResponse {
        pod_sandbox_id,
        restored_containers: containers.into_iter().map(restored).collect(),
    })
}

/// Whether the settings are those of the checkpoint.
fn keeps_settings(options: &HashMap<String, String>) -> Result<bool, ParseError> {
    let mut keeps = false;
    for (key, value) in options {
        match (key.as_str(), value.as_str()) {
            (SETTINGS, FROM_CHECKPOINT) => keeps = true,
            (SETTINGS, value) => return Err(wrong("restore option settings", value)),
            (key, _) => return Err(wrong("restore option", key)),
        }
    }
    Ok(keeps)
}

/// The settings of the saved pod, with the new pod's name and place.
fn as_saved(spec: PodSpec, manifest: &Manifest) -> PodSpec {
    let saved = manifest.pod.spec.clone();
    PodSpec {
        name: spec.name,
        log_directory: spec.log_directory,
        labels: spec.labels,
        annotations: spec.annotations,
        runtime_handler: spec.runtime_handler,
        limits: PodLimits {
            cgroup_parent: spec.limits.cgroup_parent,
            ..saved.limits
        },
        ..saved
    }
}

/// Reads a container's settings as `CreateContainer` does.
fn container(
    pod: &PodSpec,
    config: cri::ContainerConfig,
    cdi: &Directories,
) -> Result<ContainerSpec, ParseError> {
    let mut spec = parse::container(Some(config))?;
    parse_cdi::add(&mut spec, pod.users, cdi)?;
    parse_security::check_privileged(pod, &spec)?;
    parse_security::check_users(pod, &spec)?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_is_not_known_is_refused_by_its_name() {
        let options = |pairs: &[(&str, &str)]| {
            let owned = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
            pairs.iter().map(owned).collect::<HashMap<_, _>>()
        };
        assert!(!keeps_settings(&options(&[])).unwrap());
        assert!(keeps_settings(&options(&[(SETTINGS, FROM_CHECKPOINT)])).unwrap());
        for (pairs, expected) in [
            ([("compress", "yes")], "\"compress\""),
            ([(SETTINGS, "mine")], "\"mine\""),
        ] {
            let said = keeps_settings(&options(&pairs)).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
    }
}
