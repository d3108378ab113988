// SPDX-License-Identifier: Apache-2.0
//! A node: a daemon and a real kubelet without an API server. kubelet runs static pods, whose manifests are files in a
//! directory.
//!
//! kubelet runs in its own cgroup, as under systemd, because only there it sends everything that it sends on a real
//! node. Its directories are in the test's directory. ([`crate::kubelet`] is no kubelet: it imitates one.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bulkhead_proto::cri::{ListPodSandboxRequest, PodSandboxState};
use serde_json::{Value, json};

use crate::certificate::Certificate;
use crate::cgroups::remove_cgroup;
use crate::daemon::{Daemon, Networking};
use crate::node_api::Api;
use crate::registry::{Registry, free_address};
use crate::wait::{try_until, whether};

/// Set by `scripts/test` to what `scripts/build-clients` prints.
const CLIENTS_VARIABLE: &str = "BULKHEAD_CLIENTS";
const CGROUPS: &str = "/sys/fs/cgroup";
const NAME: &str = "node";
/// How long a test waits for a node's pods to reach a state. Several VMs may boot at once on one emulated CPU.
pub const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Debug)]
pub struct Node {
    pub daemon: Daemon,
    pub api: Api,
    pub certificate: Certificate,
    directory: tempfile::TempDir,
    kubelet: Option<Child>,
}

/// The path of a client that `scripts/build-clients` built.
pub fn client_program(name: &str) -> PathBuf {
    let directory = std::env::var_os(CLIENTS_VARIABLE)
        .unwrap_or_else(|| panic!("{CLIENTS_VARIABLE} is not set: run scripts/test"));
    Path::new(&directory).join(name)
}

impl Node {
    /// Starts daemon and kubelet. `settings` override fields of kubelet's configuration.
    pub async fn start(settings: Value) -> Self {
        Self::start_with(settings, "").await
    }

