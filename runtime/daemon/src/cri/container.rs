// SPDX-License-Identifier: Apache-2.0
//! RPCs about containers.

use std::collections::HashMap;
use std::time::Duration;

use bulkhead_cdi::Directories;
use bulkhead_proto::cri;
use tonic::Status;

use super::{filter, limits, parse, parse_cdi, parse_security, show};
use crate::pod::{Notice, NoticeKind, Pods};

/// The upper limit of a timeout or grace period. kubelet's are far below.
const LONGEST_GRACE: Duration = Duration::from_secs(24 * 3600);

pub async fn create(
    pods: &Pods,
    cdi: &Directories,
    request: cri::CreateContainerRequest,
) -> Result<cri::CreateContainerResponse, Status> {
    let mut spec = parse::container(request.config)?;
    let pod = pods.pod(&request.pod_sandbox_id)?;
    tokio::task::block_in_place(|| parse_cdi::add(&mut spec, pod.pod.spec.users, cdi))?;
    parse_security::check_privileged(&pod.pod.spec, &spec)?;
    parse_security::check_users(&pod.pod.spec, &spec)?;
    let container_id = pods.create_container(&request.pod_sandbox_id, spec).await?;
    Ok(cri::CreateContainerResponse { container_id })
}

/// Converts a timeout of CRI, in seconds. A negative one counts as 0.
pub fn seconds(timeout: i64) -> Duration {
    Duration::from_secs(u64::try_from(timeout).unwrap_or(0)).min(LONGEST_GRACE)
}

pub fn status(
    pods: &Pods,
    request: &cri::ContainerStatusRequest,
) -> Result<cri::ContainerStatusResponse, Status> {
    let (view, record) = pods.container(&request.container_id)?;
    let mut info = HashMap::new();
    if request.verbose {
        let pid = match record.state {
            crate::pod::life::state::ContainerState::Running { pid, .. } => pid,
            _ => 0,
        };
        let mut details = serde_json::json!({
            "sandboxID": view.pod.id,
            // Tools expect a process of the host here. The only one is the pod's VMM.
            "pid": view.pod.vmm().map(|identity| identity.pid),
            "guestPid": pid,
            "spec": record.spec,
        });
        // Values are bytes, and JSON would show them as lists of numbers.
        let variable = |(name, value): &(String, Vec<u8>)| {
            format!("{name}={}", String::from_utf8_lossy(value))
        };
        let environment: Vec<_> = record.spec.environment.iter().map(variable).collect();
        if let Some(spec) = details.get_mut("spec") {
            spec["environment"] = environment.into();
        }
        info.insert("info".to_owned(), details.to_string());
    }
    Ok(cri::ContainerStatusResponse {
        status: Some(show::container_status(&record)),
        info,
    })
}

pub fn list(pods: &Pods, filter: Option<&cri::ContainerFilter>) -> Vec<cri::Container> {
    let views = pods.all();
    let all = views.iter().flat_map(|view| view.containers.values());
    let mut wanted: Vec<_> = all.filter(|one| filter::container(filter, one)).collect();
    wanted.sort_by_key(|one| one.created_at);
    wanted.into_iter().map(show::container).collect()
}

pub async fn update(
    pods: &Pods,
    request: cri::UpdateContainerResourcesRequest,
) -> Result<(), Status> {
    let change = request.linux.map(limits::resources).unwrap_or_default();
    Ok(pods.update_container(&request.container_id, change).await?)
}

pub async fn exec_sync(
    pods: &Pods,
    request: cri::ExecSyncRequest,
) -> Result<cri::ExecSyncResponse, Status> {
    if request.cmd.is_empty() {
        return Err(Status::invalid_argument(
            "the command to execute is missing",
        ));
    }
    let limit = seconds(request.timeout);
    let output = pods.exec(&request.container_id, request.cmd, limit).await?;
    if output.timed_out {
        return Err(Status::deadline_exceeded(format!(
            "the command did not end within {limit:?} and was killed"
        )));
    }
    Ok(cri::ExecSyncResponse {
        stdout: output.stdout,
        stderr: output.stderr,
        exit_code: output.exit_code,
    })
}

pub fn event(notice: &Notice) -> cri::ContainerEventResponse {
    let kind = match notice.kind {
        NoticeKind::Created => cri::ContainerEventType::ContainerCreatedEvent,
        NoticeKind::Started => cri::ContainerEventType::ContainerStartedEvent,
        NoticeKind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        NoticeKind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    cri::ContainerEventResponse {
        container_id: notice.container_id.clone(),
        container_event_type: kind.into(),
        created_at: notice.at,
        pod_sandbox_status: Some(show::pod_status(&notice.view.pod)),
        containers_statuses: show::container_statuses(&notice.view),
    }
}
