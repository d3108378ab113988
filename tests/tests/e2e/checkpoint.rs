// SPDX-License-Identifier: Apache-2.0
//! Pods that are saved into a directory and brought back: their processes go on where they were, under another name and
//! address. Whatever goes wrong, the saved pod goes on and nothing half-way is left.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bulkhead_proto::cri::{
    CheckpointContainerRequest, CheckpointPodRequest, ContainerConfig, ContainerState,
    PodSandboxConfig, RestorePodRequest,
};
use bulkhead_tests::client::{Client, Pod, container, kubelets_container, kubelets_pod};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::{Code, Request, Status};

use super::cli;

/// Longer than any of these calls takes.
const LIMIT: Duration = Duration::from_secs(150);
/// Counts, and keeps a secret that only its memory and a file have. It tells both when it is asked to.
pub const COUNTING: &str =
    "secret=$(cat /proc/sys/kernel/random/uuid); echo $secret >/secret; count=0
trap 'echo kept $secret $count' USR1
while true; do count=$((count+1)); echo $count >/count; sleep 0.1; done";
const FILES: [&str; 4] = ["manifest.json", "memory", "scratch", "state"];

/// A container as kubelet asks for it, so that the same can be asked for again.
pub fn asked(name: &str, image: &str, script: &str) -> ContainerConfig {
    kubelets_container(container(name, image, &["sh", "-c", script]))
}

pub fn pod_asked(client: &Client, name: &str) -> PodSandboxConfig {
    kubelets_pod(client.pod_config(name))
}

