// SPDX-License-Identifier: Apache-2.0
//! What the guest's kernel offers: options that are built in, and modules that load when a program first uses them.

use bulkhead_proto::cri::{ContainerConfig, LinuxContainerConfig, LinuxContainerSecurityContext};
use bulkhead_tests::client::container;
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;

/// What programs find without a module.
const BUILT_IN: &str = r#"
zcat /proc/config.gz | grep -c '^CONFIG_MODULES=y'
test -e /proc/pressure/memory && echo psi
test -e /proc/sys/net/mptcp/enabled && echo mptcp
test -e /proc/self/loginuid && echo audit
cat /sys/kernel/security/lsm 2>/dev/null || { mount -t securityfs none /sys/kernel/security && cat /sys/kernel/security/lsm; }
"#;
/// Kinds of interfaces.
const LINKS: [&str; 8] = [
    "dummy",
    "ifb",
    "bridge",
    "macvlan",
    "vlan",
    "vxlan",
    "wireguard",
    "ipip",
];
/// File systems. The first use is a mount, which fails, because there is no such disk or server.
const FILE_SYSTEMS: [&str; 9] = [
    "btrfs", "xfs", "squashfs", "nfs", "nfs4", "cifs", "iso9660", "vfat", "autofs",
];

fn privileged(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    let mut config = container(name, image, command);
    config.linux = Some(LinuxContainerConfig {
        security_context: Some(LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        }),
        ..Default::default()
    });
    config
}

/// The line that makes an interface of a kind.
fn add_link(kind: &str) -> String {
    if kind == "vlan" {
        return "ip link add link lo name x-vlan type vlan id 5 2>&1 | head -n 1".to_owned();
    }
    let more = match kind {
        "macvlan" => "link lo mode bridge",
        "vxlan" => "id 5 dstport 4789",
        "ipip" => "remote 127.0.0.2 local 127.0.0.1",
        _ => "",
    };
    // busybox's ip does not know all kinds, but the kernel has loaded the module by then.
    format!("ip link add x-{kind} type {kind} {more} 2>&1 | head -n 1")
}

/// Modules and their use count, as a program in the pod sees them.
fn loaded(modules: &str, name: &str) -> bool {
    modules
        .lines()
        .any(|line| line.split(' ').next() == Some(name))
}

#[tokio::test]
async fn modules_load_when_a_program_first_uses_them_and_not_before() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let config = client.privileged_pod_config("kernel");
    let pod = client.run_pod_with(config).await.expect("run pod");
    let sleep = ["sleep", "1000"];
    let created = client.create(&pod, privileged("root", &busybox, &sleep));
    let root = created.await.expect("create");
    client.start(&root).await.expect("start");
    let created = client.create(&pod, container("plain", &busybox, &sleep));
    let plain = created.await.expect("create");
    client.start(&plain).await.expect("start");

    let mut table = Table::new("the guest's kernel");
    let before = client.shell(&root, "cat /proc/modules").await;
    table.equal("no module is loaded in a fresh pod", before.as_str(), "");
    let found = client.shell(&root, BUILT_IN).await;
    let found: Vec<&str> = found.lines().collect();
    let expected = ["1", "psi", "mptcp", "audit", "capability,landlock"];
    table.equal(
        "built in: config.gz, PSI, MPTCP, audit, Landlock",
        &found[..],
        &expected[..],
    );

    // A container without privileges cannot make interfaces, so nothing loads.
    client.shell(&plain, "ip link add x type dummy; true").await;
    let modules = client.shell(&root, "cat /proc/modules").await;
    table.row(
        "none loads for a refused call",
        !loaded(&modules, "dummy"),
        &modules,
    );

    // At once, so that several processes look for the modules at the same time.
    let lines: Vec<String> = LINKS
        .iter()
        .map(|kind| format!("({}) &", add_link(kind)))
        .collect();
    let said = client
        .shell(&root, &format!("{}\nwait", lines.join("\n")))
        .await;
    let modules = client.shell(&root, "cat /proc/modules").await;
    for kind in LINKS {
        let module = if kind == "vlan" { "8021q" } else { kind };
        table.row(
            &format!("interface {kind}"),
            loaded(&modules, module),
            &said,
        );
    }
    let mount = |kind: &str| format!("mount -t {kind} none /tmp 2>/dev/null");
    let lines: Vec<String> = FILE_SYSTEMS.iter().map(|kind| mount(kind)).collect();
    client
        .shell(&root, &format!("{}; true", lines.join("; ")))
        .await;
    let known = client.shell(&root, "cat /proc/filesystems").await;
    for kind in FILE_SYSTEMS {
        let is_there = known.split_whitespace().any(|word| word == kind);
        table.row(&format!("file system {kind}"), is_there, is_there);
    }
    let line =
        "truncate -s 1M /tmp/disk && losetup /dev/loop3 /tmp/disk && losetup -a && losetup -f";
    let loops = client.shell(&root, line).await;
    table.row(
        "loop devices, by their nodes and by asking for one",
        loops.contains("/dev/loop3: ") && loops.ends_with("/dev/loop0\n"),
        &loops,
    );
    let console = client
        .shell(&root, "ls /dev/console /dev/null 2>/dev/null; true")
        .await;
    table.equal("no console without a terminal", console.trim(), "/dev/null");
    // Names that are no module's, among them some that must not become paths or patterns.
    let odd = ["../../init", "*", "dm-crypt/../x", "-r", "a b"]
        .map(|name| format!("mount -t '{name}' none /tmp"));
    let line = format!(
        "({}) 2>/dev/null; cat /proc/modules | wc -l",
        odd.join("; ")
    );
    let count = client.shell(&root, &line).await;
    let modules = client.shell(&root, "cat /proc/modules | wc -l").await;
    table.equal("odd names load nothing", count, modules);
    let seen = client.shell(&root, "ls /run/modules /run/modules.lock 2>/dev/null; grep -c erofs.*modules /proc/mounts; true").await;
    table.equal(
        "containers do not see the agent's mount of modules",
        seen.trim(),
        "0",
    );
    table.finish();
    client.end_pod(&pod).await;
}
