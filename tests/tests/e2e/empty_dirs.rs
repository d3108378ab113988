// SPDX-License-Identifier: Apache-2.0
//! EmptyDirs on disk, seen from the host as kubelet sees them: it measures their size, reads files for containers'
//! environments (`fileKeyRef`), and expects them to outlive a sandbox.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_proto::cri::{ContainerConfig, PodSandboxState};
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

const SLEEP: [&str; 2] = ["sleep", "1000"];
const MIB: u64 = 1 << 20;

async fn host() -> (Daemon, Client, Kubelet, String) {
    let kubelet = Kubelet::new("uid-pod");
    let daemon = Daemon::start_with(Networking::Loopback, &kubelet.config()).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    (daemon, client, kubelet, busybox)
}

async fn run(client: &mut Client, pod: &Pod, config: ContainerConfig) -> String {
    let id = client.create(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    id
}

/// Runs another sandbox of the same pod.
async fn sandbox(client: &mut Client, attempt: u32) -> Pod {
    let mut config = client.pod_config("pod");
    config.metadata.as_mut().expect("metadata").attempt = attempt;
    client.run_pod_with(config).await.expect("run pod")
}

/// Returns the bytes on disk, counted like kubelet's `DiskUsage`.
fn usage(path: &Path) -> u64 {
    let metadata = path.symlink_metadata().expect("look");
    let mut sum = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in fs::read_dir(path).expect("list") {
            sum += usage(&entry.expect("an entry").path());
        }
    }
    sum
}

