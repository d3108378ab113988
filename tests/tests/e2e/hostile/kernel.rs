// SPDX-License-Identifier: Apache-2.0
//! A guest whose kernel drives all virtio devices with garbage (tests/kernels/garbage.c): only its own VM suffers.

use std::path::Path;
use std::process::Command;

use bulkhead_tests::table::Table;

use super::setting::Setting;

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
    let setting = Setting::new(|daemon| {
        let kernel = daemon.path("garbage");
        compile("garbage.c", &kernel);
        format!(
            "kernel = \"{}\"\nsandbox.templates_mib = 0\nsandbox.boot_timeout_seconds = {ATTACK_SECONDS}\n",
            kernel.display()
        )
    })
    .await;
    let mut client = setting.client.clone();
    let mut table =
        Table::new("another client and a neighbour beside a kernel that lies to its devices");
    setting.measured_idle(&mut table).await;
    let attack = client.run_pod("garbage");
    let ended = setting.measured(&mut table, "hostile kernel", attack).await;
    let error = ended.expect_err("it never boots");
    // The VMM went on to the end, whatever its devices were told.
    let lasted = error.message().contains("was not ready");
    table.row("how it ended", lasted, error.message());
    table.finish();
    assert_eq!(client.pod_ids().await, [setting.healthy.id.as_str()]);
    assert_eq!(
        client.shell(&setting.neighbour, "echo well").await,
        "well\n"
    );
    client.end_pod(&setting.healthy).await;
}
