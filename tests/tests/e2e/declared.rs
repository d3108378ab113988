// SPDX-License-Identifier: Apache-2.0
//! The volumes that images declare (`VOLUME`): with the image's content, writable, and each container's own.

use bulkhead_proto::cri::{ContainerConfig, ContainerStatsRequest, LinuxContainerSecurityContext};
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

const MIB: u64 = 1 << 20;
const SLEEP: [&str; 2] = ["sleep", "1000"];

async fn run(client: &mut Client, pod: &Pod, config: ContainerConfig) -> String {
    let id = client.create(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    id
}

/// A container in which overlays can be mounted, but whose root is read-only.
fn readonly_root(mut config: ContainerConfig) -> ContainerConfig {
    let linux = config.linux.get_or_insert_default();
    linux.security_context = Some(LinuxContainerSecurityContext {
        readonly_rootfs: true,
        privileged: true,
        ..Default::default()
    });
    config
}

async fn written(client: &mut Client, id: &str) -> (u64, u64) {
    let request = ContainerStatsRequest {
        container_id: id.into(),
    };
    let answer = client
        .runtime
        .container_stats(request)
        .await
        .expect("stats");
    let layer = answer
        .into_inner()
        .stats
        .and_then(|stats| stats.writable_layer);
    let layer = layer.expect("writable layer");
    let number = |value: Option<bulkhead_proto::cri::UInt64Value>| value.expect("a number").value;
    (number(layer.used_bytes), number(layer.inodes_used))
}

#[tokio::test(flavor = "multi_thread")]
async fn declared_volumes_have_the_images_content_and_are_each_containers_own() {
    let kubelet = Kubelet::new("uid-pod");
    let mut daemon = Daemon::start_with(Networking::Loopback, &kubelet.config()).await;
    let mut client = daemon.client().await;
    let image = |name: &str| Registry::shared().image(&format!("test/{name}"));
    let volumes = image("volumes");
    for name in ["volumes", "volume-wrong", "volume-file"] {
        client.pull(&image(name)).await.expect("pull");
    }
    let config = client.privileged_pod_config("pod");
    let pod = client.run_pod_with(config).await.expect("run pod");
    for (name, code, words) in [
        (
            "volume-wrong",
            Code::InvalidArgument,
            ["/a/../../b", "declares"],
        ),
        (
            "volume-file",
            Code::FailedPrecondition,
            ["/etc/passwd", "Not a directory"],
        ),
    ] {
        let refused = client
            .create(&pod, container(name, &image(name), &SLEEP))
            .await;
        assert_fails(refused, code, &words);
    }

    // kubelet's mounts win where they are or are above; one below a volume is in it.
    let own = kubelet.empty_dir("own");
    let mounts = || {
        vec![
            mount(&own, "/covered"),
            mount(&own, "/above"),
            mount(&own, "/link/below"),
        ]
    };
    let config = with_mounts(container("one", &volumes, &SLEEP), mounts());
    let one = run(&mut client, &pod, readonly_root(config)).await;
    for (line, expected) in [
        (
            "stat -c '%a %u:%g %Y' /data /data/sub /data/sub/file /data/program",
            "2750 33:1234 7\n1777 0:0 8\n640 33:0 9\n4755 0:0 1700000000\n",
        ),
        (
            "cat /data/link; readlink /data/out; stat -c %F /data/pipe",
            "from the image/etc/passwd\nfifo\n",
        ),
        (
            "stat -c %h /data/second; [ $(stat -c %i /data/second) = $(stat -c %i /data/sub/file) ]",
            "2\n",
        ),
        (
            "cat /link/file /real/file; stat -c '%a %u:%g' /fresh/deep",
            "behind a linkbehind a link755 0:0\n",
        ),
        (
            "/data/program; grep ' /data ' /proc/self/mounts | cut -d' ' -f3",
            "ran\next4\n",
        ),
        (
            "ls /covered /above /link; echo x > /covered/written; cat /above/written",
            "/above:\n\n/covered:\n\n/link:\nbelow\nfile\nx\n",
        ),
        // A container can have an overlay there, which it cannot on an overlay: what Docker in a pod does.
        (
            "cd /data && mkdir up work merged && mount -t overlay -o lowerdir=/bin,upperdir=up,workdir=work none merged && \
             echo mine > merged/new && umount merged && cat up/new",
            "mine\n",
        ),
    ] {
        assert_eq!(client.shell(&one, line).await, expected, "{line}");
    }
    let refused = client.exec(&one, &["touch", "/root-is-read-only"], 0).await;
    assert_ne!(refused.expect("exec").exit_code, 0);

    // Another container has volumes of its own. A restart of the daemon changes nothing.
    let (before, files) = written(&mut client, &one).await;
    let two = with_mounts(container("two", &volumes, &SLEEP), mounts());
    let two = run(&mut client, &pod, two).await;
    daemon.restart().await;
    let mut client = daemon.client().await;
    client
        .shell(&one, "dd if=/dev/zero of=/data/big bs=1M count=12 2>/dev/null && mkdir /fresh/deep/x && sync")
        .await;
    assert_eq!(
        client.shell(&two, "ls /data /fresh/deep").await,
        "/data:\nlink\nout\npipe\nprogram\nsecond\nsub\n\n/fresh/deep:\n"
    );
    until("the written volumes are counted", async || {
        let now = written(&mut client, &one).await;
        whether(now.0 >= before + 12 * MIB && now.1 >= files + 2, now)
    })
    .await;

    // They end with the container.
    let used = "df -k /data | tail -n 1 | awk '{print $3}'";
    let kib = |text: String| text.trim().parse::<u64>().expect("a number");
    let full = kib(client.shell(&two, used).await);
    client.remove(&one).await.expect("remove");
    until("the scratch disk is free again", async || {
        let now = kib(client.shell(&two, &format!("sync; {used}")).await);
        whether(now + 11 * 1024 <= full, (now, full))
    })
    .await;
    let again = with_mounts(container("again", &volumes, &SLEEP), mounts());
    let again = run(&mut client, &pod, again).await;
    let seen = client
        .shell(
            &again,
            "cat /data/sub/file; ls /data/big 2>&1 | grep -c 'No such'",
        )
        .await;
    assert_eq!(seen, "from the image1\n");
    client.end_pod(&pod).await;
}
