// SPDX-License-Identifier: Apache-2.0
//! VMs that get and give back memory while they run, in cgroups like kubelet's and with kubelet's order of calls.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_proto::cri::{
    ContainerState, LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig,
    UpdatePodSandboxResourcesRequest,
};
use bulkhead_tests::cgroups::{Kubepods, cgroup_parent};
use bulkhead_tests::client::{Client, Pod, assert_fails};
use tonic::{Code, Status};

use super::resources::{
    MIB, daemon, guest_memory_mib, guest_number, host_cgroup, memory, sleeper, start, update,
};

const OVERHEAD: i64 = 180 * MIB;
/// The limit that kubelet sends for a pod without one; it reads "max" from its cgroup.
const NONE: i64 = -1;

fn pod_below(
    client: &Client,
    name: &str,
    cgroup: &Path,
    resources: LinuxContainerResources,
    overhead: i64,
) -> PodSandboxConfig {
    let mut config = client.pod_config(name);
    config.linux = Some(LinuxPodSandboxConfig {
        cgroup_parent: cgroup_parent(cgroup),
        resources: Some(LinuxContainerResources {
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..resources
        }),
        overhead: Some(LinuxContainerResources {
            memory_limit_in_bytes: overhead,
            ..Default::default()
        }),
        ..Default::default()
    });
    config
}

async fn resize(
    client: &mut Client,
    pod: &Pod,
    resources: LinuxContainerResources,
    overhead: i64,
) -> Result<(), Status> {
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        resources: Some(resources),
        overhead: Some(LinuxContainerResources {
            memory_limit_in_bytes: overhead,
            ..Default::default()
        }),
    };
    let resized = client.runtime.update_pod_sandbox_resources(request).await;
    resized.map(drop)
}

fn number(path: PathBuf) -> i64 {
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.trim().parse().expect("a number")
}

fn bytes(mebibytes: i64) -> String {
    (mebibytes * MIB).to_string()
}

