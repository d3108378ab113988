// SPDX-License-Identifier: Apache-2.0
//! Guests that stop without a word (issue 13, points 9 and 15): they are noticed and told from guests that only get no
//! CPU, what waits for them ends, and nobody else waits.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::cri::{
    ContainerState, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    ListContainerStatsRequest, PodSandboxState, PodSandboxStatusRequest,
};
use bulkhead_tests::cgroups;
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

/// How long a dead guest may go unnoticed if what it does is proof. The issue asks for 10 s; the rest is the slow host's.
const NOTICED: Duration = Duration::from_secs(20);
/// Longer than it takes to find a guest dead that sleeps.
const LONG_SILENCE: Duration = Duration::from_secs(75);

/// Waits until the pod is not ready. Returns why.
async fn until_lost(client: &mut Client, pod: &Pod) -> String {
    until("the pod is not ready", async || {
        let state = client.pod_state(&pod.id).await.expect("state");
        whether(state == PodSandboxState::SandboxNotready, state)
    })
    .await;
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let answer = client.runtime.pod_sandbox_status(request).await;
    format!("{:?}", answer.expect("status").into_inner().info)
}

fn signal(pid: i32, name: &str) {
    let sent = Command::new("kill")
        .args([name, &pid.to_string()])
        .status()
        .expect("kill");
    assert!(sent.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vmm_is_noticed_and_nobody_waits_for_it() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let before = daemon.census();
    let victim = client.run_pod("victim").await.expect("run pod");
    let pid = daemon.vmm_pids()[0];
    let sleep = "exec sleep 10000";
    let id = client.run_script(&victim, "main", &busybox, sleep).await;
    let other = client.run_pod("other").await.expect("run pod");
    let alive = client.run_script(&other, "main", &busybox, sleep).await;

    signal(pid, "-STOP");
    let stopped = Instant::now();
    let mut waiting = daemon.client().await;
    let of_victim = id.clone();
    let exec = tokio::spawn(async move { waiting.exec(&of_victim, &["true"], 2).await });
    let mut stopping = daemon.client().await;
    let of_victim = id.clone();
    let stop = tokio::spawn(async move { stopping.stop(&of_victim, 1000).await });
    let said = until_lost(&mut client, &victim).await;
    assert!(stopped.elapsed() < NOTICED, "{:?}", stopped.elapsed());
    assert!(said.contains("threads are stopped"), "{said}");
    let ended = client.exited(&id).await;
    assert_eq!(ended.exit_code, 137, "{ended:?}");
    // A stop with a long grace period has ended with the VM, and so has an exec.
    stop.await.expect("join").expect("stop");
    exec.await.expect("join").expect_err("exec");
    assert!(stopped.elapsed() < NOTICED + Duration::from_secs(5));

    let request = ListContainerStatsRequest::default();
    let stats = client.runtime.list_container_stats(request).await;
    let stats = stats.expect("statistics").into_inner().stats;
    let used = stats.iter().filter(|one| one.cpu.is_some());
    let used: Vec<_> = used.filter_map(|one| one.attributes.as_ref()).collect();
    assert_eq!(used.len(), 1, "{used:?}");
    assert_eq!(used[0].id, alive);
    assert_eq!(client.shell(&alive, "echo here").await, "here\n");
    client.end_pod(&victim).await;
    client.end_pod(&other).await;
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_guest_does_not_answer_is_stopped_and_removed_at_once_when_asked() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    // Only then has the daemon's look at KVM ended.
    let first = client.run_pod("first").await.expect("run pod");
    client.end_pod(&first).await;
    let before = daemon.census();
    let pod = client.run_pod("victim").await.expect("run pod");
    signal(daemon.vmm_pids()[0], "-STOP");
    let stopped = Instant::now();
    client.stop_pod(&pod.id).await.expect("stop");
    client.remove_pod(&pod.id).await.expect("remove");
    assert!(stopped.elapsed() < NOTICED, "{:?}", stopped.elapsed());
    daemon.census().assert_equals(&before);
}

/// A privileged container can panic its own kernel, which then spins for ever if it set `kernel.panic` to 0.
#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_spins_is_noticed() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let mut config = client.pod_config("spins");
    let context = config.linux.get_or_insert_default();
    let context = context.security_context.get_or_insert_default();
    context.privileged = true;
    let pod = client.run_pod_with(config).await.expect("run pod");
    let script = "echo 0 > /proc/sys/kernel/panic && echo 2 > /proc/sys/vm/panic_on_oom && \
                  exec awk 'BEGIN { s = \"x\"; while (1) s = s s }'";
    let mut config = container("main", &busybox, &["sh", "-c", script]);
    config.linux = Some(LinuxContainerConfig {
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            ..Default::default()
        }),
        security_context: Some(LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        }),
    });
    let id = client.create_as_it_is(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let said = until_lost(&mut client, &pod).await;
    assert!(said.contains("has not answered"), "{said}");
    assert!(said.contains("vCPUs ran"), "{said}");
    client.end_pod(&pod).await;
}

/// A starved guest is not a dead one.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_gets_hardly_any_cpu_stays_ready() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("starved").await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &busybox, "while :; do :; done")
        .await;
    let limit = cgroups::of_process(daemon.vmm_pids()[0]).join("cpu.max");
    let usual = fs::read_to_string(&limit).expect("read the limit");
    fs::write(&limit, "1000 1000000").expect("set a limit");
    let starved = Instant::now();
    while starved.elapsed() < LONG_SILENCE {
        assert_fails(
            client.exec(&id, &["true"], 10).await,
            Code::DeadlineExceeded,
            &[],
        );
        let state = client.pod_state(&pod.id).await.expect("state");
        assert_eq!(state, PodSandboxState::SandboxReady);
    }
    fs::write(&limit, usual.trim()).expect("restore the limit");
    until("the container answers again", async || {
        let answer = client.exec(&id, &["echo", "here"], 20).await;
        whether(answer.is_ok(), answer)
    })
    .await;
    let status = client.status(&id).await.expect("status");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    client.end_pod(&pod).await;
}

/// A kernel whose only instructions are `cli`, `hlt` and a jump to the latter.
fn kernel_that_halts() -> Vec<u8> {
    const AT: u64 = 16 << 20;
    const HEADERS: u64 = 64 + 56;
    let code = [0xfa, 0xf4, 0xeb, 0xfd];
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    for long in [AT, 64, 0] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1u32, 5] {
        elf.extend(word.to_le_bytes());
    }
    let bytes = code.len() as u64;
    for long in [HEADERS, AT, AT, bytes, bytes, 4096] {
        elf.extend(long.to_le_bytes());
    }
    assert_eq!(elf.len() as u64, HEADERS);
    elf.extend(code);
    elf
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_halts_ends_its_vm() {
    let kernel = tempfile::NamedTempFile::new().expect("file");
    fs::write(kernel.path(), kernel_that_halts()).expect("write");
    let line = format!(
        "kernel = \"{}\"\nsandbox.templates_mib = 0",
        kernel.path().display()
    );
    let daemon = Daemon::start_with(Networking::Loopback, &line).await;
    let mut client = daemon.client().await;
    let started = Instant::now();
    let error = client.run_pod("halts").await.expect_err("it halts");
    assert!(started.elapsed() < NOTICED, "{:?}", started.elapsed());
    assert!(error.message().contains("GuestHalted"), "{error:?}");
    assert!(client.pod_ids().await.is_empty());
}
