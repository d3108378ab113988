// SPDX-License-Identifier: Apache-2.0
//! `bulkhead ps` and `bulkhead images`: print tables.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use bulkhead_proto::cri;
use indicatif::{DecimalBytes, HumanDuration};

use super::CliError;
use super::client::{Client, failed};

/// How many digits of an id are shown. Commands accept such a prefix instead of the whole id if it is unique.
const SHORT_ID: usize = 13;
const NONE: &str = "-";

/// Prints a row for each container, and one for each pod without containers.
pub async fn pods(client: &mut Client, all: bool) -> Result<(), CliError> {
    let pods = client
        .runtime
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await;
    let pods = pods.map_err(failed("list pods"))?.into_inner().items;
    let containers = client
        .runtime
        .list_containers(cri::ListContainersRequest::default())
        .await;
    let containers = containers
        .map_err(failed("list containers"))?
        .into_inner()
        .containers;
    print!("{}", table(&pod_rows(pods, containers, all)));
    Ok(())
}

/// Joins pods and containers to rows. Without `all`, leaves out pods that are not ready and containers that do not run.
fn pod_rows(
    pods: Vec<cri::PodSandbox>,
    containers: Vec<cri::Container>,
    all: bool,
) -> Vec<Vec<String>> {
    let mut of_pod: BTreeMap<String, Vec<cri::Container>> = BTreeMap::new();
    for container in containers {
        if all || container.state() == cri::ContainerState::ContainerRunning {
            of_pod
                .entry(container.pod_sandbox_id.clone())
                .or_default()
                .push(container);
        }
    }
    let mut rows = vec![headings(&[
        "POD",
        "POD NAME",
        "POD STATE",
        "CONTAINER",
        "NAME",
        "STATE",
        "AGE",
        "IMAGE",
    ])];
    for pod in pods {
        let ready = pod.state() == cri::PodSandboxState::SandboxReady;
        if !all && !ready {
            continue;
        }
        let metadata = pod.metadata.clone().unwrap_or_default();
        let state = if ready { "Ready" } else { "NotReady" };
        let start = [short(&pod.id), metadata.name, state.to_owned()];
        let containers = of_pod.remove(&pod.id).unwrap_or_default();
        if containers.is_empty() {
            let end = [
                NONE.to_owned(),
                NONE.to_owned(),
                NONE.to_owned(),
                age(pod.created_at),
                NONE.to_owned(),
            ];
            rows.push(start.iter().cloned().chain(end).collect());
        }
        for container in containers {
            let end = [
                short(&container.id),
                container.metadata.clone().unwrap_or_default().name,
                container_state(container.state()).to_owned(),
                age(container.created_at),
                container.image.unwrap_or_default().image,
            ];
            rows.push(start.iter().cloned().chain(end).collect());
        }
    }
    rows
}

fn container_state(state: cri::ContainerState) -> &'static str {
    match state {
        cri::ContainerState::ContainerCreated => "Created",
        cri::ContainerState::ContainerRunning => "Running",
        cri::ContainerState::ContainerExited => "Exited",
        cri::ContainerState::ContainerUnknown => "Unknown",
    }
}

/// Prints a row for each name of an image.
pub async fn images(client: &mut Client) -> Result<(), CliError> {
    let images = client
        .images
        .list_images(cri::ListImagesRequest::default())
        .await;
    let images = images.map_err(failed("list images"))?.into_inner().images;
    let mut rows = vec![headings(&["IMAGE", "ID", "SIZE"])];
    for image in images {
        let names = match (image.repo_tags.as_slice(), image.repo_digests.as_slice()) {
            ([], []) => vec![NONE.to_owned()],
            ([], digests) => digests.to_vec(),
            (tags, _) => tags.to_vec(),
        };
        let id = short(image.id.trim_start_matches("sha256:"));
        let size = DecimalBytes(image.size).to_string();
        rows.extend(
            names
                .into_iter()
                .map(|name| vec![name, id.clone(), size.clone()]),
        );
    }
    print!("{}", table(&rows));
    Ok(())
}

pub fn headings(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

fn short(id: &str) -> String {
    id.chars().take(SHORT_ID).collect()
}

/// The time that has passed since `created_at`, which is in nanoseconds since 1970.
fn age(created_at: i64) -> String {
    let created = Duration::from_nanos(u64::try_from(created_at).unwrap_or(0));
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    HumanDuration(now.saturating_sub(created)).to_string()
}

/// Formats a table with columns as wide as their widest cell. Control characters, which may come from untrusted names,
/// are replaced, so that they do not reach the terminal.
pub fn table(rows: &[Vec<String>]) -> String {
    let clean = |cell: &String| cell.replace(char::is_control, "?");
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(clean).collect())
        .collect();
    let mut widths = Vec::new();
    for row in &rows {
        widths.resize(row.len().max(widths.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:<width$}   "))
            .collect();
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, state: cri::PodSandboxState) -> cri::PodSandbox {
        cri::PodSandbox {
            id: id.to_owned(),
            state: state.into(),
            ..Default::default()
        }
    }

    fn container(pod: &str, id: &str, state: cri::ContainerState) -> cri::Container {
        cri::Container {
            id: id.to_owned(),
            pod_sandbox_id: pod.to_owned(),
            state: state.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_has_ended_is_shown_only_on_request() {
        let pods = vec![
            pod("live", cri::PodSandboxState::SandboxReady),
            pod("dead", cri::PodSandboxState::SandboxNotready),
        ];
        let containers = vec![
            container("live", "running", cri::ContainerState::ContainerRunning),
            container("live", "exited", cri::ContainerState::ContainerExited),
        ];
        let shown = |all| {
            let rows = pod_rows(pods.clone(), containers.clone(), all);
            rows.iter()
                .skip(1)
                .map(|row| format!("{} {}", row[0], row[3]))
                .collect::<Vec<_>>()
        };
        assert_eq!(shown(false), ["live running"]);
        assert_eq!(shown(true), ["live running", "live exited", "dead -"]);
    }

    #[test]
    fn columns_line_up_and_hostile_names_stay_on_their_line() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = table(&[row(["A", "B"]), row(["long\nname", "\x1b[2J"])]);
        assert_eq!(text, "A           B\nlong?name   ?[2J\n");
    }
}