/// A script that touches so much memory at once and exits with 0.
pub fn fill(mebibytes: i64) -> String {
    format!("dd if=/dev/zero of=/dev/null bs={mebibytes}M count=1")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_overhead_has_exactly_its_limit_and_its_vm_is_beside_kubelets_cgroup() {
    let (daemon, mut client, busybox) = daemon("").await;
    let mut kubepods = Kubepods::new("small");
    let tight = kubepods.pod("burstable", "tight", &[("memory.max", &bytes(64))]);
    let config = pod_below(&client, "tight", &tight, memory(64), 0);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let home = host_cgroup(&daemon);
    assert_eq!(home.parent(), tight.parent(), "beside kubelet's");
    let bound = number(home.join("memory.max")) / MIB;
    assert!((165..240).contains(&bound), "{bound} MiB");
    let id = start(&mut client, &pod, sleeper(&busybox, "main", memory(64))).await;
    assert_eq!(guest_number(&mut client, &id, "memory.max").await, 64 * MIB);
    // The container can use all of its limit and no more.
    let within = client.exec(&id, &["sh", "-c", &fill(50)], 0).await;
    assert_eq!(within.expect("exec").exit_code, 0);
    let beyond = client.exec(&id, &["sh", "-c", &fill(70)], 0).await;
    assert_ne!(beyond.expect("exec").exit_code, 0);
    client.end_pod(&pod).await;

    let wide = kubepods.pod("burstable", "wide", &[("memory.max", &bytes(64 + 180))]);
    let config = pod_below(&client, "wide", &wide, memory(64), OVERHEAD);
    let pod = client.run_pod_with(config).await.expect("run pod");
    assert_eq!(host_cgroup(&daemon).parent(), Some(wide.as_path()));
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_limit_grows_when_programs_need_memory_and_not_for_page_cache() {
    let (_daemon, mut client, busybox) = daemon("sandbox.memory_mib = 160\n").await;
    let mut kubepods = Kubepods::new("free");
    // One container has a limit, which kubelet sends as the pod's, but the pod's cgroup is not limited.
    let cgroup = kubepods.pod("burstable", "free", &[]);
    let config = pod_below(&client, "free", &cgroup, memory(64), 0);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let calm = start(&mut client, &pod, sleeper(&busybox, "calm", memory(64))).await;
    let before = guest_memory_mib(&mut client, &calm).await;
    let eater = client
        .run_script(&pod, "eater", &busybox, &fill(before + 50))
        .await;
    let status = client.exited(&eater).await;
    assert_eq!(status.exit_code, 0, "{status:?}");
    let after = guest_memory_mib(&mut client, &calm).await;
    assert!(after > before + 100, "{before} MiB, then {after}");
    // Page cache alone does not make the VM grow.
    let reader = client
        .run_script(
            &pod,
            "reader",
            &busybox,
            "dd if=/dev/zero of=/big bs=1M count=300 && cat /big >/dev/null",
        )
        .await;
    assert_eq!(client.exited(&reader).await.exit_code, 0);
    let cached = guest_memory_mib(&mut client, &calm).await;
    assert_eq!(cached, after, "grown for page cache");
    let status = client.status(&calm).await.expect("status");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_that_a_container_requests_is_there_when_it_starts() {
    let (_daemon, mut client, busybox) = daemon("").await;
    let mut kubepods = Kubepods::new("request");
    let cgroup = kubepods.pod("burstable", "request", &[]);
    let config = pod_below(&client, "request", &cgroup, memory(0), 0);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let total = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let total: i64 = total
        .split_whitespace()
        .nth(1)
        .and_then(|kibibytes| kibibytes.parse().ok())
        .expect("MemTotal");
    let requested = 1024;
    // kubelet's formula.
    let resources = LinuxContainerResources {
        oom_score_adj: 1000 - 1000 * (requested << 10) / total,
        ..Default::default()
    };
    let id = start(&mut client, &pod, sleeper(&busybox, "main", resources)).await;
    let seen = guest_memory_mib(&mut client, &id).await;
    assert!((requested..requested + 256).contains(&seen), "{seen} MiB");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_resized_in_kubelets_order_of_calls() {
    let (daemon, mut client, busybox) = daemon("").await;
    let mut kubepods = Kubepods::new("resize");
    let cgroup = kubepods.pod("burstable", "resize", &[("memory.max", &bytes(64 + 180))]);
    let config = pod_below(&client, "resize", &cgroup, memory(64), OVERHEAD);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let id = start(&mut client, &pod, sleeper(&busybox, "main", memory(64))).await;
    let before = guest_memory_mib(&mut client, &id).await;

    // Up, in kubelet's order: the sandbox, kubelet's cgroup, the container.
    resize(&mut client, &pod, memory(200), OVERHEAD)
        .await
        .expect("grow the pod");
    fs::write(cgroup.join("memory.max"), bytes(200 + 180)).expect("kubelet's write");
    update(&mut client, &id, memory(200)).await.expect("grow");
    assert!(guest_memory_mib(&mut client, &id).await > before + 100);
    let filled = client.exec(&id, &["sh", "-c", &fill(120)], 0).await;
    assert_eq!(filled.expect("exec").exit_code, 0);
    // The guest now holds page cache and memory that it touched and freed. It must give both back.
    client
        .shell(&id, "dd if=/dev/zero of=/cache bs=1M count=150")
        .await;

    // Down: the container, the sandbox, kubelet's cgroup. If the VM held more than that allows, the kernel would kill
    // it.
    update(&mut client, &id, memory(64)).await.expect("shrink");
    resize(&mut client, &pod, memory(64), OVERHEAD)
        .await
        .expect("shrink the pod");
    let held = number(cgroup.join("memory.current")) / MIB;
    assert!(held <= 64 + 180, "the VM still holds {held} MiB");
    fs::write(cgroup.join("memory.max"), bytes(64 + 180)).expect("kubelet's write");
    let status = client.status(&id).await.expect("status");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    assert_eq!(guest_number(&mut client, &id, "memory.max").await, 64 * MIB);

    // A CPU resize of the pod: kubelet sends all values, memory unchanged.
    let cpu = LinuxContainerResources {
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpu_shares: 998,
        ..memory(64)
    };
    resize(&mut client, &pod, cpu, OVERHEAD).await.expect("CPU");
    let home = host_cgroup(&daemon);
    let max = fs::read_to_string(home.join("cpu.max")).expect("cpu.max");
    assert_eq!(max.trim(), "50000 100000");
    // The VM of such a limit would need more than the overhead. The error says so.
    assert_fails(
        resize(&mut client, &pod, memory(4096), OVERHEAD).await,
        Code::ResourceExhausted,
        &["overhead", "180 MiB"],
    );
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_without_overhead_or_without_a_limit_can_be_resized_too() {
    let (daemon, mut client, busybox) = daemon("").await;
    let mut kubepods = Kubepods::new("bare");
    // A pod with limits and without overhead: only its CPU limit changes.
    let tight = kubepods.pod("burstable", "tight", &[("memory.max", &bytes(64))]);
    let config = pod_below(&client, "tight", &tight, memory(64), 0);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let cpu = |memory_limit_in_bytes| LinuxContainerResources {
        cpu_quota: 30_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        memory_limit_in_bytes,
        ..Default::default()
    };
    resize(&mut client, &pod, cpu(64 * MIB), 0)
        .await
        .expect("CPU alone");
    resize(&mut client, &pod, memory(100), 0)
        .await
        .expect("memory beside kubelet's cgroup");
    let bound = number(host_cgroup(&daemon).join("memory.max")) / MIB;
    assert!(bound > 200, "{bound} MiB");
    client.end_pod(&pod).await;

    // One container has no limit. kubelet reads "max" from its cgroup as -1, and subtracts the overhead from that.
    let free = kubepods.pod("burstable", "free", &[]);
    let config = pod_below(&client, "free", &free, memory(64), OVERHEAD);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let id = start(&mut client, &pod, sleeper(&busybox, "main", memory(0))).await;
    for none in [NONE, NONE - OVERHEAD] {
        resize(&mut client, &pod, cpu(none), OVERHEAD)
            .await
            .unwrap_or_else(|e| panic!("{none}: {e}"));
    }
    let home = host_cgroup(&daemon);
    let max = fs::read_to_string(home.join("memory.max")).expect("memory.max");
    assert_eq!(max.trim(), "max");
    // The pod gets a limit.
    resize(&mut client, &pod, memory(100), OVERHEAD)
        .await
        .expect("a limit");
    let held = client.exec(&id, &["sh", "-c", &fill(130)], 0).await;
    assert_ne!(held.expect("exec").exit_code, 0, "the pod's limit holds");
    client.end_pod(&pod).await;
}
