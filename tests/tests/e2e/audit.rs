// SPDX-License-Identifier: Apache-2.0
//! `bulkhead check --vm`: what keeps a running VM in, as the kernel says it.

use std::process::{Command, Output};

use bulkhead_proto::cri::PodSandboxStatusRequest;
use bulkhead_tests::client::container;
use bulkhead_tests::daemon::{Daemon, Networking, program};
use bulkhead_tests::kubelet::{mount, with_mounts};
use bulkhead_tests::registry::Registry;

fn check(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("bulkhead"));
    command.arg("--socket").arg(daemon.socket()).arg("check");
    command.args(arguments).output().expect("run bulkhead")
}

fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    String::from_utf8_lossy(&[out.as_slice(), err].concat()).into_owned()
}

/// Every rule holds for a pod with a network and a share of a host directory. One that does not hold any more fails by its
/// name. The host has one CPU without SMT, so core scheduling has nothing to do there, and the daemon says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_vm_passes_every_rule_and_one_that_is_changed_fails_by_name() {
    let daemon = Daemon::start_with(Networking::Bridge, "sandbox.core_scheduling = true\n").await;
    let cores = daemon.output();
    assert!(
        cores.contains("core scheduling: SMT is not active"),
        "{cores}"
    );
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("audited").await.expect("run pod");
    let shared = daemon.path("shared");
    std::fs::create_dir(&shared).expect("a directory to share");
    let config = container("main", &busybox, &["sleep", "1000"]);
    let config = with_mounts(config, vec![mount(&shared, "/shared")]);
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    client.shell(&id, "echo x > /shared/file").await;

    let prefix = &pod.id[..13];
    let healthy = check(&daemon, &["--vm", prefix]);
    let text = said(&healthy);
    println!("{text}");
    assert!(healthy.status.success(), "{text}");
    for line in [
        "vmm: user",
        "vmm: capabilities",
        "bulkhead-vm: ",
        "vcpu0: ",
        "vmm: root",
        "empty and read-only",
        "vm 1",
        "tap 1",
        "vmm: cgroup",
        "file server: capabilities",
        "file server: thread",
        "its parent: user",
        "Landlock",
        "This VM is kept in.",
    ] {
        assert!(text.contains(line), "no {line:?} in:\n{text}");
    }
    let json = check(&daemon, &["--vm", prefix, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json["ok"], true, "{json}");
    assert_eq!(json["checks"][0]["name"], "vmm: user");

    // The test changes what only root can change.
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let status = client
        .runtime
        .pod_sandbox_status(request)
        .await
        .expect("status");
    let info: serde_json::Value =
        serde_json::from_str(&status.into_inner().info["info"]).expect("JSON");
    let vmm = info["pid"].as_i64().expect("the VMM's process");
    std::fs::write(format!("/proc/{vmm}/oom_score_adj"), "-5").expect("protect the VMM");
    let changed = check(&daemon, &["--vm", prefix]);
    let text = said(&changed);
    assert_eq!(changed.status.code(), Some(1), "{text}");
    let failures: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("FAIL"))
        .collect();
    assert!(
        matches!(failures.as_slice(), [one] if one.contains("vmm: oom") && one.contains("-5")),
        "{text}"
    );

    client.stop_pod(&pod.id).await.expect("stop");
    let stopped = check(&daemon, &["--vm", prefix]);
    assert_eq!(stopped.status.code(), Some(1));
    assert!(
        said(&stopped).contains("no running VM"),
        "{}",
        said(&stopped)
    );
    let unknown = check(&daemon, &["--vm", "ffffffffffff"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        said(&unknown).contains("ffffffffffff"),
        "{}",
        said(&unknown)
    );
    client.end_pod(&pod).await;
}
