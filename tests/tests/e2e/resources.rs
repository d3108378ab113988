// SPDX-License-Identifier: Apache-2.0
//! Limits: they are in force in the guest and on the host and can be changed. What cannot be is refused with the
//! numbers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_proto::cri::{
    ContainerConfig, ContainerState, ContainerStatsRequest, HugepageLimit, LinuxContainerConfig,
    LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxState,
    UpdateContainerResourcesRequest, UpdatePodSandboxResourcesRequest,
};
use bulkhead_tests::cgroups::{Kubepods, cgroup_parent};
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::{Code, Status};

pub const MIB: i64 = 1 << 20;
const CGROUPS: &str = "/sys/fs/cgroup";

pub async fn daemon(config: &str) -> (Daemon, Client, String) {
    let daemon = Daemon::start_with(Networking::Loopback, config).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    (daemon, client, busybox)
}

pub fn pod_config(
    client: &Client,
    name: &str,
    resources: LinuxContainerResources,
) -> PodSandboxConfig {
    let mut config = client.pod_config(name);
    config.linux = Some(LinuxPodSandboxConfig {
        resources: Some(resources),
        ..Default::default()
    });
    config
}

pub fn sleeper(image: &str, name: &str, resources: LinuxContainerResources) -> ContainerConfig {
    let mut config = container(name, image, &["sleep", "1000"]);
    config.linux = Some(LinuxContainerConfig {
        resources: Some(resources),
        ..Default::default()
    });
    config
}

pub async fn start(client: &mut Client, pod: &Pod, config: ContainerConfig) -> String {
    let id = client.create(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    id
}

pub fn memory(mebibytes: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: mebibytes * MIB,
        ..Default::default()
    }
}

pub async fn update(
    client: &mut Client,
    id: &str,
    resources: LinuxContainerResources,
) -> Result<(), Status> {
    let request = UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: Some(resources),
        ..Default::default()
    };
    let updated = client.runtime.update_container_resources(request).await;
    updated.map(drop)
}

pub async fn resize(
    client: &mut Client,
    pod: &Pod,
    resources: LinuxContainerResources,
) -> Result<(), Status> {
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        resources: Some(resources),
        overhead: None,
    };
    let resized = client.runtime.update_pod_sandbox_resources(request).await;
    resized.map(drop)
}

/// Reads a file of a container's cgroup, from inside the container.
async fn guest_file(client: &mut Client, id: &str, file: &str) -> String {
    let text = client
        .shell(id, &format!("cat /sys/fs/cgroup/{file}"))
        .await;
    text.trim().to_owned()
}

pub async fn guest_number(client: &mut Client, id: &str, file: &str) -> i64 {
    let text = guest_file(client, id, file).await;
    text.parse().expect("a number")
}

/// Returns how many CPUs a container uses, over two seconds.
async fn cpu_share(client: &mut Client, id: &str) -> f64 {
    let request = ContainerStatsRequest {
        container_id: id.into(),
    };
    let mut sample = async || {
        let answer = client.runtime.container_stats(request.clone()).await;
        let stats = answer.expect("stats").into_inner().stats;
        let cpu = stats.and_then(|stats| stats.cpu).expect("CPU");
        let used = cpu.usage_core_nano_seconds.expect("a number").value;
        (Duration::from_nanos(used), cpu.timestamp)
    };
    let (before, from) = sample().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (after, to) = sample().await;
    let time = Duration::from_nanos(u64::try_from(to - from).expect("time goes on"));
    (after - before).as_secs_f64() / time.as_secs_f64()
}

/// The host cgroup of a daemon's only VM.
pub fn host_cgroup(daemon: &Daemon) -> PathBuf {
    let pids = daemon.vmm_pids();
    let [pid] = pids.as_slice() else {
        panic!("one VMM: {pids:?}");
    };
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup of the VMM");
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    Path::new(CGROUPS).join(path.expect("cgroup v2"))
}

fn host_file(daemon: &Daemon, file: &str) -> String {
    let text = fs::read_to_string(host_cgroup(daemon).join(file)).expect("a cgroup file");
    text.trim().to_owned()
}

fn host_memory_mib(daemon: &Daemon) -> i64 {
    let bytes: i64 = host_file(daemon, "memory.max").parse().expect("a limit");
    bytes / MIB
}

