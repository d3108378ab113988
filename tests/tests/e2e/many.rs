// SPDX-License-Identifier: Apache-2.0
//! Many pods, one after the other and at once. Nothing is left behind.

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead_proto::cri::{
    LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxState, RunPodSandboxRequest,
};
use bulkhead_tests::cgroups::BestEffort;
use bulkhead_tests::client::{Client, Pod, assert_fails};
use bulkhead_tests::daemon::Daemon;
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status};

/// kubelet's deadline for `RunPodSandbox`.
const KUBELETS_PATIENCE: Duration = Duration::from_secs(240);
/// How many pods are made at once.
const CROWD: usize = 25;
/// How many of these are made again after the node has lost all. Fewer, to save time.
const COMEBACK: usize = 12;

async fn whole_life(mut client: Client, name: String, image: String) {
    let pod = client.run_pod(&name).await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &image, "echo I am $(hostname)")
        .await;
    assert_eq!(client.exited(&id).await.exit_code, 0);
    let log = client.log_until(&pod, "main", |log| !log.is_empty()).await;
    assert_eq!(log, format!("I am {name}\n"));
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_pods_in_a_row_and_five_at_once_leave_nothing() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    whole_life(client.clone(), "warm".into(), busybox.clone()).await;
    let before = daemon.census();
    for number in 0..20 {
        whole_life(client.clone(), format!("row-{number}"), busybox.clone()).await;
    }
    daemon.census().assert_equals(&before);
    let lives: Vec<_> = (0..5)
        .map(|number| {
            tokio::spawn(whole_life(
                client.clone(),
                format!("crowd-{number}"),
                busybox.clone(),
            ))
        })
        .collect();
    for life in lives {
        life.await.expect("a pod's life");
    }
    daemon.census().assert_equals(&before);
}

/// Asks for a pod with a deadline, as kubelet does.
async fn run_within(
    client: &mut Client,
    config: PodSandboxConfig,
    patience: Duration,
) -> Result<Pod, Status> {
    let mut request = Request::new(RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    });
    request.set_timeout(patience);
    let answer = client.runtime.run_pod_sandbox(request).await?.into_inner();
    Ok(Pod {
        id: answer.pod_sandbox_id,
        config,
    })
}

fn in_cgroup(mut config: PodSandboxConfig, cgroup_parent: String) -> PodSandboxConfig {
    config.linux = Some(LinuxPodSandboxConfig {
        cgroup_parent,
        ..Default::default()
    });
    config
}