    /// Starts daemon and kubelet, with lines added to the daemon's configuration.
    pub async fn start_with(settings: Value, extra_config: &str) -> Self {
        fs::create_dir_all("/var/lib/bulkhead").expect("make /var/lib/bulkhead");
        let directory = tempfile::Builder::new()
            .prefix("node-")
            .tempdir_in("/var/lib/bulkhead")
            .expect("a directory for a node");
        for name in ["root", "manifests", "logs"] {
            fs::create_dir(directory.path().join(name)).expect("kubelet's directories");
        }
        let roots = directory.path().join("root");
        let config = format!(
            "volumes.kubelet_roots = [\"{}\"]\n{extra_config}",
            roots.display()
        );
        let daemon = Daemon::start_with(Networking::Bridge, &config).await;
        let certificate = Certificate::make();
        let api = Api::new(free_address(), &certificate).await;
        let mut node = Self {
            daemon,
            api,
            certificate,
            directory,
            kubelet: None,
        };
        node.configure(settings);
        node.start_kubelet().await;
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a pod's manifest: kubelet runs the pod, or updates it.
    pub fn apply(&self, pod: &Value) {
        let name = pod["metadata"]["name"].as_str().expect("a pod's name");
        let new = self.path("new-manifest");
        fs::write(&new, pod.to_string()).expect("a manifest");
        fs::rename(new, self.manifest(name)).expect("put the manifest in its place");
    }

    /// Removes a pod's manifest: kubelet ends the pod.
    pub fn delete(&self, name: &str) {
        fs::remove_file(self.manifest(name)).expect("remove the manifest");
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.path("manifests").join(format!("{name}.json"))
    }

    /// Returns what kubelet has printed.
    pub fn output(&self) -> String {
        fs::read_to_string(self.path("kubelet.log")).unwrap_or_default()
    }

    /// Kills kubelet with SIGKILL.
    pub fn kill_kubelet(&mut self) {
        if let Some(mut child) = self.kubelet.take() {
            child.kill().expect("kill kubelet");
            child.wait().expect("wait for kubelet");
        }
    }

    pub async fn start_kubelet(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("kubelet.log"))
            .expect("open kubelet's log");
        let cgroup = cgroup_for_kubelet();
        let child = Command::new("sh")
            .args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""])
            .arg(cgroup)
            .arg(client_program("kubelet"))
            .arg("--config")
            .arg(self.path("kubelet.json"))
            .arg("--root-dir")
            .arg(self.path("root"))
            .args(["--hostname-override", NAME, "--v", "2"])
            .args(["--node-ip", &address_of_this_machine()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second descriptor"))
            .stderr(log)
            .spawn()
            .expect("start kubelet");
        self.kubelet = Some(child);
        let healthy = try_until("kubelet is healthy", PATIENCE, async || {
            let answer = self.api.get("healthz").await;
            if answer.as_deref() == Ok("ok") {
                return Ok(());
            }
            if let Some(Ok(Some(status))) = self.kubelet.as_mut().map(Child::try_wait) {
                panic!(
                    "kubelet ended with {status}; it said:\n{}",
                    tail(&self.output())
                );
            }
            Err(format!("{answer:?}; it said:\n{}", tail(&self.output())))
        });
        healthy.await.unwrap_or_else(|late| panic!("{late}"));
    }

    /// Kills kubelet and starts it again with other settings.
    pub async fn restart_kubelet(&mut self, settings: Value) {
        self.kill_kubelet();
        self.configure(settings);
        self.start_kubelet().await;
    }

    /// Imitates a reboot: kills all processes, empties /run, removes the network; then starts daemon and kubelet.
    pub async fn reboot(&mut self) {
        self.kill_kubelet();
        let processes = [self.daemon.vmm_pids(), self.daemon.file_server_pids()].concat();
        self.daemon.kill();
        for pid in processes {
            kill(pid);
        }
        let run = self.daemon.path("run");
        unmount_below(&run);
        fs::remove_dir_all(&run).expect("empty the daemon's run directory");
        unmount_below(&self.path("root"));
        let _ = fs::remove_dir_all("/run/bulkhead-tests-ipam");
        let _ = Command::new("ip")
            .args(["link", "del", "bulkhead0"])
            .status();
        remove_cgroup(&Path::new(CGROUPS).join("kubepods"));
        self.daemon.restart().await;
        self.start_kubelet().await;
    }

    /// Waits until a pod has no ready sandbox. kubelet's API does not show that, because kubelet forgets a deleted pod
    /// at once.
    pub async fn until_stopped(&self, name: &str) -> Result<(), String> {
        let mut client = self.daemon.client().await;
        let what = format!("{name} has stopped");
        let stopped = try_until(&what, PATIENCE, async || {
            let request = ListPodSandboxRequest::default();
            let answer = client.runtime.list_pod_sandbox(request).await;
            let answer = answer.map_err(|status| status.to_string())?;
            let mut sandboxes = answer.into_inner().items;
            sandboxes.retain(|pod| {
                let metadata = pod.metadata.as_ref();
                let is_it = metadata.is_some_and(|one| one.name == format!("{name}-{NAME}"));
                is_it && pod.state() == PodSandboxState::SandboxReady
            });
            whether(sandboxes.is_empty(), sandboxes)
        });
        stopped.await.map_err(|late| late.to_string())
    }

    /// Has kubelet end all pods, and asserts that no VM is left.
    pub async fn end(mut self) {
        for entry in fs::read_dir(self.path("manifests"))
            .expect("manifests")
            .flatten()
        {
            fs::remove_file(entry.path()).expect("remove a manifest");
        }
        let mut client = self.daemon.client().await;
        let ended = try_until("kubelet has ended all pods", PATIENCE, async || {
            let pods = self.api.pods().await.len();
            let sandboxes = client.pod_ids().await;
            let vmms = self.daemon.vmm_pids();
            // kubelet keeps a stopped sandbox until its garbage collection. So it is enough that the VMs have ended.
            if pods == 0 && vmms.is_empty() {
                return Ok(());
            }
            let seen = format!("{pods} pods, sandboxes {sandboxes:?}, VMMs {vmms:?}");
            Err(seen)
        });
        ended.await.unwrap_or_else(|late| panic!("{late}"));
        self.kill_kubelet();
    }

    fn configure(&self, settings: Value) {
        let mut config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": "127.0.0.1",
            "port": self.api.address.port(),
            "readOnlyPort": 0,
            "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "tlsCertFile": self.certificate.path("certificate.pem"),
            "tlsPrivateKeyFile": self.certificate.path("key.pem"),
            "containerRuntimeEndpoint": format!("unix://{}", self.daemon.socket().display()),
            "cgroupDriver": "cgroupfs",
            "failSwapOn": false,
            "staticPodPath": self.path("manifests"),
            "podLogsDir": self.path("logs"),
            "fileCheckFrequency": "1s",
            "serializeImagePulls": false,
            "makeIPTablesUtilChains": false,
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
        });
        merge(&mut config, settings);
        fs::write(self.path("kubelet.json"), config.to_string()).expect("kubelet's configuration");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_kubelet();
        if std::thread::panicking() {
            eprintln!("---- kubelet said:\n{}", tail(&self.output()));
        }
        for pid in [self.daemon.vmm_pids(), self.daemon.file_server_pids()].concat() {
            // Only a failed test leaves VMs behind. They hold kubelet's volumes and cgroups.
            kill(pid);
        }
        unmount_below(self.directory.path());
        remove_cgroup(&Path::new(CGROUPS).join("kubepods"));
    }
}

