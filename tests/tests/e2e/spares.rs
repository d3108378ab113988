// SPDX-License-Identifier: Apache-2.0
//! VMs that are kept ready for pods to come: pods take them and are as different as any others, others take their place, and
//! none is left behind.

use std::collections::HashSet;
use std::path::Path;

use bulkhead_proto::cri::{ContainerFilter, ListContainersRequest};
use bulkhead_tests::cgroups;
use bulkhead_tests::client::{Client, Pod, assert_fails};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

use super::forks::{VALUES, daemon, details, show};
use super::resources::{memory, pod_config};

const TWO: &str = "sandbox.spares = 2\ncni.in_advance = true\n";
const ONE: &str = "sandbox.spares = 1\n";
/// A network whose plugin fails.
const BROKEN: &str = r#"{"cniVersion":"1.0.0","name":"broken","plugins":[{"type":"broken"}]}"#;

const FAILS_TO_ADD: &str =
    r#"[ "$CNI_COMMAND" != ADD ] || { echo '{"code":50,"msg":"no network today"}'; exit 1; }"#;

/// How many spares are ready, were taken, and were not found.
async fn counts(client: &mut Client) -> [u64; 3] {
    let spares = &details(client).await["spares"];
    let count = |name: &str| spares[name].as_u64();
    ["ready", "taken", "missed"]
        .map(|name| count(name).unwrap_or_else(|| panic!("{name}: {spares}")))
}

async fn until_ready(client: &mut Client, wanted: u64) {
    until("spares are ready", async || {
        let [ready, ..] = counts(client).await;
        whether(ready == wanted, ready)
    })
    .await;
}

/// Pods of the tests' bridge reach its gateway.
const REACHES_ITS_GATEWAY: &str = "ping -c 1 -w 30 10.88.0.1 >/dev/null && echo yes";

