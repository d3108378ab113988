// SPDX-License-Identifier: Apache-2.0
//! kubelet, the daemon, a VM and the whole node are killed while pods run.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::node::{Node, PATIENCE, pod, script, with};
use bulkhead_tests::node_api::{is_ready, phase};
use bulkhead_tests::table::Table;
use serde_json::{Value, json};

/// The id and the number of restarts of each container, by the pod's and the container's name.
type Running = BTreeMap<String, (String, u64)>;

async fn running(node: &Node) -> Running {
    let mut all = Running::new();
    for pod in node.api.pods().await {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        for status in pod["status"]["containerStatuses"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let id = status["containerID"].as_str().unwrap_or("none").to_owned();
            let restarts = status["restartCount"].as_u64().unwrap_or(0);
            all.insert(format!("{name}/{}", status["name"]), (id, restarts));
        }
    }
    all
}

async fn until_ready(node: &Node, name: &str) -> Result<(), String> {
    node.api
        .until(name, PATIENCE, |pod| is_ready(pod).then_some(()))
        .await
}

/// Waits until the pods are ready, and then long enough for kubelet to restart containers that it found changed.
async fn settle(node: &Node) {
    for name in ["plain", "probed"] {
        until_ready(node, name).await.expect("pods are ready");
    }
    tokio::time::sleep(Duration::from_secs(15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_outlive_kubelet_and_the_daemon_and_come_back_with_the_node() {
    let mut node = Node::start(json!({})).await;
    let volume = json!([{"name": "data", "emptyDir": {}}]);
    let mount = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    let count = "echo started >>/data/starts; sync /data/starts; i=0; while :; do echo tick $i; i=$((i+1)); sleep 1; done";
    let plain = with(script("main", count), mount.clone());
    node.apply(&pod(
        "plain",
        json!({"volumes": volume, "containers": [plain]}),
    ));
    let probe = json!({"exec": {"command": ["true"]}, "periodSeconds": 2, "timeoutSeconds": 20});
    let sidecar = with(
        script("sidecar", "exec sleep 10000"),
        json!({"restartPolicy": "Always"}),
    );
    let probed = with(
        script("main", "exec sleep 10000"),
        json!({"livenessProbe": probe, "readinessProbe": probe}),
    );
    node.apply(&pod(
        "probed",
        json!({"initContainers": [sidecar], "containers": [probed]}),
    ));
    let mut table = Table::new("kubelet: restarts");
    for name in ["plain", "probed"] {
        table.equal(
            &format!("{name} runs"),
            until_ready(&node, name).await,
            Ok(()),
        );
    }
    let first = running(&node).await;

    node.kill_kubelet();
    node.start_kubelet().await;
    settle(&node).await;
    table.equal(
        "kubelet killed: the same containers",
        running(&node).await,
        first.clone(),
    );

    node.daemon.kill();
    // kubelet has to do without a daemon for a while.
    tokio::time::sleep(Duration::from_secs(5)).await;
    node.daemon.restart().await;
    settle(&node).await;
    table.equal(
        "daemon killed: the same containers",
        running(&node).await,
        first.clone(),
    );

    node.kill_kubelet();
    node.daemon.restart().await;
    node.start_kubelet().await;
    settle(&node).await;
    table.equal(
        "both killed: the same containers",
        running(&node).await,
        first.clone(),
    );
    let log = node.api.logs("plain", "main").await;
    let whole = log
        .lines()
        .enumerate()
        .all(|(number, line)| line == format!("tick {number}"));
    table.row(
        "logs go on without a gap",
        whole && log.lines().count() > 30,
        format!("{} lines", log.lines().count()),
    );

    // A manifest is removed while kubelet does not run: it must stop the pod when it starts.
    node.kill_kubelet();
    node.delete("probed");
    node.start_kubelet().await;
    let stopped = node.until_stopped("probed").await;
    table.equal("manifest removed while kubelet was down", stopped, Ok(()));

    let before = running(&node).await;
    for pid in node.daemon.vmm_pids() {
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
        assert!(killed.expect("kill").success());
    }
    let again = comes_back(&node, &before).await;
    table.row(
        "VM killed: the pod comes back",
        again.is_ok(),
        format!("{again:?}"),
    );
    let starts = node.api.run("plain", "main", "cat /data/starts").await;
    table.equal(
        "VM killed: its emptyDir is kept",
        starts.as_deref(),
        Ok("started\nstarted\n"),
    );

    let before = running(&node).await;
    node.reboot().await;
    let again = comes_back(&node, &before).await;
    table.row(
        "reboot: the pod comes back",
        again.is_ok(),
        format!("{again:?}"),
    );
    let starts = node.api.run("plain", "main", "cat /data/starts").await;
    table.equal(
        "reboot: its emptyDir is kept",
        starts.as_deref(),
        Ok("started\nstarted\nstarted\n"),
    );
    table.equal("reboot: nothing else runs", node.daemon.vmm_pids().len(), 1);
    table.finish();
    node.end().await;
}

/// Waits until the pod is ready with a new container.
async fn comes_back(node: &Node, before: &Running) -> Result<String, String> {
    let old: Vec<_> = before.values().map(|(id, _)| id.as_str()).collect();
    let new = |pod: &Value| {
        let id = pod["status"]["containerStatuses"][0]["containerID"].as_str()?;
        let back = is_ready(pod) && phase(pod) == "Running" && !old.contains(&id);
        back.then(|| {
            format!(
                "{} restarts",
                pod["status"]["containerStatuses"][0]["restartCount"]
            )
        })
    };
    node.api.until("plain", PATIENCE, new).await
}
