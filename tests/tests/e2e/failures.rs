// SPDX-License-Identifier: Apache-2.0
//! Failures and their messages: VMs that die, kernels that panic, files that are missing.

use bulkhead_proto::cri::{ContainerState, PodSandboxState};
use bulkhead_tests::client::assert_fails;
use bulkhead_tests::daemon::{Daemon, Networking, program};
use bulkhead_tests::disk::SmallDisk;
use bulkhead_tests::registry::Registry;
use std::time::{Duration, Instant};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_vmm_makes_its_pod_not_ready_and_no_other() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let victim = client.run_pod("victim").await.expect("run pod");
    let pid = daemon.vmm_pids()[0];
    let other = client.run_pod("other").await.expect("run pod");
    let id = client
        .run_script(&victim, "main", &busybox, "exec sleep 1000")
        .await;
    let unharmed = client
        .run_script(&other, "main", &busybox, "exec sleep 1000")
        .await;
    let killed = Instant::now();
    std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .expect("kill the VMM");
    let status = client.exited(&id).await;
    assert!(
        killed.elapsed() < Duration::from_secs(20),
        "{:?}",
        killed.elapsed()
    );
    assert_eq!(status.exit_code, 137);
    assert!(
        !status.reason.is_empty() && !status.message.is_empty(),
        "{status:?}"
    );
    assert_eq!(
        client.pod_state(&victim.id).await.expect("state"),
        PodSandboxState::SandboxNotready
    );
    let alive = client.status(&unharmed).await.expect("status");
    assert_eq!(alive.state(), ContainerState::ContainerRunning);
    assert_fails(
        client
            .create(
                &victim,
                bulkhead_tests::client::container("late", &busybox, &["true"]),
            )
            .await,
        Code::FailedPrecondition,
        &[&victim.id],
    );
    client.end_pod(&victim).await;
    client.end_pod(&other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_panic_fails_the_boot_and_the_error_shows_the_console() {
    // The initramfs has no init, so the kernel panics.
    let empty = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(empty.path(), b"not an archive").expect("write");
    let line = format!(
        "initramfs = \"{}\"\nsandbox.templates_mib = 0",
        empty.path().display()
    );
    let daemon = Daemon::start_with(Networking::Bridge, &line).await;
    let mut client = daemon.client().await;
    let first = client
        .run_pod("panics")
        .await
        .expect_err("the boot must fail");
    assert!(first.message().contains("Kernel panic"), "{first:?}");
    let before = daemon.census();
    client
        .run_pod("panics")
        .await
        .expect_err("and fail again, with the name free");
    assert!(client.pod_ids().await.is_empty());
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_kernel_is_named() {
    let config = "kernel = \"/no/such/vmlinux\"\nsandbox.templates_mib = 0";
    let daemon = Daemon::start_with(Networking::Loopback, config).await;
    let mut client = daemon.client().await;
    let error = client.run_pod("none").await.expect_err("no kernel");
    assert!(error.message().contains("/no/such/vmlinux"), "{error:?}");
    assert!(client.pod_ids().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_pulls_and_pods_by_name_and_leaves_nothing() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    daemon.kill();
    // The disk has room for the records and busybox, but not for the 5 MB of the other image.
    let _images = SmallDisk::mount(daemon.path("state/images"), "6m");
    daemon.restart().await;
    let mut client = daemon.client().await;
    let registry = Registry::shared();
    let large = registry.image("test/oddities");
    assert_fails(
        client.pull(&large).await,
        Code::ResourceExhausted,
        &["test/oddities"],
    );
    let left = std::fs::read_dir(daemon.path("state/images/partial"))
        .expect("list")
        .count();
    assert_eq!(left, 0, "a failed pull leaves files");
    client
        .pull(&registry.image("test/busybox"))
        .await
        .expect("a small image fits");

    std::fs::create_dir_all(daemon.path("state/pods")).expect("make the directory");
    let _pods = SmallDisk::mount(daemon.path("state/pods"), "64k");
    assert_fails(
        client.run_pod("full").await,
        Code::ResourceExhausted,
        &["scratch"],
    );
    assert!(client.pod_ids().await.is_empty());
    let left = std::fs::read_dir(daemon.path("state/pods"))
        .expect("list")
        .count();
    assert_eq!(left, 0, "a failed pod leaves files");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_passes_here_and_fails_without_a_kernel() {
    let daemon = Daemon::start().await;
    let check = |config: &std::path::Path| {
        std::process::Command::new(program("bulkhead"))
            .args(["check", "--json", "--config"])
            .arg(config)
            .output()
            .expect("run bulkhead check")
    };
    let config = daemon.path("config.toml");
    let good = check(&config);
    let text = String::from_utf8_lossy(&good.stdout).into_owned();
    assert!(good.status.success(), "{text}");
    assert!(
        text.starts_with("{") && text.contains("\"ok\":true"),
        "{text}"
    );
    let bad_config = daemon.path("bad.toml");
    let written = std::fs::read_to_string(&config).expect("read the configuration");
    std::fs::write(
        &bad_config,
        format!("kernel = \"/no/such/vmlinux\"\n{written}"),
    )
    .expect("write");
    let bad = check(&bad_config);
    assert_eq!(bad.status.code(), Some(1));
    let text = String::from_utf8_lossy(&bad.stdout);
    assert!(
        text.contains("/no/such/vmlinux") && text.contains("scripts/build"),
        "{text}"
    );
}
