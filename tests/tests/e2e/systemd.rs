// SPDX-License-Identifier: Apache-2.0
//! Follows docs/kubernetes.md: makes a node under a real systemd, with the units, files and commands of that page and a
//! real kubelet.

use std::path::Path;
use std::time::Duration;

use bulkhead_proto::cri::{
    LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxState,
    UpdatePodSandboxResourcesRequest,
};
use bulkhead_tests::client::{Client, Pod, container};
use bulkhead_tests::kubelet::{mount, with_mounts};
use bulkhead_tests::node::client_program;
use bulkhead_tests::page::{self, block};
use bulkhead_tests::registry::{Registry, free_address};
use bulkhead_tests::systemd::Systemd;
use bulkhead_tests::wait::try_until_blocking;

const PROJECT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const PATIENCE: Duration = Duration::from_secs(240);
const MANIFEST: &str = "/etc/kubernetes/manifests/hello.yaml";
const SOCKET: &str = "/run/bulkhead/bulkhead.sock";

fn until<T>(what: &str, host: &Systemd, mut look: impl FnMut() -> Option<T>) -> T {
    let found = try_until_blocking(what, PATIENCE, || {
        look().ok_or_else(|| format!("systemd said:\n{}", host.output()))
    });
    found.unwrap_or_else(|late| panic!("{late}"))
}

fn vmms(host: &Systemd) -> Vec<String> {
    // pgrep fails if it finds no process.
    let shown = host.run(&[
        "sh",
        "-c",
        "pgrep -f '^/usr/lib/bulkhead/bulkhead-vmm run' || true",
    ]);
    shown.split_whitespace().map(str::to_owned).collect()
}

fn scope_of(cgroup: &str) -> (String, String) {
    let inside = cgroup.strip_suffix("/vm").expect("our cgroup in a scope");
    let (slice, scope) = inside.rsplit_once('/').expect("a scope in a slice");
    assert!(
        scope.starts_with("bulkhead-") && scope.ends_with(".scope"),
        "{cgroup}"
    );
    (slice.to_owned(), scope.to_owned())
}

/// Installs kubelet as kubeadm or another distribution would, with the settings of a node without an API server.
fn bring_kubelet(host: &Systemd) {
    let kubelet = client_program("kubelet");
    let addresses = host.run(&["hostname", "-I"]);
    let address = addresses.split_whitespace().next().expect("an address");
    host.write(
        "/etc/systemd/system/kubelet.service",
        &format!(
            "[Service]\nExecStart={} --config=/var/lib/kubelet/config.yaml $KUBELET_EXTRA_ARGS \
             --hostname-override=node --node-ip={address}\nRestart=always\n",
            kubelet.display()
        ),
    );
    host.write(
        "/var/lib/kubelet/config.yaml",
        &format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\naddress: 127.0.0.1\nport: {}\n\
             readOnlyPort: 0\nhealthzPort: 0\nauthentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\n\
             authorization: {{mode: AlwaysAllow}}\nfailSwapOn: false\nstaticPodPath: /etc/kubernetes/manifests\n\
             fileCheckFrequency: 1s\nmakeIPTablesUtilChains: false\nimageGCHighThresholdPercent: 100\n\
             evictionHard: {{memory.available: 50Mi, nodefs.available: 1Mi}}\n",
            free_address().port()
        ),
    );
}