/// Where the VMMs of a daemon are.
fn places(pids: &[i32]) -> HashSet<String> {
    let place = |pid: &i32| cgroups::of_process(*pid).display().to_string();
    pids.iter().map(place).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_take_vms_that_are_ready_and_others_take_their_place() {
    let (mut daemon, mut client, busybox) = daemon(Networking::Bridge, TWO).await;
    let mut table = Table::new("two VMs are kept ready");
    until_ready(&mut client, 2).await;
    let spares = daemon.vmm_pids();
    table.equal("VMs before the first pod", spares.len(), 2);
    table.equal("pods that a client sees", client.pod_ids().await.len(), 0);

    let both = [0, 1].map(|number| {
        let name = format!("taker-{number}");
        tokio::spawn(show(client.clone(), name, busybox.clone()))
    });
    let mut shown = Vec::new();
    for one in both {
        shown.push(one.await.expect("a pod"));
    }
    let [_, taken, missed] = counts(&mut client).await;
    table.equal("taken and missed", (taken, missed), (2, 0));
    for (number, (what, _)) in VALUES.iter().enumerate() {
        let all: Vec<_> = shown.iter().map(|(_, values)| &values[number]).collect();
        table.row(
            what,
            all[0] != all[1] && !all[0].is_empty(),
            format!("{all:?}"),
        );
    }
    for (pod, _) in &shown {
        let names = places(&spares);
        let is_there = names.iter().any(|place| place.contains(&pod.id));
        table.row(
            "its VM is in the pod's cgroup",
            is_there,
            format!("{names:?}"),
        );
    }
    until_ready(&mut client, 2).await;
    let all = daemon.vmm_pids();
    table.equal("VMs of two pods and two to come", all.len(), 4);
    // The first two have shown which pages are used, and the next two were given them.
    let learned = daemon.output().contains("pages that a fork uses");
    let complaints = said_by_vmms(&daemon);
    let is_ahead = learned && !complaints.contains("ahead");
    table.row("pages are mapped ahead", is_ahead, complaints);

    let victim = *all
        .iter()
        .find(|pid| !spares.contains(pid))
        .expect("a spare");
    kill(victim, "-KILL");
    until("another VM takes the place of one that ended", async || {
        let now = daemon.vmm_pids();
        let is_full = counts(&mut client).await[0] == 2;
        whether(is_full && now.len() == 4 && !now.contains(&victim), now)
    })
    .await;

    // No spare has the size of this one.
    let config = pod_config(&client, "larger", memory(300));
    let larger = client.run_pod_with(config).await.expect("run pod");
    let [_, taken, missed] = counts(&mut client).await;
    table.equal("a pod of another size takes none", (taken, missed), (2, 1));
    client.end_pod(&larger).await;

    daemon.restart().await;
    client = daemon.client().await;
    until_ready(&mut client, 2).await;
    let now = daemon.vmm_pids();
    let is_new = |pid: &&i32| !all.contains(pid);
    table.equal("VMs after the daemon was killed", now.len(), 4);
    table.equal("of these new", now.iter().filter(is_new).count(), 2);
    for (pod, _) in &shown {
        let container = only_container(&mut client, pod).await;
        let answer = client.shell(&container, REACHES_ITS_GATEWAY).await;
        table.equal("a pod reaches its gateway", answer.trim(), "yes");
        client.end_pod(pod).await;
    }
    stop(&mut daemon).await;
    table.equal("VMs after the daemon's end", daemon.vmm_pids().len(), 0);
    table.equal("directories of VMs", entries(&daemon.path("run/pods")), 0);
    table.equal("namespaces", entries(&daemon.path("run/netns")), 0);
    table.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_ready_gets_the_network_of_its_pod() {
    let (mut daemon, mut client, busybox) = daemon(Networking::Bridge, ONE).await;
    until_ready(&mut client, 1).await;
    let (pod, values) = show(client.clone(), "first".into(), busybox).await;
    assert_eq!(counts(&mut client).await[1..], [1, 0]);
    assert!(values.iter().all(|value| !value.is_empty()), "{values:?}");
    let container = only_container(&mut client, &pod).await;
    let answer = client.shell(&container, REACHES_ITS_GATEWAY).await;
    assert_eq!(answer.trim(), "yes");
    client.end_pod(&pod).await;

    until_ready(&mut client, 1).await;
    daemon.plugin("broken", FAILS_TO_ADD);
    daemon.configure_network("05-broken.conflist", BROKEN);
    let failed = client.run_pod("second").await;
    assert_fails(failed, Code::Internal, &["no network today"]);
    assert_eq!(counts(&mut client).await[1..], [2, 0]);
    until("what the failed pod had is gone", async || {
        let left = [daemon.vmm_pids().len(), entries(&daemon.path("run/netns"))];
        let is_only_a_new_spare = left.into_iter().all(|count| count <= 1);
        whether(
            is_only_a_new_spare && client.pod_ids().await.is_empty(),
            left,
        )
    })
    .await;
    stop(&mut daemon).await;
    assert!(daemon.vmm_pids().is_empty());
    assert_eq!(entries(&daemon.path("run/netns")), 0);
}

async fn only_container(client: &mut Client, pod: &Pod) -> String {
    let filter = ContainerFilter {
        pod_sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    let request = ListContainersRequest {
        filter: Some(filter),
    };
    let listed = client.runtime.list_containers(request).await;
    let mut found = listed.expect("list containers").into_inner().containers;
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0).id
}

/// What the VMMs of a daemon have logged.
fn said_by_vmms(daemon: &Daemon) -> String {
    let directories = std::fs::read_dir(daemon.path("run/pods")).expect("run directories");
    let logs = directories.flatten().map(|one| one.path().join("vmm.log"));
    logs.filter_map(|log| std::fs::read_to_string(log).ok())
        .collect()
}

/// Ends the daemon as systemd does.
async fn stop(daemon: &mut Daemon) {
    let pid = daemon.pid().expect("a daemon that runs");
    kill(i32::try_from(pid).expect("a process id"), "-TERM");
    until("the daemon has ended", async || {
        whether(daemon.has_ended(), pid)
    })
    .await;
}

fn kill(pid: i32, signal: &str) {
    let killed = std::process::Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(killed.expect("run kill").success());
}

fn entries(directory: &Path) -> usize {
    std::fs::read_dir(directory).map_or(0, Iterator::count)
}