/// A pod's manifest with `spec`.
pub fn pod(name: &str, spec: Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"terminationGracePeriodSeconds": 2, "enableServiceLinks": false},
    });
    merge(&mut pod["spec"], spec);
    pod
}

/// A busybox container that runs a script.
pub fn script(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": Registry::shared().image("test/busybox"),
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
    })
}

/// An agnhost container. The test must have pushed the image.
pub fn agnhost(name: &str, arguments: &[&str]) -> Value {
    json!({
        "name": name,
        "image": Registry::shared().image("test/agnhost"),
        "imagePullPolicy": "IfNotPresent",
        "args": arguments,
    })
}

/// `base` with the fields of `more` added or replaced.
pub fn with(mut base: Value, more: Value) -> Value {
    merge(&mut base, more);
    base
}

fn merge(base: &mut Value, more: Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, more) => *base = more,
    }
}

/// Makes a cgroup for kubelet as systemd would. kubelet sends swap limits only if its own cgroup has `memory.swap.max`.
fn cgroup_for_kubelet() -> PathBuf {
    let slice = Path::new(CGROUPS).join("system.slice");
    let cgroup = slice.join("bulkhead-tests-kubelet.service");
    fs::create_dir_all(&slice).expect("make system.slice");
    fs::write(slice.join("cgroup.subtree_control"), "+cpu +memory +pids")
        .expect("controllers for system.slice");
    fs::create_dir_all(&cgroup).expect("make kubelet's cgroup");
    cgroup
}

fn address_of_this_machine() -> String {
    let output = Command::new("hostname").arg("-I").output();
    let output = output.expect("run hostname");
    let addresses = String::from_utf8_lossy(&output.stdout).into_owned();
    let first = addresses.split_whitespace().next();
    first.expect("an address besides loopback").to_owned()
}

fn kill(pid: i32) {
    // It may have ended already: a file server ends with its VMM.
    let _ = Command::new("kill").args(["-9", &pid.to_string()]).output();
}

fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounts: Vec<_> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|target| Path::new(target).starts_with(directory))
        .collect();
    for target in mounts.into_iter().rev() {
        let _ = Command::new("umount").args(["-l", target]).status();
    }
}

/// The last lines of a long text.
fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(150)..].join("\n")
}