fn install(host: &Systemd, state: &Path) {
    for file in [
        "/etc/modules-load.d/bulkhead.conf",
        "/etc/sysctl.d/90-bulkhead.conf",
        "/etc/cni/net.d/10-bulkhead.conflist",
        "/etc/kubernetes/kubelet.conf.d/10-bulkhead.conf",
        "/etc/systemd/system/kubelet.service.d/20-bulkhead.conf",
    ] {
        host.write(file, &block(file));
    }
    let tools = "/usr/lib/systemd/systemd";
    host.run(&[
        &format!("{tools}-modules-load"),
        "/etc/modules-load.d/bulkhead.conf",
    ]);
    host.run(&[&format!("{tools}-sysctl"), "/etc/sysctl.d/90-bulkhead.conf"]);
    let install = block("install.sh");
    host.run(&["sh", "-euc", &format!("cd {PROJECT}\n{install}")]);
    // State on the emulated host's disk, and a registry without TLS.
    host.write(
        "/etc/bulkhead/config.toml",
        &format!(
            "state_dir = \"{}\"\nsandbox.boot_timeout_seconds = 120\n{}[registries.\"{}\"]\nplain_http = true\n",
            state.display(),
            block("/etc/bulkhead/config.toml"),
            Registry::shared().address
        ),
    );
    bring_kubelet(host);
    for unit in ["bulkhead", "kubelet"] {
        host.run(&[
            "systemd-analyze",
            "verify",
            "--man=no",
            &format!("{unit}.service"),
        ]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_set_up_as_documented_runs_pods_in_scopes_that_outlive_the_daemon() {
    std::fs::create_dir_all("/var/lib/bulkhead").expect("make /var/lib/bulkhead");
    let directory = tempfile::Builder::new()
        .prefix("e2e-systemd-")
        .tempdir_in("/var/lib/bulkhead")
        .expect("a directory for a node");
    let host = Systemd::boot(directory.path());
    install(&host, &directory.path().join("state"));
    host.run(&["systemctl", "start", "dbus.service"]);
    host.run(&["sh", "-euc", &block("start.sh")]);
    assert_eq!(host.property("bulkhead", "ActiveState"), "active");

    check_protection(&host);
    check_pod_of_kubelet(&host);
    // kubelet would end a pod that it does not know.
    host.run(&["systemctl", "stop", "kubelet"]);
    check_pod_without_kubelet(&host, directory.path()).await;
    host.run(&["systemctl", "stop", "kubelet", "bulkhead"]);
    assert_eq!(host.property("bulkhead", "Result"), "success");
}

/// The daemon is confined, and sees the mounts of the host: it has no mount namespace of its own.
fn check_protection(host: &Systemd) {
    let daemon = host.property("bulkhead", "MainPID");
    let namespace = |pid: &str| host.run(&["readlink", &format!("/proc/{pid}/ns/mnt")]);
    assert_eq!(namespace(&daemon), namespace("1"));
    let status = host.run(&["cat", &format!("/proc/{daemon}/status")]);
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "no {line:?} in:\n{status}");
    }
    let bound = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:\t"));
    let bound = u64::from_str_radix(bound.expect("CapBnd"), 16).expect("a number");
    for (name, bit) in [
        ("SYS_MODULE", 16),
        ("SYS_RAWIO", 17),
        ("SYS_TIME", 25),
        ("SYSLOG", 34),
    ] {
        assert_eq!(bound & (1 << bit), 0, "the daemon could have {name}");
    }
}

fn check_pod_of_kubelet(host: &Systemd) {
    let busybox = Registry::shared().image("test/busybox");
    // The API server would set the overhead of the RuntimeClass. kubelet without an API server panics if a pod names a
    // RuntimeClass.
    let pod = block("pod.yaml")
        .replace(page::IMAGE, &busybox)
        .replace("  runtimeClassName: bulkhead\n", "")
        .replace(
            "  containers:",
            "  overhead: {memory: 180Mi}\n  containers:",
        );
    assert!(pod.contains(&busybox) && pod.contains("overhead"), "{pod}");
    host.write(MANIFEST, &pod);
    host.run(&["systemctl", "start", "kubelet"]);
    let log = until("the pod has a log", host, || {
        let shown = host.run(&["sh", "-c", "cat /var/log/pods/*/hello/0.log || true"]);
        Some(shown).filter(|log| log.contains("hello"))
    });
    assert!(log.contains("hello from a kernel of its own: 6."), "{log}");
    let vmm = vmms(host);
    assert_eq!(vmm.len(), 1);

    let cgroup = host.cgroup_of(&vmm[0]);
    let (slice, scope) = scope_of(&cgroup);
    assert!(
        slice.starts_with("/kubepods.slice/kubepods-pod"),
        "{cgroup}"
    );
    assert_eq!(
        host.cgroup_file(&slice, "memory.max"),
        (244_u64 << 20).to_string()
    );
    assert_eq!(
        format!("/kubepods.slice/{}", host.property(&scope, "Slice")),
        slice
    );
    assert_eq!(host.property(&scope, "Delegate"), "yes");
    let limit: u64 = host
        .cgroup_file(&cgroup, "memory.max")
        .parse()
        .expect("a limit");
    assert!(limit > 64 << 20, "{limit}");
    host.run(&["systemctl", "daemon-reload"]);
    assert_eq!(host.cgroup_file(&cgroup, "memory.max"), limit.to_string());

    for stop in [
        ["systemctl", "restart", "bulkhead"].as_slice(),
        &[
            "systemctl",
            "kill",
            "--signal=KILL",
            "--kill-who=main",
            "bulkhead",
        ],
    ] {
        let old = host.property("bulkhead", "MainPID");
        host.run(stop);
        until("the daemon is back", host, || {
            let pid = host.property("bulkhead", "MainPID");
            let is_new = pid != old && host.property("bulkhead", "ActiveState") == "active";
            is_new.then_some(())
        });
        assert_eq!(vmms(host), vmm, "after {stop:?}");
        assert_eq!(host.cgroup_of(&vmm[0]), cgroup);
    }

    std::fs::remove_file(host.path(MANIFEST)).expect("remove the manifest");
    until("the VM ends", host, || vmms(host).is_empty().then_some(()));
    until("the scope ends", host, || {
        (host.property(&scope, "LoadState") == "not-found").then_some(())
    });
    let slice = host.path(&format!("/sys/fs/cgroup{slice}"));
    until("kubelet removes its slice", host, || {
        (!slice.exists()).then_some(())
    });
}

/// What the daemon's protection could break: a hostPath on a mount that is newer than the daemon, the bits that a container
/// may set there, exec, and the network, also after the daemon was restarted.
async fn check_work(host: &Systemd, client: &mut Client, pod: &Pod, directory: &Path) {
    let shared = directory.join("shared");
    std::fs::create_dir(&shared).expect("a directory to share");
    let mounted = shared.display().to_string();
    host.run(&["mount", "-t", "tmpfs", "tmpfs", &mounted]);
    host.run(&["sh", "-c", &format!("echo new > {mounted}/file")]);
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let config = container("main", &busybox, &["sleep", "1000"]);
    let config = with_mounts(config, vec![mount(&shared, "/shared")]);
    let id = client.create(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let line = "cat /shared/file; cp /bin/busybox /shared/own; chmod 4755 /shared/own; ping -c 1 -W 20 10.85.0.1 | grep -c ttl";
    assert_eq!(client.shell(&id, line).await, "new\n1\n");
    let mode = host.run(&["stat", "-c", "%a", &format!("{mounted}/own")]);
    assert_eq!(mode, "4755\n");
    let audit = host.run(&["/usr/lib/bulkhead/bulkhead", "check", "--vm", &pod.id]);
    assert!(audit.contains("This VM is kept in."), "{audit}");

    host.run(&["systemctl", "restart", "bulkhead"]);
    *client = connect(host, directory).await;
    let line = "ping -c 1 -W 20 10.85.0.1 | grep -c ttl";
    assert_eq!(
        client.shell(&id, line).await,
        "1\n",
        "after a restart of the daemon"
    );
    client.remove(&id).await.expect("remove");
    host.run(&["umount", &mounted]);
}

async fn connect(host: &Systemd, directory: &Path) -> Client {
    let connected = Client::connect(&host.path(SOCKET), &directory.join("logs")).await;
    connected.expect("connect")
}

/// A pod that a CRI client makes, without cgroups of kubelet's.
async fn check_pod_without_kubelet(host: &Systemd, directory: &Path) {
    let mut client = connect(host, directory).await;
    let mut config = client.pod_config("alone");
    let shares = |cpu_shares| LinuxContainerResources {
        cpu_shares,
        ..LinuxContainerResources::default()
    };
    config.linux = Some(LinuxPodSandboxConfig {
        resources: Some(shares(1024)),
        ..LinuxPodSandboxConfig::default()
    });
    let pod = client.run_pod_with(config).await.expect("run pod");
    let vmm = vmms(host);
    let (slice, scope) = scope_of(&host.cgroup_of(&vmm[0]));
    assert_eq!(slice, "/bulkhead.slice");
    assert_eq!(host.property(&scope, "CPUWeight"), "39");
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        resources: Some(shares(2048)),
        ..UpdatePodSandboxResourcesRequest::default()
    };
    let updated = client.runtime.update_pod_sandbox_resources(request).await;
    updated.expect("another weight");
    until("the scope has its new weight", host, || {
        (host.property(&scope, "CPUWeight") == "79").then_some(())
    });
    check_work(host, &mut client, &pod, directory).await;
    let state = client.pod_state(&pod.id).await.expect("state");
    assert_eq!(state, PodSandboxState::SandboxReady);
    client.end_pod(&pod).await;
    assert_eq!(host.property(&scope, "LoadState"), "not-found");
}
