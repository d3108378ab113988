// SPDX-License-Identifier: Apache-2.0
//! Statistics, metrics and events. They agree with the guest's own numbers, and no call waits for a guest that does not
//! answer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bulkhead_proto::cri::{
    ContainerEventResponse, ContainerEventType, ContainerStats, ContainerStatsFilter,
    ContainerStatsRequest, GetEventsRequest, LinuxContainerConfig, LinuxContainerResources,
    ListContainerStatsRequest, ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest,
    ListPodSandboxStatsRequest, PodSandboxStats, PodSandboxStatsRequest,
    StreamContainerStatsRequest, StreamPodSandboxMetricsRequest, StreamPodSandboxStatsRequest,
    UInt64Value,
};
use bulkhead_tests::cgroups;
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{PATIENCE, until, whether};
use tonic::{Code, Streaming};

const MIB: u64 = 1 << 20;

async fn daemon_with_busybox(networking: Networking) -> (Daemon, Client, String) {
    let daemon = Daemon::start_with(networking, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    (daemon, client, busybox)
}

async fn stats(client: &mut Client, id: &str) -> ContainerStats {
    let request = ContainerStatsRequest {
        container_id: id.into(),
    };
    let answer = client.runtime.container_stats(request).await;
    let answer = answer.expect("container stats").into_inner();
    answer.stats.expect("stats in the answer")
}

async fn list(client: &mut Client, filter: Option<ContainerStatsFilter>) -> Vec<ContainerStats> {
    let request = ListContainerStatsRequest { filter };
    let answer = client.runtime.list_container_stats(request).await;
    answer.expect("list container stats").into_inner().stats
}

async fn pod_stats(client: &mut Client, pod: &Pod) -> PodSandboxStats {
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let answer = client.runtime.pod_sandbox_stats(request).await;
    let answer = answer.expect("pod stats").into_inner();
    answer.stats.expect("stats in the answer")
}

fn number(value: Option<UInt64Value>) -> u64 {
    value.expect("a number").value
}

fn cpu_ns(stats: &ContainerStats) -> u64 {
    number(stats.cpu.as_ref().expect("CPU").usage_core_nano_seconds)
}

fn working_set(stats: &ContainerStats) -> u64 {
    number(stats.memory.as_ref().expect("memory").working_set_bytes)
}

fn id_of(stats: &ContainerStats) -> &str {
    &stats.attributes.as_ref().expect("attributes").id
}

/// Reads the value of a line `key value` in a file of a container's cgroup.
async fn cgroup_value(client: &mut Client, id: &str, file: &str, key: &str) -> u64 {
    let text = client
        .shell(id, &format!("cat /sys/fs/cgroup/{file}"))
        .await;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let line = line.unwrap_or_else(|| panic!("{key} in {file}: {text}"));
    line.trim().parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containers_cpu_time_is_that_of_its_guest_and_rises() {
    let (_daemon, mut client, busybox) = daemon_with_busybox(Networking::Loopback).await;
    let pod = client.run_pod("busy").await.expect("run pod");
    let busy = client
        .run_script(&pod, "busy", &busybox, "while :; do :; done")
        .await;
    let idle = client
        .run_script(&pod, "idle", &busybox, "exec sleep 1000")
        .await;
    let before = cgroup_value(&mut client, &busy, "cpu.stat", "usage_usec ").await * 1000;
    let first = stats(&mut client, &busy).await;
    let after = cgroup_value(&mut client, &busy, "cpu.stat", "usage_usec ").await * 1000;
    assert!(
        (before..=after).contains(&cpu_ns(&first)),
        "{before} <= {} <= {after}",
        cpu_ns(&first)
    );
    // CPU time is measured over a while, here and below.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let second = stats(&mut client, &busy).await;
    assert!(cpu_ns(&second) > cpu_ns(&first));
    let cpu = second.cpu.as_ref().expect("CPU");
    assert!(number(cpu.usage_nano_cores) > 50_000_000, "{cpu:?}");
    assert!(cpu.timestamp > first.cpu.as_ref().expect("CPU").timestamp);
    assert!(
        cpu.psi.as_ref().is_some_and(|psi| psi.some.is_some()),
        "{cpu:?}"
    );
    // Both containers are compared over the same time.
    let idle_before = cpu_ns(&stats(&mut client, &idle).await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let idle_after = stats(&mut client, &idle).await;
    let third = stats(&mut client, &busy).await;
    let idled = cpu_ns(&idle_after) - idle_before;
    let busied = cpu_ns(&third) - cpu_ns(&second);
    assert!(idled * 4 < busied, "idle {idled}, busy {busied}");
    let of_pod = pod_stats(&mut client, &pod).await.linux.expect("linux");
    for stats in [
        third.memory.as_ref().expect("memory").psi.as_ref(),
        third.io.as_ref().expect("I/O").psi.as_ref(),
    ] {
        assert!(stats.is_some_and(|psi| psi.full.is_some()), "{third:?}");
    }
    // The pod's pressure, if the host's kernel counts it.
    if std::path::Path::new("/proc/pressure/cpu").exists() {
        let psi = of_pod.cpu.as_ref().and_then(|cpu| cpu.psi.as_ref());
        let waited = psi.and_then(|psi| psi.some.as_ref()).expect("CPU");
        assert!(waited.total > 0, "two busy processes on one CPU: {psi:?}");
        let memory = of_pod.memory.as_ref().expect("memory");
        let io = of_pod.io.as_ref().expect("I/O");
        assert!(memory.psi.is_some() && io.psi.is_some(), "{of_pod:?}");
    }
    let pod_ns = number(of_pod.cpu.expect("CPU").usage_core_nano_seconds);
    assert!(
        pod_ns > cpu_ns(&third),
        "the VM costs more than its container: {pod_ns}"
    );
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cpu_time_that_the_host_gave_to_others_does_not_count_for_a_container() {
    let (_daemon, mut client, busybox) = daemon_with_busybox(Networking::Loopback).await;
    // Two busy pods want more than one CPU. On a host with more CPUs this test shows less.
    let mut busy = Vec::new();
    for name in ["one", "two"] {
        let pod = client.run_pod(name).await.expect("run pod");
        let script = "while :; do :; done";
        let id = client.run_script(&pod, name, &busybox, script).await;
        busy.push((pod, id));
    }
    let (pod, id) = &busy[0];
    let of_pod = async |client: &mut Client| {
        let linux = pod_stats(client, pod).await.linux.expect("linux");
        number(linux.cpu.expect("CPU").usage_core_nano_seconds)
    };
    // Take the host's figures before and after the guest's.
    let pod_before = of_pod(&mut client).await;
    let before = cpu_ns(&stats(&mut client, id).await);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let used = cpu_ns(&stats(&mut client, id).await) - before;
    let pod_used = of_pod(&mut client).await - pod_before;
    assert!(
        used > 1_000_000_000 && used <= pod_used,
        "{used} ns in the guest, {pod_used} ns on the host"
    );
    for (pod, _) in &busy {
        client.end_pod(pod).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_follows_an_allocation_and_the_writable_layer_what_is_written() {
    let (daemon, mut client, busybox) = daemon_with_busybox(Networking::Loopback).await;
    let pod = client.run_pod("eater").await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    let before = stats(&mut client, &id).await;
    // Memory in /dev/shm cannot be reclaimed. The file is page cache, which can be.
    client
        .shell(
            &id,
            "dd if=/dev/zero of=/dev/shm/x bs=1M count=24 2>/dev/null",
        )
        .await;
    client
        .shell(
            &id,
            "dd if=/dev/zero of=/written bs=1M count=12 2>/dev/null && mkdir /a /a/b && sync",
        )
        .await;
    let after = stats(&mut client, &id).await;
    let grown = working_set(&after).saturating_sub(working_set(&before));
    assert!(
        (22 * MIB..44 * MIB).contains(&grown),
        "working set grew by {grown}"
    );
    let usage = number(after.memory.as_ref().expect("memory").usage_bytes);
    let current = cgroup_value(&mut client, &id, "memory.current", "").await;
    assert!(usage.abs_diff(current) < 4 * MIB, "{usage} and {current}");
    let layer = |stats: &ContainerStats| {
        let layer = stats.writable_layer.clone().expect("writable layer");
        (
            layer,
            number(stats.writable_layer.as_ref().and_then(|one| one.used_bytes)),
        )
    };
    let (old, old_bytes) = layer(&before);
    let (usage, bytes) = until("the layer has grown by 12 MiB", async || {
        let now = stats(&mut client, &id).await;
        let (usage, bytes) = layer(&now);
        whether(bytes >= old_bytes + 12 * MIB, &usage).map(|()| (usage, bytes))
    })
    .await;
    assert!(bytes < old_bytes + 13 * MIB, "{usage:?}");
    let inodes = number(usage.inodes_used);
    assert!(inodes >= number(old.inodes_used) + 3, "{usage:?}");
    let mountpoint = usage.fs_id.expect("a file system").mountpoint;
    assert!(mountpoint.starts_with(&daemon.path("state").display().to_string()));
    // On the host, the pod's VM uses more memory than its container.
    let of_pod = pod_stats(&mut client, &pod).await.linux.expect("linux");
    let memory = of_pod.memory.expect("memory");
    assert!(
        number(memory.working_set_bytes) > working_set(&after),
        "{memory:?}"
    );
    let cgroup = format!("/sys/fs/cgroup/bulkhead/pod-{}/memory.current", pod.id);
    let host: u64 = std::fs::read_to_string(&cgroup)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .expect(&cgroup);
    let said = number(memory.usage_bytes);
    assert!(
        said.abs_diff(host) < 8 * MIB,
        "the VM's cgroup has {host} bytes, the statistics say {said}"
    );
    assert!(number(of_pod.process.expect("processes").process_count) >= 1);
    assert_eq!(of_pod.containers.len(), 1);
    client.end_pod(&pod).await;
}

/// Issue 13, point 4. What is deleted but open takes room on the node, and no count of names in the guest finds it.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_host_counts_is_the_floor_of_the_writable_layers() {
    let (_daemon, mut client, busybox) = daemon_with_busybox(Networking::Loopback).await;
    let mut config = client.pod_config("hidden");
    let annotations = &mut config.annotations;
    annotations.insert("bulkhead.dev/ephemeral-storage".into(), "256Mi".into());
    let pod = client.run_pod_with(config).await.expect("run pod");
    let script = "exec 3>/hidden; rm /hidden; dd if=/dev/zero bs=1M count=64 >&3; sync; touch /ready; \
        until [ -e /end ]; do sleep 0.2; done; exec 3>&-; exec sleep 1000";
    let hiding = client.run_script(&pod, "hiding", &busybox, script).await;
    let other = client
        .run_script(&pod, "other", &busybox, "exec sleep 1000")
        .await;
    let layers = async |client: &mut Client| {
        let mut layers = [0; 2];
        for (layer, id) in layers.iter_mut().zip([&hiding, &other]) {
            let layer_of = stats(client, id).await.writable_layer;
            *layer = number(layer_of.expect("writable layer").used_bytes);
        }
        layers
    };
    until("the file is written", async || {
        let done = client.exec(&hiding, &["test", "-e", "/ready"], 0).await;
        let code = done.expect("exec").exit_code;
        whether(code == 0, code)
    })
    .await;
    // The file system itself may take 16 MiB and a 64th of the disk.
    until("what is hidden is counted once", async || {
        let both = layers(&mut client).await;
        let sum = both.iter().sum::<u64>();
        whether((44 * MIB..66 * MIB).contains(&sum), both)
    })
    .await;
    client.shell(&hiding, "touch /end").await;
    until("what is freed is not counted", async || {
        let both = layers(&mut client).await;
        whether(both.iter().sum::<u64>() < MIB, both)
    })
    .await;
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn network_counters_are_the_hosts_and_rise_with_what_the_pod_sends() {
    let (_daemon, mut client, busybox) = daemon_with_busybox(Networking::Bridge).await;
    let pod = client.run_pod("talker").await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    let counters = |stats: PodSandboxStats| {
        let network = stats.linux.expect("linux").network.expect("a network");
        let interface = network.default_interface.expect("an interface");
        assert_eq!(interface.name, "eth0");
        (number(interface.rx_bytes), number(interface.tx_bytes))
    };
    let before = counters(pod_stats(&mut client, &pod).await);
    client
        .shell(&id, "ping -c 3 -s 1000 10.88.0.1 >/dev/null")
        .await;
    let after = counters(pod_stats(&mut client, &pod).await);
    assert!(after.0 >= before.0 + 3000, "{before:?} {after:?}");
    assert!(after.1 >= before.1 + 3000, "{before:?} {after:?}");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_answer_is_left_out_and_delays_no_other() {
    let (daemon, mut client, busybox) = daemon_with_busybox(Networking::Loopback).await;
    let mute = client.run_pod("mute").await.expect("run pod");
    let pids = daemon.vmm_pids();
    let [vmm] = pids.as_slice() else {
        panic!("one VMM: {pids:?}");
    };
    let limit = cgroups::of_process(*vmm).join("cpu.max");
    let usual = std::fs::read_to_string(&limit).expect("read the limit");
    let muted = client
        .run_script(&mute, "main", &busybox, "exec sleep 1000")
        .await;
    let lively = client.run_pod("lively").await.expect("run pod");
    let id = client
        .run_script(&lively, "main", &busybox, "exec sleep 1000")
        .await;
    assert_eq!(list(&mut client, None).await.len(), 2);
    // Not stopped, because such a guest is ended.
    std::fs::write(&limit, "1000 1000000").expect("set a limit");
    let started = Instant::now();
    let listed = list(&mut client, None).await;
    let waited = started.elapsed();
    let request = ListPodSandboxStatsRequest { filter: None };
    let pods = client.runtime.list_pod_sandbox_stats(request).await;
    std::fs::write(&limit, usual.trim()).expect("restore the limit");
    assert!(waited < Duration::from_secs(12), "{waited:?}");
    assert_eq!(listed.len(), 1);
    assert_eq!(id_of(&listed[0]), id);
    let pods = pods.expect("list pod stats").into_inner().stats;
    assert_eq!(pods.len(), 1);
    assert_eq!(
        pods[0].attributes.as_ref().expect("attributes").id,
        lively.id
    );
    // Once the VM gets CPU again, its guest answers.
    assert_eq!(id_of(&stats(&mut client, &muted).await), muted);
    client.end_pod(&mute).await;
    client.end_pod(&lively).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_and_streams_equal_them() {
    let (_daemon, mut client, busybox) = daemon_with_busybox(Networking::Loopback).await;
    let pod = client.run_pod("pod").await.expect("run pod");
    let mut ids = Vec::new();
    for name in ["one", "two", "done"] {
        let script = if name == "done" {
            "exit 0"
        } else {
            "exec sleep 1000"
        };
        let mut config = container(name, &busybox, &["sh", "-c", script]);
        config.labels.insert("name".into(), name.into());
        let id = client.create(&pod, config).await.expect("create");
        client.start(&id).await.expect("start");
        ids.push(id);
    }
    client.exited(&ids[2]).await;
    let all = list(&mut client, None).await;
    let listed: Vec<_> = all.iter().map(id_of).collect();
    assert_eq!(listed, ids);
    assert!(
        all[0].cpu.is_some() && all[2].cpu.is_none(),
        "what has ended uses nothing"
    );
    assert!(all[2].writable_layer.is_some());
    let by_label = ContainerStatsFilter {
        label_selector: [("name".into(), "two".into())].into(),
        ..Default::default()
    };
    let by_pod = ContainerStatsFilter {
        pod_sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    let by_id = ContainerStatsFilter {
        id: ids[0][..12].into(),
        ..Default::default()
    };
    let none = ContainerStatsFilter {
        pod_sandbox_id: "feed".repeat(16),
        ..Default::default()
    };
    for (filter, expected) in [
        (by_label, &ids[1..2]),
        (by_pod, &ids[..]),
        (by_id, &ids[..1]),
        (none, &[]),
    ] {
        let found = list(&mut client, Some(filter.clone())).await;
        let found: Vec<_> = found.iter().map(id_of).collect();
        assert_eq!(found, expected, "{filter:?}");
    }
    let request = StreamContainerStatsRequest { filter: None };
    let stream = client
        .runtime
        .stream_container_stats(request)
        .await
        .expect("stream");
    let streamed: Vec<_> = collect(stream.into_inner(), |message| message.container_stats).await;
    assert_eq!(streamed.iter().map(id_of).collect::<Vec<_>>(), ids);
    let request = StreamPodSandboxStatsRequest { filter: None };
    let stream = client
        .runtime
        .stream_pod_sandbox_stats(request)
        .await
        .expect("stream");
    let streamed: Vec<_> = collect(stream.into_inner(), |message| message.pod_sandbox_stats).await;
    assert_eq!(streamed.len(), 1);
    assert_eq!(
        streamed[0].attributes.as_ref().expect("attributes").id,
        pod.id
    );
    client.stop_pod(&pod.id).await.expect("stop pod");
    let stopped = stats(&mut client, &ids[0]).await;
    assert!(stopped.cpu.is_none(), "{stopped:?}");
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    assert_fails(
        client.runtime.pod_sandbox_stats(request).await,
        Code::FailedPrecondition,
        &["not ready"],
    );
    client.remove_pod(&pod.id).await.expect("remove pod");
}

async fn collect<M, T>(mut stream: Streaming<M>, items: impl Fn(M) -> Vec<T>) -> Vec<T> {
    let mut all = Vec::new();
    while let Some(message) = stream.message().await.expect("a message") {
        all.extend(items(message));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_the_labels_of_their_descriptors_and_streams_equal_lists() {
    let (_daemon, mut client, busybox) = daemon_with_busybox(Networking::Bridge).await;
    let pod = client.run_pod("measured").await.expect("run pod");
    let mut config = container("main", &busybox, &["sleep", "1000"]);
    config.linux = Some(LinuxContainerConfig {
        resources: Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    client
        .shell(&id, "dd if=/dev/zero of=/x bs=1M count=4 2>/dev/null; sync")
        .await;
    let descriptors = client
        .runtime
        .list_metric_descriptors(ListMetricDescriptorsRequest {})
        .await
        .expect("descriptors")
        .into_inner()
        .descriptors;
    let keys: BTreeMap<_, _> = descriptors
        .iter()
        .map(|one| (one.name.as_str(), one.label_keys.len()))
        .collect();
    let listed = client
        .runtime
        .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})
        .await
        .expect("metrics")
        .into_inner()
        .pod_metrics;
    let stream = client
        .runtime
        .stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest {})
        .await
        .expect("stream");
    let streamed = collect(stream.into_inner(), |message| message.pod_sandbox_metrics).await;
    let [of_pod] = listed.as_slice() else {
        panic!("one pod: {listed:?}");
    };
    assert_eq!(of_pod.pod_sandbox_id, pod.id);
    let [of_container] = of_pod.container_metrics.as_slice() else {
        panic!("one container: {of_pod:?}");
    };
    assert_eq!(of_container.container_id, id);
    let all = || of_pod.metrics.iter().chain(&of_container.metrics);
    for metric in all() {
        assert_eq!(
            Some(&metric.label_values.len()),
            keys.get(metric.name.as_str()),
            "{metric:?}"
        );
    }
    let valued: BTreeSet<_> = all().map(|metric| metric.name.as_str()).collect();
    let without: Vec<_> = keys.keys().filter(|name| !valued.contains(*name)).collect();
    assert!(
        without.is_empty(),
        "described but without a value: {without:?}"
    );
    let value = |name: &str| {
        let metric = of_container
            .metrics
            .iter()
            .find(|metric| metric.name == name);
        number(metric.expect(name).value)
    };
    assert_eq!(value("container_spec_memory_limit_bytes"), 64 << 20);
    assert_eq!(value("container_processes"), 1);
    assert!(value("container_fs_limit_bytes") > 1 << 30);
    let names = |metrics: &[bulkhead_proto::cri::PodSandboxMetrics]| -> Vec<String> {
        let of_pod = |one: &bulkhead_proto::cri::PodSandboxMetrics| {
            let containers = one
                .container_metrics
                .iter()
                .flat_map(|one| one.metrics.clone());
            let metrics = one.metrics.clone().into_iter().chain(containers);
            metrics.map(|metric| metric.name).collect::<Vec<_>>()
        };
        metrics.iter().flat_map(of_pod).collect()
    };
    assert_eq!(names(&streamed), names(&listed));
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_and_a_fast_listener_get_all_events_of_a_burst() {
    const ROUNDS: usize = 60;
    let (_daemon, mut client, busybox) = daemon_with_busybox(Networking::Loopback).await;
    let mut slow = listen(&mut client).await;
    let mut fast = listen(&mut client).await;
    let pod = client.run_pod("burst").await.expect("run pod");
    let mut expected = vec![
        (pod.id.clone(), ContainerEventType::ContainerCreatedEvent),
        (pod.id.clone(), ContainerEventType::ContainerStartedEvent),
    ];
    for round in 0..ROUNDS {
        let id = client
            .run_script(&pod, &format!("c{round}"), &busybox, "exec sleep 1000")
            .await;
        client.stop(&id, 0).await.expect("stop");
        client.remove(&id).await.expect("remove");
        for kind in [
            ContainerEventType::ContainerCreatedEvent,
            ContainerEventType::ContainerStartedEvent,
            ContainerEventType::ContainerStoppedEvent,
            ContainerEventType::ContainerDeletedEvent,
        ] {
            expected.push((id.clone(), kind));
        }
    }
    client.end_pod(&pod).await;
    expected.push((pod.id.clone(), ContainerEventType::ContainerStoppedEvent));
    expected.push((pod.id.clone(), ContainerEventType::ContainerDeletedEvent));
    for stream in [&mut slow, &mut fast] {
        let mut heard = Vec::new();
        while heard.len() < expected.len() {
            let event = tokio::time::timeout(PATIENCE, stream.message()).await;
            let event = event
                .expect("in time")
                .expect("a stream")
                .expect("an event");
            check_snapshot(&event, &pod);
            heard.push((event.container_id.clone(), event.container_event_type()));
        }
        assert_eq!(heard, expected);
    }
}

/// Checks that the statuses in an event are those of its moment, not those of when it is read.
fn check_snapshot(event: &ContainerEventResponse, pod: &Pod) {
    use bulkhead_proto::cri::ContainerState;
    assert_eq!(event.pod_sandbox_status.as_ref().expect("pod").id, pod.id);
    let mut statuses = event.containers_statuses.iter();
    let status = statuses.find(|status| status.id == event.container_id);
    let expected = match (event.container_event_type(), event.container_id == pod.id) {
        (_, true) | (ContainerEventType::ContainerDeletedEvent, _) => None,
        (ContainerEventType::ContainerCreatedEvent, _) => Some(ContainerState::ContainerCreated),
        (ContainerEventType::ContainerStartedEvent, _) => Some(ContainerState::ContainerRunning),
        (ContainerEventType::ContainerStoppedEvent, _) => Some(ContainerState::ContainerExited),
    };
    assert_eq!(
        status.map(bulkhead_proto::cri::ContainerStatus::state),
        expected,
        "{event:?}"
    );
}

async fn listen(client: &mut Client) -> Streaming<ContainerEventResponse> {
    let listening = client
        .runtime
        .get_container_events(GetEventsRequest {})
        .await;
    listening.expect("listen").into_inner()
}
