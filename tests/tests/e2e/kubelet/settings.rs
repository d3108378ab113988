// SPDX-License-Identifier: Apache-2.0
//! Settings of kubelet that change what it asks of a runtime: feature gates, the source of statistics, a full disk.

use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::client::Client;
use bulkhead_tests::node::{Node, PATIENCE, pod, script, with};
use bulkhead_tests::node_api::{is_ready, phase};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{Late, try_until, whether};
use serde_json::{Value, json};

/// Waits until `enough` is true of the statistics of the pod `counted`, and returns them.
async fn statistics(node: &Node, enough: impl Fn(&Value) -> bool) -> Result<Value, Late> {
    let patience = Duration::from_secs(120);
    try_until("the pod is counted", patience, async || {
        let summary = node.api.summary().await;
        let pods = summary["pods"].as_array().cloned().unwrap_or_default();
        let pod = pods
            .into_iter()
            .find(|pod| pod["podRef"]["name"] == "counted-node");
        match pod {
            Some(pod) if enough(&pod) => Ok(pod),
            pod => Err(json!(pod).to_string()),
        }
    })
    .await
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Whether the values are there that eviction, `kubectl top` and quotas use.
fn is_counted(pod: &Value) -> bool {
    let container = &pod["containers"][0];
    number(&container["cpu"]["usageCoreNanoSeconds"]) > 0
        && number(&container["memory"]["workingSetBytes"]) > 0
        // The script wrote 3 MB.
        && number(&container["rootfs"]["usedBytes"]) >= 3_000_000
        && number(&container["logs"]["usedBytes"]) > 0
}

/// Whether kubelet sees the 3 MB that the script wrote to an emptyDir.
fn is_volume_counted(pod: &Value) -> bool {
    let mut volumes = pod["volume"].as_array().into_iter().flatten();
    volumes.any(|volume| number(&volume["usedBytes"]) >= 3_000_000)
        && number(&pod["ephemeral-storage"]["usedBytes"]) >= 6_000_000
}

async fn until_ready(node: &Node, name: &str) -> Result<(), String> {
    node.api
        .until(name, PATIENCE, |pod| is_ready(pod).then_some(()))
        .await
}

/// Runs a pod that ends by itself and one that is deleted. kubelet must notice both.
async fn come_and_go(node: &Node, table: &mut Table, what: &str) {
    let begun = Instant::now();
    node.apply(&pod(
        "ends",
        json!({"restartPolicy": "Never", "containers": [script("main", "sleep 2; exit 3")]}),
    ));
    node.apply(&pod(
        "goes",
        json!({"containers": [script("main", "exec sleep 1000")]}),
    ));
    let failed = |pod: &Value| (phase(pod) == "Failed").then_some(());
    let ends = node.api.until("ends", PATIENCE, failed).await;
    let ready = until_ready(node, "goes").await;
    node.delete("ends");
    node.delete("goes");
    let gone = node.until_stopped("goes").await;
    let left = node.until_stopped("ends").await;
    let right = ends.and(ready).and(gone).and(left);
    let seen = format!("{right:?} in {} s", begun.elapsed().as_secs());
    table.row(&format!("{what}: pods come and go"), right.is_ok(), seen);
}

async fn metric(node: &Node, page: &str, name: &str) -> Option<f64> {
    let text = node.api.get(page).await.unwrap_or_default();
    let mut lines = text.lines().filter(|line| line.starts_with(name));
    lines.find_map(|line| line.rsplit(' ').next()?.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_and_gates_on_and_off() {
    let mut node = Node::start(json!({})).await;
    let mut table = Table::new("kubelet: gates and statistics");
    let writes = "head -c 3000000 /dev/urandom >/written; head -c 3000000 /dev/urandom >/data/written; echo done; while :; do sleep 1; done";
    let main = with(
        script("main", writes),
        json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
    );
    let counted = json!({"volumes": [{"name": "data", "emptyDir": {}}], "containers": [main]});
    node.apply(&pod("counted", counted));
    table.equal("a pod runs", until_ready(&node, "counted").await, Ok(()));

    let off = statistics(&node, is_counted).await;
    table.row(
        "CRI statistics off: the pod is counted",
        off.is_ok(),
        shorten(&off),
    );
    let counted = statistics(&node, is_volume_counted).await;
    table.row(
        "an emptyDir on disk is counted",
        counted.is_ok(),
        shorten(&counted),
    );
    come_and_go(&node, &mut table, "all gates off").await;

    let gates = json!({"featureGates": {"PodAndContainerStatsFromCRI": true, "EventedPLEG": true, "CRIListStreaming": true}});
    node.restart_kubelet(gates).await;
    let whole = |pod: &Value| {
        is_counted(pod)
            && number(&pod["process_stats"]["process_count"]) > 0
            && number(&pod["network"]["rxBytes"]) > 0
    };
    let on = statistics(&node, whole).await;
    table.row(
        "CRI statistics on: processes and network too",
        on.is_ok(),
        shorten(&on),
    );
    let pod_metric = metric(
        &node,
        "metrics/cadvisor",
        "container_memory_working_set_bytes{",
    )
    .await;
    table.row(
        "CRI statistics on: metrics/cadvisor",
        pod_metric > Some(0.0),
        format!("{pod_metric:?}"),
    );
    come_and_go(&node, &mut table, "all gates on").await;
    let events = metric(
        &node,
        "metrics",
        "kubelet_evented_pleg_connection_success_count",
    )
    .await;
    table.row(
        "EventedPLEG is connected",
        events >= Some(1.0),
        format!("{events:?}"),
    );
    let output = node.output();
    let given_up = output
        .lines()
        .find(|line| line.contains("not implemented, falling back"));
    table.row(
        "CRIListStreaming is served",
        given_up.is_none(),
        format!("{given_up:?}"),
    );
    let restarts =
        node.api.pod("counted").await["status"]["containerStatuses"][0]["restartCount"].clone();
    table.equal("the pod has not noticed", restarts, json!(0));

    disk_pressure(&mut node, &mut table).await;
    table.finish();
    node.end().await;
}

/// Under disk pressure, kubelet removes unused images. It does not evict static pods.
async fn disk_pressure(node: &mut Node, table: &mut Table) {
    let mut client = node.daemon.client().await;
    let unused = Registry::shared().image("test/oddities");
    client.pull(&unused).await.expect("pull");
    let free_mib = free_mib(&node.daemon.path("state").display().to_string());
    let more = format!("{}Mi", free_mib + 1024);
    node.restart_kubelet(json!({"evictionHard": {"imagefs.available": more}}))
        .await;
    let started = Instant::now();
    let collected = try_until("kubelet removes the image", PATIENCE, async || {
        let names = images(&mut client).await;
        let is_gone = !names.iter().any(|name| name.contains("test/oddities"));
        whether(is_gone, names)
    });
    let is_collected = collected.await.is_ok();
    let seconds = started.elapsed().as_secs();
    let names = images(&mut client).await;
    table.row(
        "disk pressure: unused images go",
        is_collected,
        format!("after {seconds} s: {names:?}"),
    );
    let kept = names.iter().any(|name| name.contains("test/busybox"));
    table.row(
        "disk pressure: images in use stay",
        kept,
        format!("{names:?}"),
    );
    let counted = node.api.pod("counted").await;
    table.row(
        "disk pressure: a static pod stays",
        is_ready(&counted),
        phase(&counted),
    );
}

async fn images(client: &mut Client) -> Vec<String> {
    let request = bulkhead_proto::cri::ListImagesRequest::default();
    let answer = client
        .images
        .list_images(request)
        .await
        .expect("list images");
    let images = answer.into_inner().images.into_iter();
    images.flat_map(|image| image.repo_tags).collect()
}

fn free_mib(path: &str) -> u64 {
    let output = Command::new("df")
        .args(["--output=avail", "-m", path])
        .output();
    let output = output.expect("run df");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = text
        .lines()
        .last()
        .and_then(|line| line.trim().parse().ok());
    last.expect("what is free")
}

/// The values that are shown in a table's row.
fn shorten(found: &Result<Value, Late>) -> String {
    match found {
        Ok(pod) => format!(
            "rootfs {}, ephemeral {}, processes {}, received {}",
            pod["containers"][0]["rootfs"]["usedBytes"],
            pod["ephemeral-storage"]["usedBytes"],
            pod["process_stats"]["process_count"],
            pod["network"]["rxBytes"],
        ),
        Err(late) => late.to_string(),
    }
}