/// Makes all sandboxes at the same time and starts a container in each, as kubelet does. Returns the pods, and their
/// numbers in the order in which they became ready.
async fn crowd(client: &Client, configs: &[PodSandboxConfig]) -> (Vec<Pod>, Vec<usize>) {
    let image = Registry::shared().image("test/busybox");
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut pods: Vec<JoinHandle<Pod>> = Vec::new();
    for (number, config) in configs.iter().cloned().enumerate() {
        let (mut client, image, order) = (client.clone(), image.clone(), Arc::clone(&order));
        pods.push(tokio::spawn(async move {
            let ran = run_within(&mut client, config, KUBELETS_PATIENCE).await;
            order.lock().expect("order").push(number);
            let pod = ran.expect("run pod");
            client
                .run_script(&pod, "main", &image, "exec sleep 10000")
                .await;
            pod
        }));
        // A pause, so that the order of the calls is known.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut up = Vec::new();
    for pod in pods {
        up.push(pod.await.expect("a pod's start"));
    }
    let order = order.lock().expect("order").clone();
    (up, order)
}

/// Asserts that pods became ready in the order of their calls, except for those that boot at the same time and for
/// calls that overtook each other on the way.
fn assert_fair(order: &[usize]) {
    const OVERTAKEN: usize = 4;
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    for (place, number) in order.iter().enumerate() {
        assert!(place.abs_diff(*number) <= cpus + OVERTAKEN, "{order:?}");
    }
}

async fn end_all(client: &Client, pods: Vec<Pod>) {
    let ends: Vec<_> = pods
        .into_iter()
        .map(|pod| {
            let mut client = client.clone();
            tokio::spawn(async move { client.end_pod(&pod).await })
        })
        .collect();
    for end in ends {
        end.await.expect("a pod's end");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_best_effort_pods_at_once_become_ready_also_after_the_node_has_lost_all_vms() {
    let mut cgroups = BestEffort::new("many");
    let mut daemon = Daemon::start_with(
        bulkhead_tests::daemon::Networking::Bridge,
        "sandbox.boot_timeout_seconds = 60",
    )
    .await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    whole_life(client.clone(), "warm".into(), busybox.clone()).await;
    let mut configs: Vec<_> = (0..CROWD)
        .map(|number| {
            let name = format!("crowd-{number}");
            in_cgroup(client.pod_config(&name), cgroups.pod(&name, 1))
        })
        .collect();
    let before = daemon.census();
    let started = Instant::now();
    let (pods, order) = crowd(&client, &configs).await;
    assert_fair(&order);
    eprintln!("{CROWD} pods at once: {:?}", started.elapsed());

    daemon.kill();
    for pid in daemon.vmm_pids() {
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
        assert!(killed.expect("kill a VMM").success());
    }
    daemon.restart().await;
    let mut client = daemon.client().await;
    for pod in &pods {
        assert_eq!(
            client.pod_state(&pod.id).await.expect("state"),
            PodSandboxState::SandboxNotready
        );
    }
    // kubelet stops the dead sandboxes and makes new ones, all at the same time.
    configs.truncate(COMEBACK);
    for config in &mut configs {
        config.metadata.as_mut().expect("metadata").attempt = 1;
    }
    let started = Instant::now();
    let stops: Vec<_> = pods
        .iter()
        .map(|pod| {
            let (mut client, id) = (client.clone(), pod.id.clone());
            tokio::spawn(async move { client.stop_pod(&id).await })
        })
        .collect();
    // The stops load the host meanwhile, so the order of the calls is not known.
    let (again, _) = crowd(&client, &configs).await;
    for stop in stops {
        stop.await.expect("task").expect("stop a dead pod");
    }
    eprintln!("{COMEBACK} pods that come back: {:?}", started.elapsed());
    let started = Instant::now();
    end_all(&client, pods.into_iter().chain(again).collect()).await;
    eprintln!("their end: {:?}", started.elapsed());
    daemon.census().assert_equals_but_for_processes(&before);
}

/// Asks for a pod in a task. Aborting the task cancels the call.
fn ask(client: &Client, name: &str) -> JoinHandle<Result<Pod, Status>> {
    let mut client = client.clone();
    let name = name.to_owned();
    tokio::spawn(async move { client.run_pod(&name).await })
}

/// Waits until the daemon has VMs, or none.
async fn until_vms(daemon: &Daemon, are_there: bool) {
    let what = if are_there {
        "there is a VM"
    } else {
        "all VMs have ended"
    };
    until(what, async || {
        let pids = daemon.vmm_pids();
        whether(pids.is_empty() != are_there, pids)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_gives_up_leaves_the_queue_and_its_boot_ends() {
    let daemon = Daemon::start_with(
        bulkhead_tests::daemon::Networking::Bridge,
        // A boot keeps the others waiting for longer than a fork does.
        "sandbox.parallel_boots = 1\nsandbox.templates_mib = 0",
    )
    .await;
    let mut client = daemon.client().await;
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();

    let boots = ask(&client, "boots");
    until_vms(&daemon, true).await;
    let leaves = ask(&client, "queued");
    let others: Vec<_> = ["b", "c"].map(|name| ask(&client, name)).into();
    // A pause, so that these are in the queue before the next call.
    tokio::time::sleep(Duration::from_millis(50)).await;
    // A caller with a deadline learns what it waited for. A quarter of its time is left for the answer to reach it.
    let config = client.pod_config("impatient");
    assert_fails(
        run_within(&mut client, config, Duration::from_millis(1600)).await,
        Code::Unavailable,
        &["4 pods were before it, 1 boot at a time", "waited"],
    );
    leaves.abort();
    assert!(leaves.await.expect_err("aborted").is_cancelled());
    // The name is free as soon as the daemon hears of that, and the next call joins the end of the queue.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let again = client.run_pod("queued").await.expect("the name is free");
    let mut pods = vec![again, boots.await.expect("task").expect("boots")];
    for other in others {
        pods.push(other.await.expect("task").expect("a pod that waited"));
    }
    end_all(&client, pods).await;
    daemon.census().assert_equals(&before);

    let gives_up = ask(&client, "given-up");
    until_vms(&daemon, true).await;
    gives_up.abort();
    until_vms(&daemon, false).await;
    until("nothing is left", async || {
        let now = daemon.census();
        if now == before {
            Ok(())
        } else {
            Err(now.to_string())
        }
    })
    .await;
    assert!(
        daemon.output().matches("pod ready").count() == 5,
        "the pod whose caller gave up became ready: {}",
        daemon.output()
    );
    let again = client.run_pod("given-up").await.expect("the name is free");
    client.end_pod(&again).await;
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_without_cpu_may_boot_for_longer_than_its_limit() {
    let mut cgroups = BestEffort::new("starved");
    let daemon = Daemon::start_with(
        bulkhead_tests::daemon::Networking::Loopback,
        "sandbox.boot_timeout_seconds = 20",
    )
    .await;
    let mut client = daemon.client().await;
    let calm = client.run_pod("calm").await.expect("a boot takes less");
    client.end_pod(&calm).await;
    cgroups.hog();
    let config = in_cgroup(client.pod_config("starved"), cgroups.pod("starved", 8));
    let started = Instant::now();
    let pod = client.run_pod_with(config).await.expect("run pod");
    eprintln!("a fourteenth of a CPU: {:?}", started.elapsed());
    cgroups.calm();
    client.end_pod(&pod).await;
}
