// SPDX-License-Identifier: Apache-2.0
//! RPCs about pods.

use std::collections::HashMap;

use bulkhead_proto::cri;
use tonic::Status;

use super::{filter, limits, parse, show};
use crate::clock::now;
use crate::pod::admission::Patience;
use crate::pod::life::state::PodState;
use crate::pod::readings::vmm_counters;
use crate::pod::{Pods, View};

pub async fn run(
    pods: &Pods,
    request: cri::RunPodSandboxRequest,
    patience: Patience,
) -> Result<cri::RunPodSandboxResponse, Status> {
    let spec = parse::pod(request.config, request.runtime_handler)?;
    let pod_sandbox_id = pods.run(spec, patience).await?;
    Ok(cri::RunPodSandboxResponse { pod_sandbox_id })
}

pub async fn status(
    pods: &Pods,
    request: cri::PodSandboxStatusRequest,
) -> Result<cri::PodSandboxStatusResponse, Status> {
    let view = pods.pod(&request.pod_sandbox_id)?;
    let info = if request.verbose {
        HashMap::from([("info".to_owned(), info(pods, &view).await)])
    } else {
        HashMap::new()
    };
    Ok(cri::PodSandboxStatusResponse {
        status: Some(show::pod_status(&view.pod)),
        info,
        containers_statuses: show::container_statuses(&view),
        timestamp: now(),
    })
}

/// What `crictl inspectp` shows in addition to the status.
async fn info(pods: &Pods, view: &View) -> String {
    let statistics = vmm_counters(view).await;
    let cause = match &view.pod.state {
        PodState::NotReady { cause } => Some(cause),
        _ => None,
    };
    serde_json::json!({
        "pid": view.pod.vmm().map(|identity| identity.pid),
        "fileServer": view.pod.file_server().map(|identity| identity.pid),
        "daemon": std::process::id(),
        "user": view.pod.user(),
        "runDirectory": view.pod.run_directory(),
        "stateDirectory": view.pod.state_directory(),
        "modules": pods.launcher().modules,
        "cause": cause,
        "vm": view.pod.size,
        "cgroup": view.pod.cgroup(),
        "layers": view.pod.layers,
        "blockDevices": view.pod.blocks.iter().map(|one| one.device).collect::<Vec<_>>(),
        "vmm": statistics,
        "network": view.pod.network().map(|record| pods.describe_network(record)),
        "spec": view.pod.spec,
    })
    .to_string()
}

pub fn list(pods: &Pods, filter: Option<&cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
    let views = pods.all();
    let wanted = views.iter().filter(|view| filter::pod(filter, &view.pod));
    wanted.map(|view| show::pod(&view.pod)).collect()
}

/// Changes the pod's resources. Fields that are not set stay unchanged.
pub async fn update(
    pods: &Pods,
    request: cri::UpdatePodSandboxResourcesRequest,
) -> Result<(), Status> {
    let resources = request.resources.map(limits::resources).unwrap_or_default();
    let overhead = request.overhead.map(limits::resources).unwrap_or_default();
    Ok(pods
        .resize(&request.pod_sandbox_id, resources, overhead)
        .await?)
}
