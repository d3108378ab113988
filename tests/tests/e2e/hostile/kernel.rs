// SPDX-License-Identifier: Apache-2.0
//! A guest whose kernel drives all virtio devices with garbage (tests/kernels/garbage.c): only its own VM suffers.

use std::path::Path;
use std::process::Command;

use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::watch::Watch;
use tokio::time::sleep;

use super::IDLE;

/// How long the kernel may attack: so long may a boot take, without what it waits for a CPU.
const ATTACK_SECONDS: u64 = 5;

/// Compiles a kernel as the VMM loads one: an ELF file above 1 MiB, without what a kernel must enable first.
fn compile(name: &str, to: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("kernels")
        .join(name);
    let compiled = Command::new("gcc")
        .args([
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-ffreestanding",
            "-nostdlib",
            "-static",
        ])
        .args([
            "-fno-pie",
            "-no-pie",
            "-mgeneral-regs-only",
            "-mno-red-zone",
        ])
        .args(["-fno-stack-protector", "-fcf-protection=none"])
        .arg("-Wl,-Ttext=0x1000000,--build-id=none,-z,max-page-size=4096,-e,start")
        .arg("-o")
        .args([to, &source])
        .status();
    assert!(compiled.expect("run gcc").success(), "{}", source.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_lies_to_all_devices_costs_only_its_own_vm() {
    let mut daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let healthy = client.run_pod("healthy").await.expect("run pod");
    let sleeping = "exec sleep 10000";
    let neighbour = client
        .run_script(&healthy, "main", &busybox, sleeping)
        .await;
    let kernel = daemon.path("garbage");
    compile("garbage.c", &kernel);
    let config = format!(
        "kernel = \"{}\"\nsandbox.boot_timeout_seconds = {ATTACK_SECONDS}\n",
        kernel.display()
    );
    daemon.restart_with(Networking::Bridge, &config).await;
    let mut client = daemon.client().await;
    let mut table =
        Table::new("another client and a neighbour beside a kernel that lies to its devices");
    let watch = Watch::over(&daemon, Some(&neighbour)).await;
    sleep(IDLE).await;
    let seen = watch.end().await;
    table.row("idle", seen.is_bounded(), seen);

    let watch = Watch::over(&daemon, Some(&neighbour)).await;
    let error = client.run_pod("garbage").await.expect_err("it never boots");
    let seen = watch.end().await;
    table.row("hostile kernel", seen.is_bounded(), seen);
    // The VMM went on to the end, whatever its devices were told.
    let lasted = error.message().contains("was not ready");
    table.row("how it ended", lasted, error.message());
    table.finish();
    assert_eq!(client.pod_ids().await, [healthy.id.as_str()]);
    assert_eq!(client.shell(&neighbour, "echo well").await, "well\n");
    client.end_pod(&healthy).await;
}
