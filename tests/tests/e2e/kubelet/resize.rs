// SPDX-License-Identifier: Apache-2.0
//! In-place resize: if a manifest names a uid, kubelet applies its changes to the running pod.

use bulkhead_tests::node::{Node, PATIENCE, pod, script, with};
use bulkhead_tests::node_api::{container, is_ready};
use bulkhead_tests::table::Table;
use serde_json::{Value, json};

/// A step: its title, CPU in thousandths, memory in MiB.
type Step = (&'static str, u32, u32);

/// A pod whose containers all have limits and equal requests, so its cgroup has limits too.
fn guaranteed(cpu: u32, memory: u32) -> Value {
    let amounts = json!({"cpu": format!("{cpu}m"), "memory": format!("{memory}Mi")});
    let resources = json!({"resources": {"requests": amounts, "limits": amounts}});
    named(
        "guaranteed",
        json!([with(script("main", "exec sleep 10000"), resources)]),
    )
}

/// A container without limits beside one with limits: kubelet sends -1 for the pod's memory.
fn burstable(cpu: u32, memory: u32) -> Value {
    let Value::Array(mut containers) = guaranteed(cpu, memory)["spec"]["containers"].take() else {
        unreachable!("containers are a list");
    };
    containers.push(script("free", "exec sleep 10000"));
    named("burstable", json!(containers))
}

fn named(name: &str, containers: Value) -> Value {
    let mut pod = pod(name, json!({"containers": containers}));
    // Without a uid, kubelet uses the manifest's hash, and a changed manifest is a new pod.
    pod["metadata"]["uid"] = json!(format!("uid-{name}"));
    pod
}

/// Whether the pod's status shows these limits and no resize in progress.
fn is_resized(pod: &Value, cpu: u32, memory: u32) -> bool {
    let limits = &container(pod, "main")["resources"]["limits"];
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let under_way = conditions
        .filter_map(|one| one["type"].as_str())
        .any(|kind| kind.starts_with("PodResize"));
    *limits == json!({"cpu": format!("{cpu}m"), "memory": format!("{memory}Mi")}) && !under_way
}

async fn resize(
    node: &Node,
    table: &mut Table,
    make: fn(u32, u32) -> Value,
    name: &str,
    steps: &[Step],
) {
    let ready = |pod: &Value| is_ready(pod).then_some(());
    let runs = node.api.until(name, PATIENCE, ready).await;
    table.equal(&format!("{name} runs"), runs, Ok(()));
    let first = container(&node.api.pod(name).await, "main")["containerID"].clone();
    for (what, cpu, memory) in steps {
        node.apply(&make(*cpu, *memory));
        let resized = |pod: &Value| is_resized(pod, *cpu, *memory).then_some(());
        let answer = node.api.until(name, PATIENCE, resized).await;
        let read = async |file: &str| {
            let command = format!("cat /sys/fs/cgroup/{file}");
            node.api.run(name, "main", &command).await
        };
        let (quota, limit) = (read("cpu.max").await, read("memory.max").await);
        let right = answer.is_ok()
            && quota == Ok(format!("{} 100000\n", cpu * 100))
            && limit == Ok(format!("{}\n", u64::from(*memory) << 20));
        let seen = answer.err().unwrap_or_default();
        table.row(
            &format!("{name}: {what}"),
            right,
            format!("cpu.max {quota:?}, memory.max {limit:?} {seen}"),
        );
        if !right {
            break;
        }
    }
    let last = node.api.pod(name).await;
    let same = container(&last, "main")["containerID"] == first;
    let restarts = &container(&last, "main")["restartCount"];
    table.row(
        &format!("{name}: the same container"),
        same && restarts == 0,
        format!("{restarts} restarts"),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_resized_in_place() {
    let node = Node::start(json!({})).await;
    let mut table = Table::new("kubelet: in-place resize");
    // The requests of both pods together must fit the one CPU of an emulated host; else kubelet defers a resize for
    // ever.
    node.apply(&guaranteed(200, 256));
    node.apply(&burstable(200, 256));
    let steps = [
        ("more CPU", 400, 256),
        ("less memory", 400, 192),
        ("more memory, as much as it began with", 400, 256),
        ("less of both", 150, 128),
        ("more of both, beyond what it began with", 300, 320),
    ];
    resize(&node, &mut table, guaranteed, "guaranteed", &steps).await;
    resize(&node, &mut table, burstable, "burstable", &steps).await;
    table.finish();
    node.end().await;
}
