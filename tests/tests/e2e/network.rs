// SPDX-License-Identifier: Apache-2.0
//! Addresses: what CNI gave is what the guest has.

use bulkhead_proto::cri::PodSandboxStatusRequest;
use bulkhead_tests::client::Client;
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;

async fn address(client: &mut Client, id: &str) -> String {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: id.into(),
        verbose: false,
    };
    let status = client
        .runtime
        .pod_sandbox_status(request)
        .await
        .expect("status")
        .into_inner()
        .status
        .expect("a status");
    status.network.map(|network| network.ip).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_have_cnis_address_and_reach_the_host_and_each_other() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let mut pods = Vec::new();
    for name in ["one", "two"] {
        let pod = client.run_pod(name).await.expect("run pod");
        let id = client
            .run_script(&pod, "main", &busybox, "exec sleep 1000")
            .await;
        let address = address(&mut client, &pod.id).await;
        assert!(address.starts_with("10.88."), "{address}");
        let shown = client.shell(&id, "ip -4 addr show eth0").await;
        assert!(shown.contains(&address), "{shown}");
        pods.push((pod, id, address));
    }
    let gateway = "10.88.0.1";
    for target in [gateway, &pods[1].2] {
        let answer = client
            .shell(&pods[0].1, &format!("ping -c 2 -W 10 {target}"))
            .await;
        assert!(answer.contains(" 0% packet loss"), "{target}: {answer}");
    }
    // TCP, with enough bytes to need segmentation. Busybox's nc ends at the end of its input: the reader's stays open.
    client
        .shell(
            &pods[1].1,
            "(head -c 2000000 /dev/zero | nc -l -p 8000 >/dev/null 2>&1) & sleep 0.5",
        )
        .await;
    let line = format!(
        "mkfifo /open; sleep 60 >/open & nc -w 20 {} 8000 </open | wc -c; kill $!",
        pods[1].2
    );
    assert_eq!(client.shell(&pods[0].1, &line).await, "2000000\n");
    for (pod, _, _) in &pods {
        client.end_pod(pod).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_cni_configuration_a_pod_has_loopback_only() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("alone").await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    assert_eq!(address(&mut client, &pod.id).await, "");
    client.shell(&id, "ping -c 1 -W 5 127.0.0.1").await;
    client.end_pod(&pod).await;
}