async fn until_usage(path: &Path, what: &str, enough: impl Fn(u64) -> bool) {
    until(what, async || {
        let used = usage(path);
        whether(enough(used), used)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_sees_the_size_of_an_empty_dir_grow_and_shrink() {
    let (_daemon, mut client, kubelet, busybox) = host().await;
    let (data, other) = (kubelet.empty_dir("data"), kubelet.empty_dir("other"));
    let pod = sandbox(&mut client, 0).await;
    let config = with_mounts(
        container("main", &busybox, &SLEEP),
        vec![mount(&data, "/data"), mount(&other, "/other")],
    );
    let id = run(&mut client, &pod, config).await;
    assert_eq!(client.shell(&id, "ls -A /data").await, "", "begins empty");
    let empty = usage(&data);
    assert!(empty < MIB / 2, "an empty one takes {empty} bytes");
    let write = "dd if=/dev/zero of=/data/big bs=1M count=40 2>/dev/null && sync";
    client.shell(&id, write).await;
    let full = usage(&data);
    assert!((40 * MIB..48 * MIB).contains(&full), "{full} bytes");
    // The journal's blocks are freed.
    until_usage(&data, "the volume is no larger than its content", |used| {
        used < 41 * MIB
    })
    .await;
    client.shell(&id, "rm /data/big").await;
    until_usage(&data, "the volume has shrunk", |used| used < MIB).await;
    assert!(usage(&other) < MIB);
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn environment_files_are_on_the_host_once_their_container_has_exited() {
    let (mut daemon, mut client, mut kubelet, busybox) = host().await;
    let data = kubelet.empty_dir("data");
    let memory = kubelet.memory_dir("memory", 1024);
    let pod = sandbox(&mut client, 0).await;
    let script = async |client: &mut Client, name: &str, script: &str| {
        let config = container(name, &busybox, &["sh", "-c", script]);
        let id = run(
            client,
            &pod,
            with_mounts(config, vec![mount(&data, "/work"), mount(&memory, "/mem")]),
        )
        .await;
        assert_eq!(client.exited(&id).await.exit_code, 0);
    };
    let first = "cd /work; mkdir sub; printf \"TOKEN='of the first'\\n\" > app.env; \
        printf \"# more\\nB='2'\\n\" > sub/b.env; ln -s /etc/passwd link.env; \
        printf '#!/bin/sh\\necho\\n' > script; chmod 700 app.env; echo \"M='4'\" > /mem/m.env";
    script(&mut client, "first", first).await;
    let read = |path: &str| fs::read_to_string(data.join(path)).ok();
    assert_eq!(read("app.env").as_deref(), Some("TOKEN='of the first'\n"));
    assert_eq!(read("sub/b.env").as_deref(), Some("# more\nB='2'\n"));
    for path in ["link.env", "script"] {
        assert!(data.join(path).symlink_metadata().is_err(), "{path}");
    }
    let in_memory = fs::read_to_string(memory.join("m.env")).ok();
    assert_eq!(in_memory.as_deref(), Some("M='4'\n"));
    // The second container sees the files in the guest's volume and changes them there.
    let second = "cd /work; grep -q first app.env && rm app.env && ls script && sleep 3 && \
        printf \"C='3'\" > c.env";
    let config = container("second", &busybox, &["sh", "-c", second]);
    let config = with_mounts(config, vec![mount(&data, "/work")]);
    let id = run(&mut client, &pod, config).await;
    // The container exits while no daemon runs, and then nothing outside the VM shows that.
    daemon.kill();
    tokio::time::sleep(Duration::from_secs(5)).await;
    daemon.restart().await;
    let mut client = daemon.client().await;
    assert_eq!(client.exited(&id).await.exit_code, 0);
    assert_eq!(read("c.env").as_deref(), Some("C='3'"));
    assert_eq!(read("app.env"), None);
    assert!(read("sub/b.env").is_some());
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_dir_outlives_its_sandbox_and_the_death_of_its_vm() {
    let (daemon, mut client, kubelet, busybox) = host().await;
    let data = kubelet.empty_dir("data");
    kubelet.set_group(&data, 4242);
    let main = || {
        with_mounts(
            container("main", &busybox, &SLEEP),
            vec![mount(&data, "/data")],
        )
    };
    let pod = sandbox(&mut client, 0).await;
    let id = run(&mut client, &pod, main()).await;
    let line = "mkdir /data/d; echo first > /data/d/file; chown 7 /data/d/file; chmod 1770 /data; \
        dd if=/dev/zero of=/data/big bs=1M count=20 2>/dev/null";
    client.shell(&id, line).await;
    // Meanwhile a second VM cannot use the volume, and its attempt does no harm.
    let second = sandbox(&mut client, 1).await;
    let refused = client.create(&second, main()).await;
    assert_fails(refused, Code::FailedPrecondition, &["another VM", "data"]);
    client.end_pod(&second).await;
    client.end_pod(&pod).await;

    let pod = sandbox(&mut client, 2).await;
    let id = run(&mut client, &pod, main()).await;
    let seen = client
        .shell(
            &id,
            "cat /data/d/file; stat -c '%u' /data/d/file; stat -c '%a %g' /data",
        )
        .await;
    assert_eq!(seen, "first\n7\n1770 4242\n", "as the containers left it");
    assert_eq!(client.shell(&id, "wc -c < /data/big").await, "20971520\n");
    client
        .shell(
            &id,
            "echo second > /data/d/file; sync; echo late > /data/late",
        )
        .await;
    let [vmm] = daemon.vmm_pids()[..] else {
        panic!("one VMM");
    };
    let killed = std::process::Command::new("kill")
        .args(["-9", &vmm.to_string()])
        .status();
    assert!(killed.expect("kill").success());
    client.exited(&id).await;
    let state = client.pod_state(&pod.id).await.expect("state");
    assert_eq!(state, PodSandboxState::SandboxNotready);
    client.end_pod(&pod).await;

    let pod = sandbox(&mut client, 3).await;
    let id = run(&mut client, &pod, main()).await;
    assert_eq!(client.shell(&id, "cat /data/d/file").await, "second\n");
    client
        .shell(&id, "rm -r /data/* && echo x > /data/new && sync")
        .await;
    client.end_pod(&pod).await;
    // kubelet removes the volume by removing this one file.
    let names: Vec<_> = fs::read_dir(&data)
        .expect("list")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(names, [".bulkhead.ext4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_empty_dir_or_host_disk_gives_errors_and_the_vm_lives() {
    let (daemon, mut client, mut kubelet, busybox) = host().await;
    let (data, other) = (kubelet.empty_dir("data"), kubelet.empty_dir("other"));
    let cramped = kubelet.disk_dir("cramped", 24);
    let mut config = client.pod_config("pod");
    config
        .annotations
        .insert("bulkhead.dev/ephemeral-storage".into(), "64Mi".into());
    let pod = client.run_pod_with(config).await.expect("run pod");
    let config = with_mounts(
        container("main", &busybox, &SLEEP),
        vec![
            mount(&data, "/data"),
            mount(&other, "/other"),
            mount(&cramped, "/cramped"),
        ],
    );
    let id = run(&mut client, &pod, config).await;
    let fill = async |client: &mut Client, directory: &str, mib: u32| {
        let line = format!("dd if=/dev/zero of={directory}/big bs=1M count={mib} conv=fsync");
        let answer = client.exec(&id, &["sh", "-c", &line], 0).await;
        let answer = answer.expect("exec");
        assert_ne!(answer.exit_code, 0, "{directory}");
        String::from_utf8_lossy(&answer.stderr).into_owned()
    };
    let said = fill(&mut client, "/data", 100).await;
    assert!(said.contains("No space left"), "{said}");
    let room = client
        .shell(&id, "wc -c < /data/big; rm /data/big; echo x > /data/small")
        .await;
    let room: u64 = room.trim().parse().expect("a number");
    assert!(room > 56 * MIB, "{room} of 64 MiB could be written");
    // This volume's disk on the host is smaller than the volume.
    let said = fill(&mut client, "/cramped", 40).await;
    assert!(said.contains("error"), "{said}");
    client
        .shell(
            &id,
            "echo y > /other/file && sync /other/file && cat /data/small",
        )
        .await;
    assert_eq!(daemon.vmm_pids().len(), 1);
    client.end_pod(&pod).await;
}
