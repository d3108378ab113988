// SPDX-License-Identifier: Apache-2.0
//! Volumes that the guest keeps: emptyDirs, on disk and in memory, whole and by sub-path. The tests make on the host
//! what kubelet makes there.

use bulkhead_proto::cri::MountPropagation;
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, readonly, with_mounts};
use bulkhead_tests::registry::Registry;
use tonic::Code;

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// A daemon that knows where this test's kubelet is, a pod, that pod's kubelet directory, and busybox.
async fn pod() -> (Daemon, Client, Pod, Kubelet, String) {
    let kubelet = Kubelet::new("uid-pod");
    let daemon = Daemon::start_with(Networking::Loopback, &kubelet.config()).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");
    (daemon, client, pod, kubelet, busybox)
}

async fn run(
    client: &mut Client,
    pod: &Pod,
    config: bulkhead_proto::cri::ContainerConfig,
) -> String {
    let id = client.create(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_dir_is_shared_by_containers_and_outlives_them() {
    let (mut daemon, mut client, pod, mut kubelet, busybox) = pod().await;
    let data = kubelet.empty_dir("data");
    kubelet.set_group(&data, 4242);
    let init = container("init", &busybox, &["sh", "-c", "echo made > /work/file"]);
    let init = with_mounts(init, vec![mount(&data, "/work")]);
    let init = run(&mut client, &pod, init).await;
    assert_eq!(client.exited(&init).await.exit_code, 0);

    let sub_path = kubelet.sub_path(&data, "deep/er", "two");
    let one = with_mounts(
        container("one", &busybox, &SLEEP),
        vec![mount(&data, "/data")],
    );
    let two = with_mounts(
        container("two", &busybox, &SLEEP),
        vec![readonly(&data, "/whole"), mount(&sub_path, "/part")],
    );
    let one = run(&mut client, &pod, one).await;
    let two = run(&mut client, &pod, two).await;
    assert_eq!(client.shell(&one, "cat /data/file").await, "made\n");
    let owner = client.shell(&one, "stat -c '%a %u %g' /data").await;
    assert_eq!(owner, "2775 0 4242\n", "mode and group are carried in");
    client.shell(&two, "echo below > /part/new").await;
    let seen = client.shell(&one, "cat /data/deep/er/new").await;
    assert_eq!(seen, "below\n", "the sub-path is the same storage");
    let refused = client
        .exec(&two, &["sh", "-c", "echo x > /whole/file"], 0)
        .await
        .expect("exec");
    assert_ne!(refused.exit_code, 0, "read-only");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only"));
    let on_host = std::fs::read_dir(&data).expect("list").count();
    assert_eq!(on_host, 1, "nothing but the sub-path is on the host");

    daemon.restart().await;
    let mut client = daemon.client().await;
    client.remove(&one).await.expect("remove");
    let mut again = with_mounts(
        container("one", &busybox, &SLEEP),
        vec![mount(&data, "/data")],
    );
    again.metadata.as_mut().expect("metadata").attempt = 1;
    let again = run(&mut client, &pod, again).await;
    let seen = client
        .shell(&again, "cat /data/file /data/deep/er/new")
        .await;
    assert_eq!(seen, "made\nbelow\n", "restarts keep it");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_dir_in_memory_is_as_large_as_its_limit_also_as_dev_shm() {
    let (_daemon, mut client, pod, mut kubelet, busybox) = pod().await;
    let memory = kubelet.memory_dir("mem", 1024);
    let shm = kubelet.memory_dir("shm", 80 << 10);
    let config = with_mounts(
        container("main", &busybox, &SLEEP),
        vec![mount(&memory, "/mem"), mount(&shm, "/dev/shm")],
    );
    let id = run(&mut client, &pod, config).await;
    let mounts = client.shell(&id, "cat /proc/self/mounts").await;
    let of = |path: &str| {
        let is_there = |line: &&str| line.split(' ').nth(1) == Some(path);
        mounts.lines().filter(is_there).collect::<Vec<_>>()
    };
    assert!(of("/mem")[0].contains("size=1024k"), "{mounts}");
    assert_eq!(of("/dev/shm").len(), 1, "{mounts}");
    assert!(of("/dev/shm")[0].contains("size=81920k"), "{mounts}");
    let fill = "dd if=/dev/zero of=/mem/x bs=1k count=2048";
    let full = client
        .exec(&id, &["sh", "-c", fill], 0)
        .await
        .expect("exec");
    let stderr = String::from_utf8_lossy(&full.stderr).into_owned();
    assert!(stderr.contains("No space left"), "{stderr}");
    client
        .shell(&id, "dd if=/dev/zero of=/dev/shm/x bs=1M count=70")
        .await;
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_go_where_they_belong_or_nowhere() {
    let (daemon, mut client, pod, kubelet, busybox) = pod().await;
    let before = daemon.census();
    let data = kubelet.empty_dir("data");
    let outer = kubelet.empty_dir("outer");
    // Given child first: parents are mounted first all the same.
    let config = with_mounts(
        container("order", &busybox, &SLEEP),
        vec![
            mount(&data, "/a/b/c"),
            mount(&outer, "/a"),
            mount(&data, "/etc/deep/er"),
        ],
    );
    let id = run(&mut client, &pod, config).await;
    client
        .shell(&id, "echo x > /a/b/c/inner; echo y > /a/outer")
        .await;
    assert_eq!(client.shell(&id, "cat /etc/deep/er/inner").await, "x\n");
    assert_eq!(client.shell(&id, "ls /a").await, "b\nouter\n");
    // A link in a shared volume, made by one container to lead another one's mount elsewhere.
    client
        .shell(&id, "ln -s /proc /a/trap; ln -s ../../../../escape /a/up")
        .await;
    let table = [
        ("/proc/sys", "/proc"),
        ("/a/trap/sys", "/proc"),
        ("/proc/self/attr", "/proc"),
    ];
    for (number, (target, word)) in table.into_iter().enumerate() {
        let config = with_mounts(
            container(&format!("refused-{number}"), &busybox, &SLEEP),
            vec![mount(&outer, "/a"), mount(&data, target)],
        );
        let id = client.create(&pod, config).await.expect("create");
        let started = client.start(&id).await;
        assert_fails(started, Code::FailedPrecondition, &[target, word]);
        client.remove(&id).await.expect("remove");
    }
    let config = with_mounts(
        container("climbs", &busybox, &SLEEP),
        vec![mount(&outer, "/a"), mount(&data, "/a/up")],
    );
    let climber = run(&mut client, &pod, config).await;
    let seen = client.shell(&climber, "cat /escape/inner").await;
    assert_eq!(seen, "x\n", "a link ends at the container's root");

    let wrong = |change: fn(&mut bulkhead_proto::cri::Mount)| {
        let mut one = mount(&data, "/data");
        change(&mut one);
        with_mounts(container("wrong", &busybox, &SLEEP), vec![one])
    };
    let bidirectional = wrong(|m| m.set_propagation(MountPropagation::PropagationBidirectional));
    let proc = wrong(|m| m.container_path = "/proc".into());
    let recursive = wrong(|m| m.recursive_read_only = true);
    for (config, word) in [
        (bidirectional, "bidirectional"),
        (proc, "/proc"),
        (recursive, "readonly"),
    ] {
        let created = client.create(&pod, config).await;
        assert_fails(created, Code::InvalidArgument, &[word]);
    }
    let config = wrong(|m| (m.recursive_read_only, m.readonly) = (true, true));
    let recursive = run(&mut client, &pod, config).await;
    let refused = client
        .exec(&recursive, &["touch", "/data/x"], 0)
        .await
        .expect("exec");
    assert_ne!(refused.exit_code, 0, "recursively read-only");
    client.remove(&recursive).await.expect("remove");
    for id in [&id, &climber] {
        client.remove(id).await.expect("remove");
    }
    daemon.census().assert_equals(&before);
    client.end_pod(&pod).await;
}