pub async fn run(client: &mut Client, pod: &Pod, config: ContainerConfig) -> String {
    let id = client.create_as_it_is(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    id
}

async fn save(
    client: &mut Client,
    pod: &str,
    directory: &Path,
    containers: &[&str],
) -> Result<(), Status> {
    let mut request = Request::new(CheckpointPodRequest {
        pod_sandbox_id: pod.into(),
        output_path: directory.display().to_string(),
        container_ids: containers.iter().map(ToString::to_string).collect(),
        options: HashMap::new(),
    });
    request.set_timeout(LIMIT);
    client.runtime.checkpoint_pod(request).await.map(drop)
}

/// Brings a pod back. Returns it and its containers' ids, in the order of their configurations.
async fn restore(
    client: &mut Client,
    directory: &Path,
    config: PodSandboxConfig,
    containers: &[ContainerConfig],
) -> Result<(Pod, Vec<String>), Status> {
    let mut request = Request::new(RestorePodRequest {
        checkpoint_path: directory.display().to_string(),
        config: Some(config.clone()),
        container_configs: containers.to_vec(),
        ..Default::default()
    });
    request.set_timeout(LIMIT);
    let restored = client.runtime.restore_pod(request).await?.into_inner();
    let id = |config: &ContainerConfig| {
        let name = &config.metadata.as_ref().expect("metadata").name;
        let found = restored.restored_containers.iter();
        let mut found = found.filter(|one| one.name == *name);
        found.next().expect("its id").container_id.clone()
    };
    let ids = containers.iter().map(id).collect();
    let pod = Pod {
        id: restored.pod_sandbox_id.clone(),
        config,
    };
    Ok((pod, ids))
}

/// An empty directory for a checkpoint, on a disk.
pub fn directory() -> tempfile::TempDir {
    fs::create_dir_all("/var/lib/bulkhead").expect("make /var/lib/bulkhead");
    tempfile::Builder::new()
        .prefix("checkpoint-")
        .tempdir_in("/var/lib/bulkhead")
        .expect("a directory for a checkpoint")
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("list").flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// How far a container has counted.
pub async fn count(client: &mut Client, id: &str) -> u64 {
    // The file may be read before it is there, or while it is written.
    until("the container has counted", async || {
        let shown = client.shell(id, "cat /count || true").await;
        shown.trim().parse().map_err(|_| shown)
    })
    .await
}

/// Waits until a container counts on.
pub async fn counts_on(client: &mut Client, id: &str, from: u64) -> u64 {
    let mut last = 0;
    until("the container counts on", async || {
        last = count(client, id).await;
        whether(last > from, last)
    })
    .await;
    last
}

/// What the process of a container still knows: its secret and its count.
pub async fn kept(client: &mut Client, pod: &Pod, id: &str, name: &str) -> (String, u64) {
    client.shell(id, "kill -USR1 1").await;
    let log = client
        .log_until(pod, name, |log| log.contains("kept "))
        .await;
    let line = log.lines().find(|line| line.starts_with("kept "));
    let mut words = line.expect("its words").split(' ').skip(1);
    let secret = words.next().expect("a secret").to_owned();
    let count = words.next().expect("a count").parse().expect("a number");
    (secret, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_goes_on_and_its_copy_goes_on_where_it_was_under_another_name() {
    let (mut first, mut second) = (Kubelet::new("uid-first"), Kubelet::new("uid-second"));
    let roots = [&first, &second].map(|kubelet| {
        let line = kubelet.config();
        line.split('"').nth(1).expect("a root").to_owned()
    });
    let config = format!("volumes.kubelet_roots = {roots:?}");
    let mut daemon = Daemon::start_with(Networking::Bridge, &config).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let mounts = |kubelet: &mut Kubelet, word: &str| {
        let cache = kubelet.memory_dir("cache", 1024);
        let settings = kubelet.volume("kubernetes.io~configmap", "settings");
        kubelet.write(&settings, &[("word", word)], 0o644);
        vec![mount(&cache, "/cache"), mount(&settings, "/settings")]
    };
    let of_first = mounts(&mut first, "one");
    let of_second = mounts(&mut second, "two");
    let script = "echo in memory >/cache/file; exec sleep 100000";
    let [main, other] = [
        asked("main", &busybox, COUNTING),
        asked("other", &busybox, script),
    ];
    let config = pod_asked(&client, "first");
    let pod = client.run_pod_as_it_is(config).await.expect("run pod");
    let done = run(&mut client, &pod, asked("done", &busybox, "true")).await;
    client.exited(&done).await;
    let id = run(&mut client, &pod, main.clone()).await;
    let other_id = run(
        &mut client,
        &pod,
        with_mounts(other.clone(), of_first.clone()),
    )
    .await;
    let before = counts_on(&mut client, &id, 5).await;
    let secret = client.shell(&id, "cat /secret").await.trim().to_owned();
    let boot_id = "cat /proc/sys/kernel/random/uuid";
    client.shell(&other_id, "cat /cache/file").await;

    let place = directory();
    let ids = [id.as_str(), other_id.as_str()];
    save(&mut client, &pod.id, place.path(), &ids)
        .await
        .expect("save");
    assert_eq!(names(place.path()), FILES);
    for name in FILES {
        let found = fs::metadata(place.path().join(name)).expect("a file");
        assert_eq!(found.permissions().mode() & 0o777, 0o600, "{name}");
    }
    let on_disk = Command::new("du").arg("-sm").arg(place.path()).output();
    println!(
        "checkpoint: {}",
        String::from_utf8_lossy(&on_disk.expect("run du").stdout).trim()
    );
    for line in daemon.output().lines() {
        if line.contains("checkpoint is complete") || line.contains("VM is saved") {
            println!("{line}");
        }
    }
    let at_least = count(&mut client, &id).await;
    assert!(at_least >= before, "{at_least} {before}");
    // The saved pod goes on.
    let later = counts_on(&mut client, &id, at_least + 3).await;
    let random = client.shell(&id, boot_id).await;
    let network = "ip -4 -o addr show eth0; cat /sys/class/net/eth0/address; hostname";
    let was = client.shell(&id, network).await;

    // Both live at the same time.
    let config = pod_asked(&client, "second");
    let configs = [main.clone(), with_mounts(other.clone(), of_second.clone())];
    let (copy, copies) = restore(&mut client, place.path(), config.clone(), &configs)
        .await
        .expect("restore");
    let [copied, other_copied] = [&copies[0], &copies[1]];
    for id in [copied, other_copied] {
        let status = client.status(id).await.expect("status");
        assert_eq!(status.state(), ContainerState::ContainerCreated, "{id}");
    }
    let refused = client.exec(copied, &["true"], 0).await.expect_err("exec");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    client.start(copied).await.expect("start");
    let went_on = count(&mut client, copied).await;
    assert!(
        went_on < later,
        "it went on from {went_on}, not from {later}"
    );
    counts_on(&mut client, copied, went_on + 3).await;
    let (told, told_count) = kept(&mut client, &copy, copied, "main").await;
    assert_eq!(told, secret);
    assert!(told_count >= before, "{told_count} {before}");
    assert_eq!(client.shell(copied, "cat /secret").await.trim(), secret);
    client.start(other_copied).await.expect("start");
    let shown = client.shell(other_copied, "cat /cache/file").await;
    assert_eq!(shown, "in memory\n");
    until("the copy has the new pod's settings", async || {
        let shown = client.shell(other_copied, "cat /settings/word").await;
        whether(shown == "two", shown)
    })
    .await;
    let is = client.shell(copied, network).await;
    for (was, is) in was.lines().zip(is.lines()) {
        assert_ne!(was, is);
    }
    assert!(is.ends_with("second\n"), "{is}");
    assert_ne!(client.shell(copied, boot_id).await, random);
    let gateway = "ip route | awk '/default/ {print $3}'";
    let ping = format!("ping -c 1 -W 5 $({gateway})");
    client.shell(copied, &ping).await;

    // What is left of the pod works: another container, a restart of the daemon, the end.
    let new = run(
        &mut client,
        &copy,
        asked("new", &busybox, "exec sleep 1000"),
    )
    .await;
    assert_eq!(client.shell(&new, "echo yes").await, "yes\n");
    daemon.kill();
    daemon.restart().await;
    let mut client = daemon.client().await;
    let from = count(&mut client, copied).await;
    counts_on(&mut client, copied, from).await;
    client.stop(copied, 0).await.expect("stop");
    assert_eq!(client.exited(copied).await.exit_code, 137);
    for pod in [&copy, &pod] {
        client.end_pod(pod).await;
    }

    // Once more from the same checkpoint, when the saved pod is gone.
    let (again, ids) = restore(&mut client, place.path(), config, &configs)
        .await
        .expect("restore again");
    client.start(&ids[0]).await.expect("start");
    let (told, _) = kept(&mut client, &again, &ids[0], "main").await;
    assert_eq!(told, secret);
    client.end_pod(&again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_saved_or_brought_back_is_refused_and_the_pod_goes_on() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let main = asked("main", &busybox, COUNTING);
    let config = pod_asked(&client, "saved");
    let pod = client.run_pod_as_it_is(config).await.expect("run pod");
    let id = run(&mut client, &pod, main.clone()).await;
    let second = run(
        &mut client,
        &pod,
        asked("second", &busybox, "exec sleep 1000"),
    )
    .await;
    counts_on(&mut client, &id, 1).await;
    let place = directory();
    let full = directory();
    fs::write(full.path().join("file"), "").expect("a file");
    let missing = place.path().join("missing");
    let here = place.path();
    let both = [id.as_str(), second.as_str()];
    let cases: [(&Path, Vec<&str>, Code, &str); 8] = [
        (
            Path::new("relative"),
            both.to_vec(),
            Code::InvalidArgument,
            "absolute",
        ),
        (
            &missing,
            both.to_vec(),
            Code::InvalidArgument,
            "does not exist",
        ),
        (
            full.path(),
            both.to_vec(),
            Code::InvalidArgument,
            "not empty",
        ),
        (here, vec![], Code::InvalidArgument, "is empty"),
        (
            here,
            vec![&id, &second, &id],
            Code::InvalidArgument,
            "twice",
        ),
        (here, vec![&id], Code::FailedPrecondition, &second),
        (here, vec![&id, "f00f00"], Code::NotFound, "f00f00"),
        (
            Path::new("/proc"),
            both.to_vec(),
            Code::InvalidArgument,
            "not empty",
        ),
    ];
    for (path, ids, code, word) in cases {
        let refused = save(&mut client, &pod.id, path, &ids).await;
        let refused = refused.expect_err(word);
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(word), "{refused}");
    }
    let mut request = CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        output_path: here.display().to_string(),
        container_ids: both.map(str::to_owned).to_vec(),
        options: [("compress".to_owned(), "yes".to_owned())].into(),
    };
    let refused = client.runtime.checkpoint_pod(request.clone()).await;
    let refused = refused.expect_err("an unknown option");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    // The time is over before it is complete. The answer may be the server's or the client's.
    request.options.clear();
    let mut request = Request::new(request);
    request.set_timeout(Duration::from_millis(5));
    let refused = client.runtime.checkpoint_pod(request).await;
    let code = refused.expect_err("too short a time").code();
    assert!(
        matches!(code, Code::DeadlineExceeded | Code::Cancelled),
        "{code:?}"
    );
    let request = CheckpointContainerRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    let refused = client.runtime.checkpoint_container(request).await;
    assert_eq!(
        refused.expect_err("one container").code(),
        Code::Unimplemented
    );
    let from = count(&mut client, &id).await;
    counts_on(&mut client, &id, from).await;
    until("nothing is left in the directory", async || {
        whether(names(here).is_empty(), names(here))
    })
    .await;

    // A directory of the host: its server has open files.
    let shared = directory();
    let sharing = pod_asked(&client, "sharing");
    let sharing = client.run_pod_as_it_is(sharing).await.expect("run pod");
    let config = with_mounts(
        asked("main", &busybox, "exec sleep 1000"),
        vec![mount(shared.path(), "/shared")],
    );
    let user = run(&mut client, &sharing, config).await;
    let refused = save(&mut client, &sharing.id, here, &[&user]).await;
    let refused = refused.expect_err("a share");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let path = shared.path().display().to_string();
    assert!(refused.message().contains(&path), "{refused}");
    client.end_pod(&sharing).await;

    save(&mut client, &pod.id, here, &both).await.expect("save");
    let second_config = asked("second", &busybox, "exec sleep 1000");
    let before = daemon.census();
    let other = pod_asked(&client, "copy");
    let cases = [
        (vec![main.clone()], "lacks its containers second"),
        (
            vec![main.clone(), asked("second", &busybox, "exec sleep 1001")],
            "command",
        ),
        (
            vec![
                main.clone(),
                second_config.clone(),
                asked("third", &busybox, "true"),
            ],
            "third",
        ),
    ];
    for (configs, word) in cases {
        let refused = restore(&mut client, here, other.clone(), &configs).await;
        let refused = refused.expect_err(word);
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains(word), "{refused}");
    }
    let configs = [main, second_config];
    let refused = restore(&mut client, shared.path(), other.clone(), &configs).await;
    let refused = refused.expect_err("no checkpoint");
    assert!(refused.message().contains("no manifest.json"), "{refused}");
    // The VM's state is damaged, and its memory cut off.
    for name in ["state", "memory"] {
        let (path, kept) = (here.join(name), shared.path().join(name));
        fs::rename(&path, &kept).expect("take it away");
        let mut start = [0; 1000];
        let mut file = fs::File::open(&kept).expect("open");
        file.read_exact(&mut start).expect("read");
        fs::write(&path, start).expect("its beginning only");
        let refused = restore(&mut client, here, other.clone(), &configs).await;
        let refused = refused.expect_err(name);
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("has 1000"), "{refused}");
        fs::rename(&kept, &path).expect("put it back");
    }
    until("failed attempts leave nothing", async || {
        let now = daemon.census();
        match now.difference(&before) {
            None => Ok(()),
            Some(difference) => Err(difference),
        }
    })
    .await;
    let (copy, ids) = restore(&mut client, here, other, &configs)
        .await
        .expect("the checkpoint is as it was");
    client
        .remove(&ids[1])
        .await
        .expect("remove one that never ran");
    client.start(&ids[0]).await.expect("start");
    counts_on(&mut client, &ids[0], from).await;
    client.end_pod(&copy).await;

    // The daemon dies while a pod is frozen.
    let again = directory();
    let saving = tokio::spawn({
        let (mut client, pod, path) = (client.clone(), pod.id.clone(), again.path().to_owned());
        let both = both.map(str::to_owned);
        async move {
            let both: Vec<&str> = both.iter().map(String::as_str).collect();
            save(&mut client, &pod, &path, &both).await
        }
    });
    until("the checkpoint has begun", async || {
        whether(!names(again.path()).is_empty(), ())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    daemon.kill();
    let _ = saving.await;
    daemon.restart().await;
    let mut client = daemon.client().await;
    let from = count(&mut client, &id).await;
    counts_on(&mut client, &id, from).await;
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_save_a_pod_and_bring_it_back() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let config = pod_asked(&client, "saved");
    let pod = client.run_pod_as_it_is(config).await.expect("run pod");
    let id = run(&mut client, &pod, asked("main", &busybox, COUNTING)).await;
    counts_on(&mut client, &id, 1).await;
    let secret = client.shell(&id, "cat /secret").await;
    let place = directory();
    let to: PathBuf = place.path().join("of/it");
    let bulkhead = |arguments: &[&str]| {
        let output = cli::bulkhead(&daemon, arguments);
        (
            output.status.success(),
            cli::stdout(&output),
            cli::stderr(&output),
        )
    };
    let directory = to.display().to_string();
    let (is_done, _, said) = bulkhead(&["checkpoint", &pod.id[..12], &directory]);
    assert!(is_done, "{said}");
    let (is_done, _, said) = bulkhead(&["checkpoint", &pod.id[..12], &directory]);
    assert!(!is_done && said.contains("is not empty"), "{said}");
    client.end_pod(&pod).await;
    let (is_done, shown, said) = bulkhead(&["restore", "--name", "back", &directory]);
    assert!(is_done, "{said}");
    let mut lines = shown.lines();
    let pod = lines.next().expect("the pod's id").to_owned();
    let (id, name) = lines
        .next()
        .and_then(|line| line.split_once(' '))
        .expect("a container");
    assert_eq!(name, "main");
    assert_eq!(client.shell(id, "cat /secret").await, secret);
    let from = count(&mut client, id).await;
    counts_on(&mut client, id, from).await;
    client.stop_pod(&pod).await.expect("stop");
    client.remove_pod(&pod).await.expect("remove");
}
