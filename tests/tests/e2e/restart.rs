// SPDX-License-Identifier: Apache-2.0
//! The daemon is killed and started again. Its pods do not notice.

use std::time::Duration;

use bulkhead_proto::cri::{ContainerState, PodSandboxState};
use bulkhead_tests::census::Census;
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_daemon_adopts_pods_and_learns_what_it_missed() {
    let mut daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();

    let pod = client.run_pod("stays").await.expect("run pod");
    let dead = client.run_pod("dies").await.expect("run pod");
    let runs = client
        .run_script(
            &pod,
            "runs",
            &busybox,
            "i=0; while true; do echo tick $i; i=$((i+1)); sleep 0.2; done",
        )
        .await;
    let ends = client
        .run_script(&pod, "ends", &busybox, "sleep 4; exit 9")
        .await;
    let victim = client
        .run_script(&dead, "victim", &busybox, "exec sleep 1000")
        .await;
    client
        .log_until(&pod, "runs", |log| log.contains("tick 2\n"))
        .await;
    let vmms = daemon.vmm_pids();
    assert_eq!(vmms.len(), 2);

    daemon.kill();
    // One container exits meanwhile. While no daemon runs, nothing outside the VM shows that.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(daemon.vmm_pids(), vmms, "VMs outlive the daemon");
    // One of the two VMMs dies while no daemon runs: the one with open files of this pod.
    let killed = vmms
        .iter()
        .find(|pid| open_files(**pid).contains(&dead.id))
        .expect("the VMM of the second pod");
    assert!(
        std::process::Command::new("kill")
            .args(["-9", &killed.to_string()])
            .status()
            .expect("kill")
            .success()
    );
    daemon.restart().await;

    let mut client = daemon.client().await;
    assert_eq!(
        client.pod_state(&pod.id).await.expect("state"),
        PodSandboxState::SandboxReady
    );
    assert_eq!(
        client.pod_state(&dead.id).await.expect("state"),
        PodSandboxState::SandboxNotready
    );
    assert_eq!(client.exited(&victim).await.exit_code, 137);
    assert_eq!(
        client.exited(&ends).await.exit_code,
        9,
        "an exit while no daemon ran"
    );
    let status = client.status(&runs).await.expect("status");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    let shown = client.shell(&runs, "echo again").await;
    assert_eq!(shown, "again\n");
    let log = client
        .log_until(&pod, "runs", |log| log.lines().count() > 40)
        .await;
    for number in 0..40 {
        assert!(
            log.contains(&format!("tick {number}\n")),
            "tick {number} is lost: {log}"
        );
    }
    for pod in [&pod, &dead] {
        client.end_pod(pod).await;
    }
    daemon.census().assert_equals_but_for_processes(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_a_pod_boots_cleans_up_when_it_comes_back() {
    let mut daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();
    // A boot takes one to two seconds on an emulated host, so these delays reach every stage of it.
    for (number, delay_ms) in [20, 100, 250, 500, 900].into_iter().enumerate() {
        let name = format!("half-{number}");
        let mut booting = daemon.client().await;
        let call = {
            let name = name.clone();
            tokio::spawn(async move { booting.run_pod(&name).await })
        };
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        daemon.kill();
        let answer = call.await.expect("the call's task");
        daemon.restart().await;
        let mut client = daemon.client().await;
        for id in client.pod_ids().await {
            // kubelet removes pods that it does not know.
            client.stop_pod(&id).await.expect("stop");
            client.remove_pod(&id).await.expect("remove");
        }
        assert!(
            daemon.vmm_pids().is_empty(),
            "after {delay_ms} ms: {answer:?}"
        );
        daemon.census().assert_equals_but_for_processes(&before);
        let again = client.run_pod(&name).await.expect("the name is free");
        client.end_pod(&again).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_it_pulls_leaves_no_files_and_pulls_again() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    let oddities = Registry::shared().image("test/oddities");
    // The delays are chosen to reach different stages of a pull.
    for delay_ms in [10, 60, 150] {
        let mut client = daemon.client().await;
        let name = oddities.clone();
        let call = tokio::spawn(async move { client.pull(&name).await });
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        daemon.kill();
        let answer = call.await.expect("the call's task");
        daemon.restart().await;
        if answer.is_err() {
            let left = Census::take(&[
                &daemon.path("state/images/layers"),
                &daemon.path("state/images/partial"),
            ]);
            assert!(!left.to_string().contains("state/images"), "{left}");
        }
    }
    let mut client = daemon.client().await;
    client.pull(&oddities).await.expect("pull");
}

fn open_files(pid: i32) -> String {
    let mut names = String::new();
    if let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) {
        for entry in entries.flatten() {
            if let Ok(target) = std::fs::read_link(entry.path()) {
                names.push_str(&target.to_string_lossy());
                names.push('\n');
            }
        }
    }
    names
}
