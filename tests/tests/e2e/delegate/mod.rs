// SPDX-License-Identifier: Apache-2.0
//! A real containerd as a delegate, in both releases that Debian has: its pods beside pods in microVMs, behind one
//! socket.

mod images;
mod kubelet;
mod lists;
mod outage;
mod routing;
mod streams;

use bulkhead_proto::cri::{
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig,
};
use bulkhead_tests::client::{Client, OWN_PROCESSES, Pod};
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;

/// A daemon with a delegate called `runc`.
struct Both {
    client: Client,
    daemon: Daemon,
    containerd: Containerd,
    busybox: String,
}

impl Both {
    /// `first` are keys of the daemon's configuration that stand before all tables.
    async fn start(release: Release, first: &str) -> Self {
        eprintln!("---- with containerd: {release:?}");
        let containerd = Containerd::start(release).await;
        let daemon = Daemon::start_with(Networking::Bridge, &containerd.config(first)).await;
        Self {
            client: daemon.client().await,
            daemon,
            containerd,
            busybox: Registry::shared().image("test/busybox:latest"),
        }
    }

    /// Starts the daemon again with other keys.
    async fn configure(&mut self, extra: &str) {
        self.daemon.restart_with(Networking::Bridge, extra).await;
        self.client = self.daemon.client().await;
    }

    /// Pulls the image everywhere, then runs a pod of each side with a container that sleeps: in a VM, by runc.
    async fn sleepers(&mut self) -> [(Pod, String); 2] {
        self.client.pull(&self.busybox).await.expect("pull");
        let inside = self.sleeper("bulkhead", "inside").await;
        [inside, self.sleeper("runc", "beside").await]
    }

    async fn sleeper(&mut self, handler: &str, name: &str) -> (Pod, String) {
        let config = pod_config(&self.client, name, OWN_PROCESSES);
        let pod = self.client.run_pod_by(handler, config).await;
        let pod = pod.unwrap_or_else(|error| panic!("a pod of {handler}: {error:?}"));
        let script = "echo started; exec sleep 10000";
        let container = self.client.run_script(&pod, "main", &self.busybox, script);
        let container = container.await;
        (pod, container)
    }

    /// Whether a pod's containers see the host's kernel, and not one of their own.
    async fn has_hosts_kernel(&mut self, pod: &Pod) -> bool {
        let script = "exec sleep 10000";
        let id = self.client.run_script(pod, "main", &self.busybox, script);
        let id = id.await;
        let version = self.client.shell(&id, "cat /proc/version").await;
        let hosts = std::fs::read_to_string("/proc/version").expect("the host's version");
        version.trim() == hosts.trim()
    }
}

fn pod_config(client: &Client, name: &str, namespaces: NamespaceOption) -> PodSandboxConfig {
    let config = client.pod_config(name);
    // kubelet names no host for a pod that shares the host's network. containerd 2 refuses one there.
    let hostname = match namespaces.network() {
        NamespaceMode::Node => String::new(),
        _ => config.hostname.clone(),
    };
    PodSandboxConfig {
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        hostname,
        ..config
    }
}
