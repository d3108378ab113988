// SPDX-License-Identifier: Apache-2.0
//! docs/kubernetes.md, the part that needs an API server. The cluster's RuntimeClass is the one of that page, and so is
//! the label of its nodes.

use bulkhead_tests::cluster::{Namespace, image, on_node, with_input};
use bulkhead_tests::page;
use bulkhead_tests::table::Table;
use serde_json::json;

#[test]
fn the_pod_of_the_page_runs_with_a_kernel_of_its_own() {
    let own = Namespace::new("page");
    let pod = page::block("pod.yaml").replace(page::IMAGE, &image("test/busybox"));
    let applied = with_input(&mut own.command(&["apply", "-f", "-"]), &pod);
    let mut table = Table::new("cluster: docs/kubernetes.md");
    table.row(
        "kubectl apply -f pod.yaml",
        applied.status.success(),
        String::from_utf8_lossy(&applied.stderr),
    );
    let log = own.until_logged("hello", "hello from");
    let node = on_node("uname -r").expect("the node's kernel");
    let right =
        log.starts_with("hello from a kernel of its own: 6.") && !log.contains(node.trim_end());
    table.row("kubectl logs hello", right, log);
    let spec = own.object("pod", "hello")["spec"].clone();
    table.equal(
        "the RuntimeClass's overhead",
        spec["overhead"].clone(),
        json!({"cpu": "20m", "memory": "180Mi"}),
    );
    table.equal(
        "its nodes",
        spec["nodeSelector"].clone(),
        json!({"bulkhead.dev/runtime": "true"}),
    );
    table.finish();
}