pub async fn guest_memory_mib(client: &mut Client, id: &str) -> i64 {
    let line = client.shell(id, "grep MemTotal: /proc/meminfo").await;
    let kibibytes: i64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .expect("MemTotal");
    kibibytes / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_in_force_in_the_guest_and_around_the_vm() {
    let (daemon, mut client, busybox) = daemon("").await;
    let config = pod_config(
        &client,
        "limited",
        LinuxContainerResources {
            cpu_quota: 150_000,
            cpu_period: 100_000,
            cpu_shares: 512,
            ..memory(400)
        },
    );
    let pod = client.run_pod_with(config).await.expect("run pod");
    let resources = LinuxContainerResources {
        cpu_quota: 20_000,
        cpu_period: 100_000,
        cpu_shares: 1024,
        oom_score_adj: 500,
        cpuset_cpus: "0".into(),
        unified: [("pids.max".into(), "50".into())].into(),
        ..memory(64)
    };
    let id = start(&mut client, &pod, sleeper(&busybox, "main", resources)).await;
    for (file, expected) in [
        ("memory.max", (64 * MIB).to_string()),
        ("memory.swap.max", "0".into()),
        ("cpu.max", "20000 100000".into()),
        ("cpu.weight", "39".into()),
        ("pids.max", "50".into()),
    ] {
        if file == "memory.swap.max"
            && client
                .shell(&id, "ls /sys/fs/cgroup")
                .await
                .find(file)
                .is_none()
        {
            // A guest kernel without swap has no such file.
            continue;
        }
        assert_eq!(guest_file(&mut client, &id, file).await, expected, "{file}");
    }
    let score = client.shell(&id, "cat /proc/1/oom_score_adj").await;
    assert_eq!(score.trim(), "500");
    // 400 MiB for the containers, and the guest's own share.
    let guest = guest_memory_mib(&mut client, &id).await;
    assert!((410..520).contains(&guest), "{guest} MiB");
    let host = host_memory_mib(&daemon);
    assert!(
        (guest..guest + 80).contains(&host),
        "{host} MiB around {guest} MiB"
    );
    assert_eq!(host_file(&daemon, "cpu.max"), "150000 100000");
    assert_eq!(host_file(&daemon, "cpu.weight"), "20");
    assert_eq!(host_file(&daemon, "cpuset.cpus"), "0");
    assert_ne!(host_file(&daemon, "pids.max"), "max");
    // This comes last, because it leaves no room for another process.
    let many = "i=0; while [ $i -lt 60 ]; do sleep 100 >/dev/null 2>&1 & i=$((i+1)); done";
    let answer = client.exec(&id, &["sh", "-c", many], 0).await;
    let answer = answer.expect("exec");
    let said = String::from_utf8_lossy(&answer.stderr);
    assert!(
        said.contains("can't fork"),
        "60 processes where 50 may be: {said}"
    );
    let cgroup = host_cgroup(&daemon);
    client.end_pod(&pod).await;
    assert!(!cgroup.exists());
}

/// A kubelet that runs in its own cgroup sends these keys for every container; on a node with swap, limits of swap too.
#[tokio::test(flavor = "multi_thread")]
async fn cgroup_keys_that_a_guest_lacks_are_accepted_if_their_value_is_true_anyway() {
    let (_daemon, mut client, busybox) = daemon("").await;
    let pod = client.run_pod("kubelets").await.expect("run pod");
    let of = |keys: &[(&str, &str)]| LinuxContainerResources {
        unified: keys
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        hugepage_limits: vec![HugepageLimit {
            page_size: "64KB".into(),
            limit: 0,
        }],
        ..memory(64)
    };
    let kubelets = [
        ("memory.oom.group", "1"),
        ("memory.min", "0"),
        ("memory.low", "0"),
        ("memory.swap.max", "0"),
    ];
    let id = start(&mut client, &pod, sleeper(&busybox, "main", of(&kubelets))).await;
    assert_eq!(
        guest_file(&mut client, &id, "memory.oom.group").await,
        "1",
        "what the guest has is set"
    );
    let limited_swap = of(&[("memory.swap.max", "104857600")]);
    start(
        &mut client,
        &pod,
        sleeper(&busybox, "swapping", limited_swap),
    )
    .await;
    update(&mut client, &id, of(&[("memory.swap.max", "max")]))
        .await
        .expect("update");
    for (number, (key, value, word)) in [
        ("memory.swap.max", "lots", "no swap"),
        ("hugetlb.64KB.max", "65536", "huge pages"),
        ("memory.hihg", "max", "leave this key out"),
    ]
    .into_iter()
    .enumerate()
    {
        let config = sleeper(&busybox, &format!("refused-{number}"), of(&[(key, value)]));
        let refused = client.create(&pod, config).await.expect_err(key);
        for word in [key, value, word] {
            assert!(refused.message().contains(word), "{word}: {refused:?}");
        }
    }
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containers_limits_can_be_changed_and_are_remembered() {
    let (mut daemon, mut client, busybox) = daemon("").await;
    let pod = client.run_pod("changed").await.expect("run pod");
    let id = start(&mut client, &pod, sleeper(&busybox, "main", memory(64))).await;
    let busy = client
        .run_script(&pod, "busy", &busybox, "while :; do :; done")
        .await;
    let fast = cpu_share(&mut client, &busy).await;
    let quota = LinuxContainerResources {
        cpu_quota: 10_000,
        cpu_period: 100_000,
        ..Default::default()
    };
    update(&mut client, &busy, quota).await.expect("update");
    let slow = cpu_share(&mut client, &busy).await;
    assert!(
        slow < 0.2 && slow * 2.0 < fast,
        "{fast} of a CPU, then {slow}"
    );
    client.remove(&busy).await.expect("remove");
    let change = LinuxContainerResources {
        cpu_quota: 40_000,
        cpu_period: 100_000,
        cpu_shares: 2048,
        cpuset_cpus: "0".into(),
        oom_score_adj: 700,
        unified: [("pids.max".into(), "60".into())].into(),
        ..memory(96)
    };
    update(&mut client, &id, change).await.expect("update");
    for (file, expected) in [
        ("memory.max", (96 * MIB).to_string()),
        ("cpu.max", "40000 100000".into()),
        ("cpu.weight", "79".into()),
        ("pids.max", "60".into()),
    ] {
        assert_eq!(guest_file(&mut client, &id, file).await, expected, "{file}");
    }
    let score = client.shell(&id, "cat /proc/1/oom_score_adj").await;
    assert_eq!(score.trim(), "700");
    assert_eq!(host_file(&daemon, "cpuset.cpus"), "0");
    client
        .shell(
            &id,
            "dd if=/dev/zero of=/dev/shm/x bs=1M count=40 2>/dev/null",
        )
        .await;
    assert_fails(
        update(&mut client, &id, memory(16)).await,
        Code::FailedPrecondition,
        &["16777216", "in use"],
    );
    assert_eq!(
        guest_file(&mut client, &id, "memory.max").await,
        (96 * MIB).to_string()
    );
    client.shell(&id, "rm /dev/shm/x").await;
    update(&mut client, &id, memory(32))
        .await
        .expect("there is room now");
    assert_fails(
        update(
            &mut client,
            &id,
            LinuxContainerResources {
                cpuset_cpus: "4000".into(),
                ..Default::default()
            },
        )
        .await,
        Code::InvalidArgument,
        &["cpuset_cpus", "4000"],
    );
    daemon.restart().await;
    let mut client = daemon.client().await;
    let status = client.status(&id).await.expect("status");
    let resources = status
        .resources
        .and_then(|one| one.linux)
        .expect("resources");
    assert_eq!(resources.memory_limit_in_bytes, 32 * MIB);
    assert_eq!((resources.cpu_quota, resources.cpu_shares), (40_000, 2048));
    assert_eq!(resources.unified["pids.max"], "60");
    assert_eq!(resources.cpuset_cpus, "0");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_containers_share_its_limit_which_can_be_changed() {
    let (daemon, mut client, busybox) = daemon("").await;
    let limits = LinuxContainerResources {
        // kubelet sends this for the pod, but it is meant for each container.
        unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
        ..memory(90)
    };
    let config = pod_config(&client, "shared", limits);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let calm = start(
        &mut client,
        &pod,
        sleeper(&busybox, "calm", LinuxContainerResources::default()),
    )
    .await;
    let before = host_memory_mib(&daemon);
    // The limit holds for all containers together. Only the one that takes too much is killed.
    let eater = client
        .run_script(
            &pod,
            "eater",
            &busybox,
            "awk 'BEGIN { s = \"x\"; while (1) s = s s }'",
        )
        .await;
    let status = client.exited(&eater).await;
    assert_eq!(status.exit_code, 137, "{status:?}");
    assert_eq!(status.reason, "OOMKilled");
    assert_eq!(
        client.pod_state(&pod.id).await.expect("state"),
        PodSandboxState::SandboxReady
    );
    let status = client.status(&calm).await.expect("status");
    assert_eq!(status.state(), ContainerState::ContainerRunning);

    let more = LinuxContainerResources {
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpu_shares: 2048,
        ..memory(190)
    };
    resize(&mut client, &pod, more).await.expect("resize");
    assert!(host_memory_mib(&daemon) >= before + 95);
    assert_eq!(host_file(&daemon, "cpu.max"), "50000 100000");
    assert_eq!(host_file(&daemon, "cpu.weight"), "79");
    // A limit of the pod below what is in use is refused, and nothing is killed.
    let holder = client
        .run_script(
            &pod,
            "holder",
            &busybox,
            "dd if=/dev/zero bs=90M count=1 | sleep 1000",
        )
        .await;
    until("the container fills its memory", async || {
        let used = guest_number(&mut client, &holder, "memory.current").await;
        whether(used >= 90 * MIB, used)
    })
    .await;
    assert_fails(
        resize(&mut client, &pod, memory(80)).await,
        Code::FailedPrecondition,
        &["83886080", "in use"],
    );
    let status = client.status(&holder).await.expect("status");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    assert_fails(
        resize(&mut client, &pod, memory(100 << 10)).await,
        Code::ResourceExhausted,
        &["MiB", "memory_max_mib"],
    );
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_fit_is_refused_with_the_numbers_and_leaves_nothing() {
    let (daemon, mut client, _) = daemon("").await;
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();
    let config = pod_config(&client, "vast", memory(300 << 10));
    assert_fails(
        client.run_pod_with(config.clone()).await,
        Code::ResourceExhausted,
        &["307200 MiB", "the host has"],
    );
    let mut disk = client.pod_config("disk");
    let annotation = |value: &str| {
        (
            "bulkhead.dev/ephemeral-storage".to_owned(),
            value.to_owned(),
        )
    };
    disk.annotations.extend([annotation("900Gi")]);
    assert_fails(
        client.run_pod_with(disk.clone()).await,
        Code::ResourceExhausted,
        &["921600 MiB of disk", "are free"],
    );
    disk.annotations.extend([annotation("40Ti")]);
    assert_fails(
        client.run_pod_with(disk.clone()).await,
        Code::ResourceExhausted,
        &[
            "41943040 MiB of disk",
            "at most 1048576 MiB",
            "sandbox.scratch_disk_max_gib",
        ],
    );
    disk.annotations.extend([annotation("many")]);
    assert_fails(
        client.run_pod_with(disk).await,
        Code::InvalidArgument,
        &["bulkhead.dev/ephemeral-storage", "many"],
    );
    assert!(client.pod_ids().await.is_empty());
    daemon.census().assert_equals(&before);
    // The refused pod's name is free.
    let smaller = PodSandboxConfig {
        linux: None,
        ..config
    };
    let pod = client
        .run_pod_with(smaller)
        .await
        .expect("the same pod, smaller");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ephemeral_storage_is_as_large_as_the_pod_said() {
    let (_daemon, mut client, busybox) = daemon("").await;
    let mut config = client.pod_config("small");
    config
        .annotations
        .insert("bulkhead.dev/ephemeral-storage".into(), "96Mi".into());
    let pod = client.run_pod_with(config).await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    let full = client
        .exec(
            &id,
            &["sh", "-c", "dd if=/dev/zero of=/big bs=1M count=120"],
            0,
        )
        .await
        .expect("exec");
    let said = String::from_utf8_lossy(&full.stderr);
    assert!(
        full.exit_code != 0 && said.contains("No space left"),
        "{said}"
    );
    client.shell(&id, "rm /big && echo x > /small").await;
    client.end_pod(&pod).await;
}

/// Limits of huge pages as kubelet sends them: for every page size of the host.
fn huge(mebibytes: u64) -> LinuxContainerResources {
    let limit = |page_size: &str, limit| HugepageLimit {
        page_size: page_size.into(),
        limit,
    };
    LinuxContainerResources {
        hugepage_limits: vec![limit("2MB", mebibytes << 20), limit("1GB", 0)],
        ..Default::default()
    }
}

async fn huge_pages(client: &mut Client, id: &str) -> i64 {
    let line = "grep HugePages_Total: /proc/meminfo";
    let total = client.shell(id, line).await;
    let number = total.split_whitespace().nth(1);
    number
        .and_then(|number| number.parse().ok())
        .expect("pages")
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_are_reserved_for_live_containers_though_the_pod_names_none() {
    let (_daemon, mut client, busybox) = daemon("").await;
    let pod = client.run_pod("huge").await.expect("run pod");
    let one = start(&mut client, &pod, sleeper(&busybox, "one", huge(4))).await;
    assert_eq!(huge_pages(&mut client, &one).await, 2);
    let two = start(&mut client, &pod, sleeper(&busybox, "two", huge(6))).await;
    assert_eq!(huge_pages(&mut client, &one).await, 5);
    let refused = client
        .create(&pod, sleeper(&busybox, "greedy", huge(1 << 20)))
        .await;
    let words = ["would need a VM of", "this one can have"];
    assert_fails(refused, Code::ResourceExhausted, &words);
    assert_eq!(huge_pages(&mut client, &one).await, 5, "as before");
    client.stop(&two, 0).await.expect("stop");
    let next = start(&mut client, &pod, sleeper(&busybox, "next", huge(2))).await;
    assert_eq!(huge_pages(&mut client, &one).await, 3, "not of the dead");
    for id in [&two, &next] {
        client.remove(id).await.expect("remove");
    }
    assert_eq!(huge_pages(&mut client, &one).await, 2);
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_containers_together_have_the_process_limit_of_kubelets_cgroup() {
    let (_daemon, mut client, busybox) = daemon("").await;
    let mut kubepods = Kubepods::new("pids");
    let parent = kubepods.pod("burstable", "x", &[("pids.max", "40")]);
    let mut config = pod_config(&client, "few", LinuxContainerResources::default());
    config.linux.as_mut().expect("linux").cgroup_parent = cgroup_parent(&parent);
    let pod = client.run_pod_with(config).await.expect("run pod");
    let none = LinuxContainerResources::default;
    let one = start(&mut client, &pod, sleeper(&busybox, "one", none())).await;
    let started = async |client: &mut Client, id: &str, number: u32| {
        let line = format!(
            "i=0; while [ $i -lt {number} ]; do sleep 500 >/dev/null 2>&1 & i=$((i+1)); done"
        );
        let answer = client.exec(id, &["sh", "-c", &line], 0).await;
        String::from_utf8_lossy(&answer.expect("exec").stderr).into_owned()
    };
    assert_eq!(started(&mut client, &one, 20).await, "");
    let two = start(&mut client, &pod, sleeper(&busybox, "two", none())).await;
    let said = started(&mut client, &two, 25).await;
    assert!(said.contains("can't fork"), "45 of 40 processes: {said}");
    fs::write(parent.join("pids.max"), "200").expect("another limit");
    client.stop(&two, 0).await.expect("stop");
    let three = start(&mut client, &pod, sleeper(&busybox, "three", none())).await;
    assert_eq!(started(&mut client, &three, 60).await, "");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_are_reserved_per_pod_limited_per_container_and_usable_as_a_volume() {
    let mut kubelet = Kubelet::new("uid-huge");
    let (_daemon, mut client, busybox) = daemon(&kubelet.config()).await;
    let config = pod_config(&client, "huge", huge(16));
    let pod = client.run_pod_with(config).await.expect("run pod");
    let volume = kubelet.huge_page_dir("pages", "2M");
    let config = with_mounts(
        sleeper(&busybox, "main", huge(4)),
        vec![mount(&volume, "/pages")],
    );
    let id = start(&mut client, &pod, config).await;
    let total = client
        .shell(&id, "grep HugePages_Total: /proc/meminfo")
        .await;
    assert_eq!(total.split_whitespace().nth(1), Some("8"), "{total}");
    let limit = guest_file(&mut client, &id, "hugetlb.2MB.max").await;
    assert_eq!(limit, (4 * MIB).to_string());
    let line = "fallocate -l 4194304 /pages/two; grep HugePages_Free: /proc/meminfo";
    let free = client.shell(&id, line).await;
    assert_eq!(free.split_whitespace().nth(1), Some("6"), "{free}");
    let third = ["fallocate", "-l", "2097152", "/pages/third"];
    let third = client.exec(&id, &third, 0).await.expect("exec");
    assert_ne!(third.exit_code, 0, "the container's limit holds there too");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_when_the_host_killed_the_vm_for_its_memory() {
    let (daemon, mut client, busybox) = daemon("").await;
    let pod = client.run_pod("killed").await.expect("run pod");
    let id = start(
        &mut client,
        &pod,
        sleeper(&busybox, "main", LinuxContainerResources::default()),
    )
    .await;
    // Less than the VM holds, and none of it can be reclaimed. A limit above kubelet's pods could do the same.
    fs::write(host_cgroup(&daemon).join("memory.max"), MIB.to_string()).expect("set memory.max");
    let status = client.exited(&id).await;
    assert_eq!(status.exit_code, 137, "{status:?}");
    assert!(status.message.contains("ran out of memory"), "{status:?}");
    assert_eq!(
        client.pod_state(&pod.id).await.expect("state"),
        PodSandboxState::SandboxNotready
    );
    client.end_pod(&pod).await;
}
