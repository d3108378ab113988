// SPDX-License-Identifier: Apache-2.0
//! What the scheduler and kubelet decide about pods: overhead and eviction.

use bulkhead_tests::cluster::{
    FAIL_AT_THE_END, Namespace, STAY, apply_all, cluster, object, on_node, pod,
};
use bulkhead_tests::table::Table;
use serde_json::json;

/// Why the scheduler has not placed a pod yet.
fn unschedulable(own: &Namespace, name: &str) -> String {
    own.until(&format!("the scheduler refuses {name}"), || {
        let pod = own.object("pod", name);
        let conditions = pod["status"]["conditions"].as_array()?;
        let condition = conditions
            .iter()
            .find(|one| one["type"] == "PodScheduled")?;
        (condition["status"] == "False")
            .then(|| condition["message"].as_str().unwrap_or_default().to_owned())
    })
}

#[test]
fn the_overhead_of_a_runtime_class_is_scheduled_and_accounted() {
    let own = Namespace::new("overhead");
    let memory =
        json!({"resources": {"requests": {"memory": "64Mi"}, "limits": {"memory": "64Mi"}}});
    // More than any node has, beside 64 MiB, which all have.
    apply_all(&[object(
        "RuntimeClass",
        "heavy",
        json!({"handler": "bulkhead", "overhead": {"podFixed": {"memory": "1000Gi"}}}),
    )]);
    own.apply(&[
        pod("plain", STAY, memory.clone(), json!({})),
        pod("heavy", STAY, memory, json!({"runtimeClassName": "heavy"})),
    ]);
    let mut table = Table::new("cluster: a RuntimeClass's overhead");
    let plain = own.until_ready("plain");
    table.equal(
        "the pod has its class's overhead",
        plain["spec"]["overhead"].clone(),
        json!({"cpu": "20m", "memory": "180Mi"}),
    );
    let reason = unschedulable(&own, "heavy");
    table.row(
        "the scheduler counts it",
        reason.contains("Insufficient memory"),
        reason,
    );
    let uid = plain["metadata"]["uid"].as_str().unwrap_or_default();
    let limit = on_node(&format!(
        "cat /sys/fs/cgroup/kubepods/burstable/pod{uid}/memory.max"
    ));
    table.equal(
        "the pod's cgroup: limit and overhead",
        limit,
        Ok(format!("{}\n", (64 + 180) << 20)),
    );
    let _ = cluster(&["delete", "runtimeclass", "heavy"]);
    table.finish();
}

#[test]
fn a_pod_that_exceeds_a_size_limit_is_evicted() {
    let own = Namespace::new("eviction");
    let mounts = json!({"volumeMounts": [{"name": "small", "mountPath": "/small"}]});
    let volumes = json!({"volumes": [{"name": "small", "emptyDir": {"sizeLimit": "4Mi"}}]});
    let line = format!("head -c 20000000 /dev/urandom >/small/file; {FAIL_AT_THE_END}");
    own.apply(&[pod("greedy", &line, mounts, volumes)]);
    let greedy = own.until_phase("greedy", "Failed");
    let mut table = Table::new("cluster: sizeLimit of an emptyDir");
    table.equal(
        "evicted",
        greedy["status"]["reason"].clone(),
        json!("Evicted"),
    );
    let message = greedy["status"]["message"].as_str().unwrap_or_default();
    table.row(
        "the reason",
        message.contains("small") && message.contains("4Mi"),
        message,
    );
    table.finish();
}
