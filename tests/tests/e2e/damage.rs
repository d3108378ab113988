// SPDX-License-Identifier: Apache-2.0
//! Files of the daemon that are damaged, full disks, and who may read the files.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::client::{assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking, program};
use bulkhead_tests::disk::SmallDisk;
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::until;
use tonic::Code;

/// Starts the daemon on damaged files. It must end; returns what it said.
fn refusal(daemon: &Daemon) -> String {
    let ended = Command::new(program("bulkhead"))
        .args(["serve", "--config"])
        .arg(daemon.path("config.toml"))
        .output()
        .expect("start bulkhead serve");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(!ended.status.success(), "it serves: {said}");
    said
}

fn addresses_of(pod: &str) -> usize {
    let directory = Path::new("/run/bulkhead-tests-ipam/bulkhead-tests");
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
    texts.filter(|text| text.contains(pod)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_records_of_pods_are_named_and_without_them_nothing_of_the_pods_is_left() {
    let mut daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();
    let pod = client.run_pod("lost").await.expect("run pod");
    let other = client.run_pod("lost-too").await.expect("run pod");
    client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    let vmms = daemon.vmm_pids();
    assert_eq!((vmms.len(), addresses_of(&pod.id)), (2, 1));

    daemon.kill();
    let records = daemon.path("state/pods.redb");
    let good = fs::read(&records).expect("read the records");
    let mut garbled = good.clone();
    for page in garbled.chunks_mut(4096).skip(1).step_by(2) {
        page.fill(0);
    }
    for bytes in [
        &b""[..],
        b"not a database",
        &garbled,
        &good[..good.len() / 2],
    ] {
        fs::write(&records, bytes).expect("damage the records");
        let said = refusal(&daemon);
        let last = said.lines().last().unwrap_or_default();
        assert!(
            last.contains("pods.redb is damaged") && last.contains("move the file away"),
            "{said}"
        );
        assert_eq!(daemon.vmm_pids(), vmms, "nothing has happened to the pods");
    }
    fs::write(&records, &good).expect("mend the records");
    daemon.restart().await;
    let mut client = daemon.client().await;
    assert_eq!(client.pod_ids().await.len(), 2, "adopted");

    daemon.kill();
    fs::remove_file(&records).expect("lose the records");
    // Of one pod, the network's record is lost too.
    let record = daemon.path("state/cni").join(format!("{}.json", pod.id));
    fs::write(record, "").expect("damage a record");
    let somebodys = daemon.path("state/pods/somebodys");
    fs::create_dir(&somebodys).expect("make a directory");
    daemon.restart().await;
    let mut client = daemon.client().await;
    assert!(client.pod_ids().await.is_empty());
    assert!(daemon.vmm_pids().is_empty(), "VMs live on");
    assert!(somebodys.exists(), "it was no pod's");
    fs::remove_dir(&somebodys).expect("remove it");
    for pod in [&pod, &other] {
        assert_eq!(addresses_of(&pod.id), 0, "its address is not free");
    }
    daemon.census().assert_equals_but_for_processes(&before);
    let again = client.run_pod("lost").await.expect("the name is free");
    client.end_pod(&again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_records_of_images_are_named_and_without_them_images_are_pulled_anew() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("stays").await.expect("run pod");
    let runs = client
        .run_script(&pod, "runs", &busybox, "exec sleep 1000")
        .await;
    daemon.kill();
    let records = daemon.path("state/images/images.redb");
    fs::write(&records, "").expect("damage the records");
    let said = refusal(&daemon);
    assert!(said.contains("images.redb is damaged"), "{said}");
    fs::remove_file(&records).expect("move the records away");
    daemon.restart().await;
    let mut client = daemon.client().await;
    assert_eq!(client.shell(&runs, "echo lives").await, "lives\n");
    client.pull(&busybox).await.expect("pull again");
    client
        .run_script(&pod, "new", &busybox, "exec sleep 1000")
        .await;
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_layer_or_template_is_noticed_and_replaced() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let layers = fs::read_dir(daemon.path("state/images/layers")).expect("list");
    let layer: PathBuf = layers
        .flatten()
        .map(|file| file.path())
        .next()
        .expect("one");
    let good = fs::read(&layer).expect("read the layer");
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    fs::write(&layer, flipped).expect("damage the layer");
    let pod = client.run_pod("reads").await.expect("run pod");
    let create = container("main", &busybox, &["true"]);
    assert_fails(
        client.create(&pod, create.clone()).await,
        Code::DataLoss,
        &["is damaged", "pull the image again"],
    );
    assert_fails(
        client.create(&pod, create.clone()).await,
        Code::NotFound,
        &["pull"],
    );
    client.pull(&busybox).await.expect("pull again");
    assert_eq!(fs::read(&layer).expect("read the layer"), good);
    client.create(&pod, create).await.expect("create");
    client.end_pod(&pod).await;

    let templates = fs::read_dir(daemon.path("state/templates")).expect("list");
    let files = templates.flatten().map(|file| file.path());
    for template in files.filter(|path| path.extension().is_some_and(|end| end == "ext4")) {
        fs::write(template, "garbage").expect("damage the template");
    }
    let pod = client.run_pod("writes").await.expect("run pod");
    client
        .run_script(&pod, "main", &busybox, "echo x >/x; exec sleep 1000")
        .await;
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_pods_stop_and_go_and_a_pod_that_failed_keeps_no_name() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    daemon.kill();
    let state = SmallDisk::mount(daemon.path("state"), "300m");
    daemon.restart().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let goes = client.run_pod("goes").await.expect("run pod");
    let stays = client.run_pod("stays").await.expect("run pod");
    let runs = client
        .run_script(&stays, "runs", &busybox, "exec sleep 1000")
        .await;
    state.fill();
    for _ in 0..2 {
        assert_fails(
            client.run_pod("new").await,
            Code::ResourceExhausted,
            &["MiB of disk"],
        );
    }
    client.stop_pod(&goes.id).await.expect("stop");
    client.remove_pod(&goes.id).await.expect("remove");
    // What that has freed is filled again, and there is no reserve: the records cannot be written.
    fs::remove_file(daemon.path("state/pods.reserve")).expect("remove the reserve");
    state.fill();
    client.stop(&runs, 0).await.expect("stop the container");
    client.stop_pod(&stays.id).await.expect("stop the pod");
    assert!(daemon.vmm_pids().is_empty());
    for _ in 0..2 {
        assert_fails(
            client.run_pod("new").await,
            Code::ResourceExhausted,
            &["MiB of disk"],
        );
    }
    state.empty();
    let new = client.run_pod("new").await.expect("the name is free");
    client.end_pod(&new).await;
    client.remove_pod(&stays.id).await.expect("remove");
    until("what failed is gone", async || {
        let ids = client.pod_ids().await;
        if ids.is_empty() {
            Ok(())
        } else {
            Err(format!("{ids:?}"))
        }
    })
    .await;
    daemon.restart().await;
    let mut client = daemon.client().await;
    assert!(client.pod_ids().await.is_empty());
}

/// What somebody other than the owner may use below a directory.
fn open_to_others(directory: &Path, found: &mut Vec<String>) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let metadata = path.symlink_metadata().expect("look at a file");
        let mode = metadata.permissions().mode() & 0o777;
        let is_link = metadata.file_type().is_symlink();
        // A network namespace is mounted on its file.
        let is_namespace = path
            .parent()
            .is_some_and(|parent| parent.ends_with("netns"));
        if mode & 0o077 != 0 && !is_link && !is_namespace {
            let kind = if metadata.file_type().is_socket() {
                "socket"
            } else {
                "file"
            };
            found.push(format!("{kind} {} {mode:o}", path.display()));
        }
        if metadata.is_dir() {
            open_to_others(&path, found);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemons_files_are_for_their_owner_whatever_their_modes_were() {
    let mut daemon = Daemon::start().await;
    daemon.kill();
    for name in [
        "state",
        "run",
        "state/pods",
        "state/images",
        "state/images/layers",
        "state/cni",
    ] {
        let open = Permissions::from_mode(0o755);
        fs::set_permissions(daemon.path(name), open).expect("open a directory");
    }
    for name in ["state/pods.redb", "state/images/images.redb"] {
        let open = Permissions::from_mode(0o644);
        fs::set_permissions(daemon.path(name), open).expect("open a file");
    }
    daemon.restart().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("secret").await.expect("run pod");
    client
        .run_script(&pod, "main", &busybox, "echo said; exec sleep 1000")
        .await;
    client
        .log_until(&pod, "main", |log| log.contains("said"))
        .await;
    let mut found = Vec::new();
    for name in ["state", "run"] {
        open_to_others(&daemon.path(name), &mut found);
        let mode = fs::metadata(daemon.path(name))
            .expect("look")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700, "{name}");
    }
    assert!(found.is_empty(), "{found:#?}");
    // Others collect logs.
    let log = client.log_path(&pod, "main");
    let mode = |path: &Path| fs::metadata(path).expect("look").permissions().mode() & 0o777;
    assert_eq!(mode(&log), 0o640);
    assert_eq!(mode(log.parent().expect("its directory")), 0o755);
    client.end_pod(&pod).await;
}
