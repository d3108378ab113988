// SPDX-License-Identifier: Apache-2.0
//! Volumes: emptyDirs on disk and in memory, whole and by sub-path; configMaps and the like, which follow kubelet's
//! changes; termination logs; images as volumes. The tests make on the host what kubelet makes there.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bulkhead_proto::cri::{ContainerState, Device, Mount, MountPropagation};
use bulkhead_tests::client::{Client, Pod, assert_fails, container, image_spec};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, readonly, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// Starts a daemon with this test's kubelet directory, runs a pod, and pulls busybox.
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

/// What the container's kernel says of each mount: "ro" or "rw".
async fn said_of(client: &mut Client, id: &str, places: &[&str]) -> String {
    let mut said = Vec::new();
    for place in places {
        let line =
            format!("awk '$5 == \"{place}\" {{print substr($6, 1, 2)}}' /proc/self/mountinfo");
        said.push(client.shell(id, &line).await.trim().to_owned());
    }
    said.join(" ")
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
    let said = said_of(&mut client, &two, &["/whole", "/part"]).await;
    assert_eq!(
        said, "ro rw",
        "read-only in one container, writable in the other"
    );
    assert_eq!(said_of(&mut client, &one, &["/data"]).await, "rw");
    let on_host = std::fs::read_dir(&data).expect("list").count();
    assert_eq!(on_host, 2, "only the sub-path and the volume's disk");

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

/// Issue 13, point 13.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_becomes_a_link_while_it_is_mounted_stays_the_one_that_was_found() {
    let (daemon, mut client, pod, kubelet, busybox) = pod().await;
    let data = kubelet.empty_dir("data");
    let (shared, elsewhere) = (daemon.path("shared"), daemon.path("elsewhere"));
    for (directory, content) in [(&shared, "found"), (&elsewhere, "of others")] {
        std::fs::create_dir(directory).expect("mkdir");
        std::fs::write(directory.join("file"), content).expect("write");
    }
    let config = with_mounts(
        container("main", &busybox, &SLEEP),
        vec![mount(&data, "/data"), mount(&shared, "/shared")],
    );
    // All paths have been looked up before the disk of the first volume is made, and the guest mounts it before the
    // second one is shared.
    let replacing = std::thread::spawn(move || {
        for _ in 0..30_000 {
            if data.join(".bulkhead.ext4").exists() {
                std::fs::rename(&shared, shared.with_extension("moved")).expect("rename");
                return std::os::unix::fs::symlink(&elsewhere, &shared).expect("symlink");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no disk was made for the emptyDir");
    });
    let id = run(&mut client, &pod, config).await;
    replacing.join().expect("the directory was replaced");
    assert_eq!(client.shell(&id, "cat /shared/file").await, "found");
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
async fn mounts_go_to_their_place_and_never_follow_links_out() {
    let (daemon, mut client, pod, kubelet, busybox) = pod().await;
    let before = daemon.census();
    let data = kubelet.empty_dir("data");
    let outer = kubelet.empty_dir("outer");
    // The child comes first in the request. The parent must be mounted first nevertheless.
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
    // One container makes links in a shared volume to redirect the mounts of another.
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

/// Compiles a program of these tests to a static binary.
fn compile(source: &str, binary: &Path) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/programs");
    let mut command = Command::new("cc");
    command.args(["-static", "-Os", "-s", "-o"]).arg(binary);
    let output = command.arg(directory.join(source)).output();
    let output = output.expect("run cc (apt-get install gcc libc6-dev)");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cc {source}: {said}");
}

/// Waits until a shell line in the container prints `expected`.
async fn until_it_prints(client: &mut Client, id: &str, line: &str, expected: &str) {
    let what = format!("{line:?} prints {expected:?}");
    until(&what, async || {
        let answer = client.exec(id, &["sh", "-c", line], 0).await.expect("exec");
        let printed = String::from_utf8_lossy(&answer.stdout).into_owned();
        whether(printed == expected, printed)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn config_maps_and_secrets_follow_the_host_and_change_atomically() {
    let (mut daemon, mut client, pod, mut kubelet, busybox) = pod().await;
    let config = kubelet.volume("kubernetes.io~configmap", "config");
    kubelet.write(&config, &[("a", "1"), ("b", "1"), ("gone", "x")], 0o644);
    let secret = kubelet.volume("kubernetes.io~secret", "secret");
    kubelet.write(&secret, &[("token", "hidden")], 0o400);
    let key = kubelet.sub_path(&config, "..data/a", "main");
    let programs = kubelet.volume("kubernetes.io~projected", "programs");
    compile("watch.c", &programs.join("watch"));
    // Both keys of a state are equal. The script records when it sees a mixture.
    let script = "/programs/watch /config > /tmp/events & \
        while true; do d=$(readlink -f /config/..data); x=$(cat $d/a); y=$(cat $d/b); \
        if [ -n \"$x\" -a -n \"$y\" -a \"$x\" != \"$y\" ]; then echo $x $y >> /tmp/torn; fi; \
        sleep 0.05; done 2> /dev/null";
    let main = with_mounts(
        container("main", &busybox, &["sh", "-c", script]),
        vec![
            readonly(&config, "/config"),
            readonly(&secret, "/secret"),
            readonly(&programs, "/programs"),
            readonly(&key, "/key"),
        ],
    );
    let id = run(&mut client, &pod, main).await;
    let seen = client.shell(&id, "cat /config/a /config/gone /key").await;
    assert_eq!(seen, "1x1");
    let mode = client.shell(&id, "stat -L -c %a /secret/token").await;
    assert_eq!(mode, "400\n");
    let places = ["/config", "/secret", "/programs", "/key"];
    let said = said_of(&mut client, &id, &places).await;
    assert_eq!(said, "ro ro ro ro");
    let memory = client.shell(&id, "stat -f -c %T /secret").await;
    assert_eq!(memory, "tmpfs\n", "a secret is not on the disk");
    let refused = client
        .exec(&id, &["sh", "-c", "echo x > /config/new"], 0)
        .await
        .expect("exec");
    assert_ne!(refused.exit_code, 0, "read-only");

    kubelet.write(&config, &[("a", "2"), ("b", "2"), ("new", "y")], 0o644);
    let all = "cat /config/a /config/b /config/new; ls /config";
    until_it_prints(&mut client, &id, all, "22ya\nb\nnew\n").await;
    assert_eq!(client.shell(&id, "cat /key").await, "1", "a sub-path stays");
    let events = client.shell(&id, "cat /tmp/events").await;
    assert!(
        events.lines().any(|line| line == "..data"),
        "inotify: {events}"
    );
    kubelet.write(&secret, &[("token", "changed")], 0o400);
    until_it_prints(&mut client, &id, "cat /secret/token", "changed").await;

    // The volume changes a hundred times a second; later, the daemon dies in between.
    for number in 0..100 {
        let text = number.to_string();
        kubelet.write(
            &config,
            &[("a", text.as_str()), ("b", text.as_str())],
            0o644,
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    until_it_prints(&mut client, &id, "cat /config/a", "99").await;
    client.shell(&id, "test ! -e /tmp/torn").await;
    daemon.kill();
    kubelet.write(&config, &[("a", "while dead"), ("b", "")], 0o644);
    daemon.restart().await;
    let mut client = daemon.client().await;
    until_it_prints(&mut client, &id, "cat /config/a", "while dead").await;
    kubelet.write(&config, &[("a", "after"), ("b", "")], 0o644);
    until_it_prints(&mut client, &id, "cat /config/a", "after").await;

    // The host's directory is removed: the last state stays, and a new container is refused with a reason.
    std::fs::remove_dir_all(&config).expect("remove the volume");
    let late = with_mounts(
        container("late", &busybox, &SLEEP),
        vec![readonly(&config, "/config")],
    );
    let refused = client.create(&pod, late).await;
    assert_fails(refused, Code::FailedPrecondition, &["config", "gone"]);
    let late = with_mounts(
        container("late", &busybox, &SLEEP),
        vec![readonly(&key, "/key")],
    );
    let refused = client.create(&pod, late).await;
    assert_fails(
        refused,
        Code::FailedPrecondition,
        &["volume-subpaths", "gone"],
    );
    assert_eq!(client.shell(&id, "cat /config/a").await, "after");
    assert_eq!(client.shell(&id, "cat /secret/token").await, "changed");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_and_large_volumes_are_mirrored() {
    let (_daemon, mut client, pod, mut kubelet, busybox) = pod().await;
    let large = "0123456789abcdef".repeat(300_000);
    let mut mounts = Vec::new();
    for number in 0..60 {
        let name = format!("cm-{number}");
        let volume = kubelet.volume("kubernetes.io~configmap", &name);
        let text = if number == 7 {
            large.as_str()
        } else {
            name.as_str()
        };
        kubelet.write(&volume, &[("key", text)], 0o644);
        mounts.push(readonly(&volume, &format!("/many/{name}")));
    }
    let config = with_mounts(container("main", &busybox, &SLEEP), mounts);
    let id = run(&mut client, &pod, config).await;
    let sizes = client.shell(&id, "cat /many/*/key | wc -c").await;
    let small: usize = (0..60)
        .filter(|number| *number != 7)
        .map(|number: usize| format!("cm-{number}").len())
        .sum();
    assert_eq!(sizes.trim(), (large.len() + small).to_string());
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etc_hosts_follows_the_host_and_the_termination_log_is_there_before_the_exit() {
    let (mut daemon, mut client, pod, kubelet, busybox) = pod().await;
    let hosts = kubelet.file("etc-hosts", "127.0.0.1 localhost\n10.0.0.9 first\n");
    let log = kubelet.file("containers/main/0a1b2c", "");
    let main = with_mounts(
        container(
            "main",
            &busybox,
            &[
                "sh",
                "-c",
                "cat /etc/hosts; while ! grep -q second /etc/hosts; do sleep 0.1; done; \
                 echo last words > /dev/termination-log; exit 3",
            ],
        ),
        vec![
            mount(&hosts, "/etc/hosts"),
            mount(&log, "/dev/termination-log"),
        ],
    );
    let id = run(&mut client, &pod, main).await;
    client
        .log_until(&pod, "main", |text| text.contains("10.0.0.9 first\n"))
        .await;
    let shown = client.status(&id).await.expect("status").mounts;
    assert_eq!(shown.len(), 2, "{shown:?}");
    std::fs::write(&hosts, "127.0.0.1 localhost\n10.0.0.9 second\n").expect("write");
    assert_eq!(client.exited(&id).await.exit_code, 3);
    let text = std::fs::read_to_string(&log).expect("read the log");
    assert_eq!(text, "last words\n");
    client.remove(&id).await.expect("remove");

    // A container exits while no daemon runs (then nothing outside the VM shows that), and has written more than is copied back.
    let log = kubelet.file("containers/late/1", "");
    let late = with_mounts(
        container(
            "late",
            &busybox,
            &[
                "sh",
                "-c",
                "sleep 2; yes | head -c 1000000 > /dev/termination-log; echo end >> /dev/termination-log",
            ],
        ),
        vec![mount(&log, "/dev/termination-log")],
    );
    let id = run(&mut client, &pod, late).await;
    daemon.kill();
    tokio::time::sleep(Duration::from_secs(4)).await;
    daemon.restart().await;
    let mut client = daemon.client().await;
    let status = client.exited(&id).await;
    assert_eq!(status.state(), ContainerState::ContainerExited);
    let text = std::fs::read_to_string(&log).expect("read the log");
    assert!(text.ends_with("y\nend\n"), "{} bytes", text.len());
    assert!(
        (4096..=64 << 10).contains(&text.len()),
        "{} bytes",
        text.len()
    );
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_can_be_a_volume_and_is_kept_while_it_is_mounted() {
    let (mut daemon, mut client, pod, _kubelet, busybox) = pod().await;
    let oddities = Registry::shared().image("test/oddities");
    let image = |sub_path: &str, at: &str| Mount {
        container_path: at.into(),
        image: Some(image_spec(&oddities)),
        image_sub_path: sub_path.into(),
        readonly: true,
        ..Default::default()
    };
    let missing = with_mounts(
        container("missing", &busybox, &SLEEP),
        vec![image("", "/image")],
    );
    let refused = client.create(&pod, missing).await;
    // kubelet knows this error by the beginning of its message.
    let named = |refused: &Result<String, tonic::Status>| {
        let message = refused.as_ref().expect_err("refused").message();
        assert!(message.starts_with("ImageVolumeMountFailed: "), "{message}");
    };
    named(&refused);
    assert_fails(refused, Code::NotFound, &["oddities", "pull"]);
    let pulled = client.pull(&oddities).await.expect("pull");
    let config = with_mounts(
        container("main", &busybox, &SLEEP),
        vec![image("", "/image"), image("opaque", "/part")],
    );
    let id = run(&mut client, &pod, config).await;
    let seen = client
        .shell(&id, "cat /image/changed /part/above; ls /part")
        .await;
    assert_eq!(seen, "newaboveabove\n");
    let said = said_of(&mut client, &id, &["/image", "/part"]).await;
    assert_eq!(said, "ro ro");
    let ran = client.shell(&id, "/image/bin/busybox echo ran").await;
    assert_eq!(ran, "ran\n");
    let shown = client.status(&id).await.expect("status").mounts;
    let shown: Vec<_> = shown.into_iter().filter_map(|mount| mount.image).collect();
    assert!(
        shown.iter().all(|image| image.image_ref == pulled) && shown.len() == 2,
        "{shown:?}"
    );
    let mut writable = image("", "/image");
    writable.readonly = false;
    let writable = with_mounts(container("writable", &busybox, &SLEEP), vec![writable]);
    let refused = client.create(&pod, writable).await;
    assert_fails(refused, Code::InvalidArgument, &["read-only", "/image"]);
    for line in ["echo x > /image/new", "rm /part/above"] {
        let refused = client
            .exec(&id, &["sh", "-c", line], 0)
            .await
            .expect("exec");
        assert_ne!(refused.exit_code, 0, "{line}");
    }
    for (number, (sub_path, word)) in [("no/such", "no/such"), ("kept", "directory")]
        .into_iter()
        .enumerate()
    {
        let name = format!("refused-{number}");
        let config = with_mounts(
            container(&name, &busybox, &SLEEP),
            vec![image(sub_path, "/image")],
        );
        let refused = client.create(&pod, config).await;
        named(&refused);
        assert_fails(refused, Code::FailedPrecondition, &["/image", word]);
    }
    // While the image is mounted, its layers stay, even if the image is removed and the daemon restarts.
    client
        .images
        .remove_image(bulkhead_proto::cri::RemoveImageRequest {
            image: Some(image_spec(&oddities)),
        })
        .await
        .expect("remove the image");
    daemon.restart().await;
    let mut client = daemon.client().await;
    let seen = client.shell(&id, "cat /image/changed").await;
    assert_eq!(seen, "new");
    let layers = || {
        std::fs::read_dir(daemon.path("state/images/layers"))
            .expect("list layers")
            .count()
    };
    let held = layers();
    client.remove(&id).await.expect("remove");
    assert!(layers() < held, "the layers go with the container");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_every_kernel_has_are_given_and_others_are_refused() {
    let (_daemon, mut client, pod, _kubelet, busybox) = pod().await;
    let device = |host_path: &str, container_path: &str, permissions: &str| Device {
        host_path: host_path.into(),
        container_path: container_path.into(),
        permissions: permissions.into(),
    };
    let mut config = container("main", &busybox, &SLEEP);
    config.devices = vec![
        device("/dev/fuse", "/dev/fuse", "rw"),
        device("/dev/net/tun", "/dev/net/tun", "r"),
        device("/dev/zero", "/dev/a/zero", "rw"),
    ];
    let id = run(&mut client, &pod, config).await;
    client.shell(&id, "exec 3<> /dev/fuse").await;
    client.shell(&id, "exec 3< /dev/net/tun").await;
    client.shell(&id, "head -c 4 /dev/a/zero").await;
    let beyond = client
        .exec(&id, &["sh", "-c", "exec 3<> /dev/net/tun"], 0)
        .await
        .expect("exec");
    assert_ne!(beyond.exit_code, 0, "only reading was given");
    let mut config = container("refused", &busybox, &SLEEP);
    config.devices = vec![device("/dev/kvm", "/dev/x", "rw")];
    let refused = client.create(&pod, config).await;
    assert_fails(refused, Code::Unimplemented, &["/dev/kvm"]);
    client.end_pod(&pod).await;
}
