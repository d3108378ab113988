// SPDX-License-Identifier: Apache-2.0
//! Tests that change what the node has for all pods. They run after the others, with nothing beside them.

use bulkhead_tests::cluster::{
    FAIL_AT_THE_END, NODE, Namespace, STAY, apply_all, cluster, either, object, on_node, pod,
};
use bulkhead_tests::table::Table;
use serde_json::{Value, json};

const FILL: &str = "/var/lib/bulkhead/fill";

/// Frees the node's disk on drop.
struct Filled;

impl Drop for Filled {
    fn drop(&mut self) {
        let _ = on_node(&format!("rm -f {FILL}"));
    }
}

fn has_pressure() -> String {
    let path = "jsonpath={.status.conditions[?(@.type==\"DiskPressure\")].status}";
    either(cluster(&["get", "node", NODE, "-o", path]))
}

/// The names and phases of the pods that kubelet must not evict.
fn critical_pods() -> String {
    let each = "jsonpath={range .items[*]}{.metadata.name} {.status.phase} {end}";
    either(cluster(&["-n", "kube-system", "get", "pods", "-o", each]))
}

/// Makes the node offer one of a resource that only this test wants.
fn offer_token() {
    let patch = json!({"status": {"capacity": {"example.com/token": "1"}}});
    let said = cluster(&[
        "patch",
        "node",
        NODE,
        "--subresource=status",
        "--type=merge",
        "-p",
        &patch.to_string(),
    ]);
    said.expect("a resource of the node");
}

#[test]
fn a_full_disk_evicts_pods_until_it_has_room() {
    let own = Namespace::new("pressure");
    // kubelet evicts whose volumes and logs are the largest.
    let line =
        format!("head -c 50000000 /dev/urandom >/large/file; echo written; {FAIL_AT_THE_END}");
    let mounts = json!({"volumeMounts": [{"name": "large", "mountPath": "/large"}]});
    let volumes = json!({"volumes": [{"name": "large", "emptyDir": {}}]});
    own.apply(&[pod("large", &line, mounts, volumes)]);
    own.until_logged("large", "written");
    let mut table = Table::new("cluster: a node's disk is full");
    let critical = critical_pods();
    let filled = Filled;
    // All but 2 % of the disk.
    on_node(&format!("fallocate -l $(($(df --output=avail -B1 /var/lib/bulkhead | tail -n 1) - $(df --output=size -B1 /var/lib/bulkhead | tail -n 1) / 50)) {FILL}"))
        .expect("fill the disk");
    own.until("the node has DiskPressure", || {
        (has_pressure() == "True").then_some(())
    });
    table.row("the node has DiskPressure", true, "True");
    let large = own.until_phase("large", "Failed");
    table.equal(
        "a pod is evicted",
        large["status"]["reason"].clone(),
        json!("Evicted"),
    );
    let message = large["status"]["message"].as_str().unwrap_or_default();
    table.row("the reason", message.contains("ephemeral-storage"), message);
    table.equal("critical pods stay", critical_pods(), critical);
    drop(filled);
    own.until("DiskPressure ends", || {
        (has_pressure() == "False").then_some(())
    });
    table.row("room again: no DiskPressure", true, "False");
    own.apply(&[pod(
        "next",
        "echo runs",
        json!({}),
        json!({"restartPolicy": "Never"}),
    )]);
    own.until_phase("next", "Succeeded");
    table.row("and pods run again", true, "Succeeded");
    table.finish();
}

// The scheduler may take any other pod to make room for the winner.
#[test]
fn a_pod_of_higher_priority_preempts() {
    let own = Namespace::new("preemption");
    offer_token();
    let class = |name: &str, value: u32| object("PriorityClass", name, json!({"value": value}));
    apply_all(&[class("tests-low", 1), class("tests-high", 1000)]);
    let token = json!({"resources": {"limits": {"example.com/token": "1"}}});
    let user = |name: &str, class: &str| {
        pod(
            name,
            STAY,
            token.clone(),
            json!({"priorityClassName": class}),
        )
    };
    own.apply(&[user("victim", "tests-low")]);
    own.until_ready("victim");
    own.apply(&[user("winner", "tests-high")]);
    own.until_ready("winner");
    let mut table = Table::new("cluster: preemption");
    table.equal(
        "the victim is gone",
        own.object("pod", "victim"),
        Value::Null,
    );
    let events = own.get(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
    table.row("by the scheduler", events.contains("Preempted"), events);
    let _ = cluster(&["delete", "priorityclass", "tests-low", "tests-high"]);
    table.finish();
}
