// SPDX-License-Identifier: Apache-2.0
//! A real kubelet with pods of both sides: one that shares the host's network and so is the delegate's, and one in a VM.

use std::time::Duration;

use bulkhead_proto::cri::{ImageSpec, ImageStatusRequest};
use bulkhead_tests::client::image_spec;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::node::{Node, PATIENCE, pod, script};
use bulkhead_tests::node_api::is_ready;
use bulkhead_tests::page::block;
use bulkhead_tests::registry::Registry;
use serde_json::json;

const SLEEP: &str = "cat /proc/version; exec sleep 10000";

async fn until_ready(node: &Node, name: &str) {
    let ready = node
        .api
        .until(name, PATIENCE, |pod| is_ready(pod).then_some(()));
    ready
        .await
        .unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// The kernel's version that a pod has said. A pod without probes is ready before it has said anything.
async fn kernel(node: &Node, name: &str) -> String {
    let said = |log: &str| log.contains("Linux version");
    let log = node.api.logs_until(name, "main", said).await;
    log.trim().to_owned()
}

/// Whether the pods' image is there for a handler.
async fn has_image(node: &Node, handler: &str) -> bool {
    let spec = ImageSpec {
        runtime_handler: handler.into(),
        ..image_spec(&Registry::shared().image("test/busybox:latest"))
    };
    let request = ImageStatusRequest {
        image: Some(spec),
        verbose: false,
    };
    let mut client = node.daemon.client().await;
    let answer = client.images.image_status(request).await;
    answer.expect("image status").into_inner().image.is_some()
}

/// The id and the number of restarts of a pod's only container.
async fn container(node: &Node, name: &str) -> (String, u64) {
    let pod = node.api.pod(name).await;
    let status = &pod["status"]["containerStatuses"][0];
    let id = status["containerID"].as_str().unwrap_or_default();
    (id.to_owned(), status["restartCount"].as_u64().unwrap_or(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelet_runs_pods_of_both_sides_and_pulls_each_image_where_it_is_needed() {
    let mut containerd = Containerd::start(Release::New).await;
    let socket = containerd.socket().display().to_string();
    let config = block("trusted.toml").replace("/run/containerd/containerd.sock", &socket);
    let mut node = Node::start_with(json!({}), &config).await;
    let hosts = std::fs::read_to_string("/proc/version").expect("the host's version");

    let beside = json!({"hostNetwork": true, "containers": [script("main", SLEEP)]});
    node.apply(&pod("beside", beside));
    until_ready(&node, "beside").await;
    assert_eq!(kernel(&node, "beside").await, hosts.trim());
    assert!(has_image(&node, "runc").await);
    assert!(
        !has_image(&node, "bulkhead").await,
        "pulled where it was not needed"
    );
    let inside = json!({"containers": [script("main", SLEEP)]});
    node.apply(&pod("inside", inside));
    until_ready(&node, "inside").await;
    assert_ne!(kernel(&node, "inside").await, hosts.trim());
    assert!(has_image(&node, "bulkhead").await);

    // kubelet is started again while the delegate is down, and back: no container of either side is another one.
    let before = (
        container(&node, "beside").await,
        container(&node, "inside").await,
    );
    containerd.kill();
    node.kill_kubelet();
    node.start_kubelet().await;
    until_ready(&node, "inside").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    containerd.start_again().await;
    until_ready(&node, "beside").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let after = (
        container(&node, "beside").await,
        container(&node, "inside").await,
    );
    assert_eq!(after, before);

    // kubelet has seen the pods anew. It starts their containers again, with the images that are there.
    let ends = |name: &'static str| {
        let node = &node;
        async move {
            let mut client = node.daemon.client().await;
            let (id, restarts) = container(node, name).await;
            let id = id.rsplit('/').next().expect("an id");
            client.stop(id, 0).await.expect("stop");
            let again = node.api.until(name, PATIENCE, |pod| {
                let count = pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
                (count > Some(restarts) && is_ready(pod)).then_some(())
            });
            again
                .await
                .unwrap_or_else(|error| panic!("{name} again: {error}"));
        }
    };
    ends("beside").await;
    ends("inside").await;
    node.end().await;
}
