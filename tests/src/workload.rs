// SPDX-License-Identifier: Apache-2.0
//! A real program in a pod of its own, as the suite of workloads runs them: a daemon, a pod, containers as kubelet would
//! ask for them, and a report of what was seen.
//!
//! The images are those of `tests/images/workload_images.py`; `scripts/workloads` makes them.

use std::path::Path;

use bulkhead_proto::cri::security_profile::ProfileType;
use bulkhead_proto::cri::{
    Capability, ContainerConfig, Device, Int64Value, KeyValue, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    PodSandboxConfig, PodSandboxStatusRequest, SecurityProfile,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{Client, Pod, container, kubelets_context};
use crate::daemon::{Daemon, Networking};
use crate::kubelet::{Kubelet, mount};
use crate::registry::Registry;
use crate::wait::try_until;

const REPOSITORY: &str = "workload";
/// How long a program may take to start, on an emulated host with one slow CPU.
const STARTS_WITHIN: std::time::Duration = std::time::Duration::from_secs(400);
/// What kubelet gives as a CPU quota's period.
const CPU_PERIOD_MICROS: i64 = 100_000;

/// The container's process, with what a test asks for beside kubelet's defaults.
pub trait Asks {
    fn user(self, id: i64) -> Self;
    fn memory_mib(self, mib: i64) -> Self;
    fn cpu_millis(self, millis: i64) -> Self;
    fn env(self, name: &str, value: &str) -> Self;
    fn capabilities(self, names: &[&str]) -> Self;
    fn privileged(self) -> Self;
    fn default_seccomp(self) -> Self;
    fn device(self, path: &str) -> Self;
    fn volume(self, host: &Path, at: &str) -> Self;
}

fn context(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_with(kubelets_context)
}

fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default()
}

impl Asks for ContainerConfig {
    fn user(mut self, id: i64) -> Self {
        let context = context(&mut self);
        context.run_as_user = Some(Int64Value { value: id });
        context.run_as_group = Some(Int64Value { value: id });
        self
    }

    fn memory_mib(mut self, mib: i64) -> Self {
        resources(&mut self).memory_limit_in_bytes = mib << 20;
        self
    }

    fn cpu_millis(mut self, millis: i64) -> Self {
        let resources = resources(&mut self);
        resources.cpu_period = CPU_PERIOD_MICROS;
        resources.cpu_quota = millis * CPU_PERIOD_MICROS / 1000;
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.envs.push(KeyValue {
            key: name.into(),
            value: value.into(),
        });
        self
    }

    fn capabilities(mut self, names: &[&str]) -> Self {
        let names = names.iter().map(ToString::to_string).collect();
        context(&mut self).capabilities = Some(Capability {
            add_capabilities: names,
            ..Default::default()
        });
        self
    }

    fn privileged(mut self) -> Self {
        let context = context(&mut self);
        context.privileged = true;
        context.masked_paths.clear();
        context.readonly_paths.clear();
        self
    }

    fn default_seccomp(mut self) -> Self {
        context(&mut self).seccomp = Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            ..Default::default()
        });
        self
    }

    fn device(mut self, path: &str) -> Self {
        self.devices.push(Device {
            container_path: path.into(),
            host_path: path.into(),
            permissions: "rwm".into(),
        });
        self
    }

    fn volume(mut self, host: &Path, at: &str) -> Self {
        self.mounts.push(mount(host, at));
        self
    }
}

/// What `scripts/lib/workloads` reads: each line that begins so has a JSON object after it.
const REPORT: &str = "workload: ";

/// A pod with one image.
#[derive(Debug)]
pub struct Workload {
    pub client: Client,
    pub pod: Pod,
    image: String,
    others: Vec<Pod>,
    kubelet: Kubelet,
    /// The cases that were wrong.
    wrong: Vec<String>,
    _daemon: Daemon,
}

impl Workload {
    /// Starts a pod. `title` says in a line what its users rely on.
    pub async fn start(image: &str, title: &str) -> Self {
        Self::start_with(image, title, |config| config).await
    }

    /// Starts a pod whose containers may be privileged.
    pub async fn start_privileged(image: &str, title: &str) -> Self {
        Self::start_with(image, title, |config| PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    privileged: true,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..config
        })
        .await
    }

    /// Starts a pod with a limit, which is the sum of its containers' limits.
    pub async fn start_limited(image: &str, title: &str, memory_mib: i64, cpu_millis: i64) -> Self {
        Self::start_with(image, title, |config| PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                resources: Some(LinuxContainerResources {
                    memory_limit_in_bytes: memory_mib << 20,
                    cpu_period: CPU_PERIOD_MICROS,
                    cpu_quota: cpu_millis * CPU_PERIOD_MICROS / 1000,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..config
        })
        .await
    }

    async fn start_with(
        image: &str,
        title: &str,
        asks: impl Fn(PodSandboxConfig) -> PodSandboxConfig,
    ) -> Self {
        println!("{REPORT}{}", json!({"title": title}));
        let kubelet = Kubelet::new("uid-pod");
        let daemon = Daemon::start_with(Networking::Bridge, &kubelet.config()).await;
        let mut client = daemon.client().await;
        let image = Registry::shared().image(&format!("{REPOSITORY}/{image}"));
        client.pull(&image).await.expect("pull");
        let config = asks(client.pod_config("pod"));
        let pod = client.run_pod_with(config).await.expect("run pod");
        Self {
            client,
            pod,
            image,
            others: Vec::new(),
            kubelet,
            wrong: Vec::new(),
            _daemon: daemon,
        }
    }

    /// Starts one more pod, with the privileges of the first one.
    pub async fn another_pod(&mut self, name: &str) -> Pod {
        let config = PodSandboxConfig {
            linux: self.pod.config.linux.clone(),
            ..self.client.pod_config(name)
        };
        let pod = self.client.run_pod_with(config).await;
        let pod = pod.expect("run another pod");
        self.others.push(pod.clone());
        pod
    }

    /// An emptyDir of the pod.
    pub fn empty_dir(&self, name: &str) -> std::path::PathBuf {
        self.kubelet.empty_dir(name)
    }

    /// The configuration of a container that runs a script.
    pub fn script(&self, name: &str, script: &str) -> ContainerConfig {
        self.program(name, &["sh", "-c", script])
    }

    pub fn program(&self, name: &str, command: &[&str]) -> ContainerConfig {
        container(name, &self.image, command)
    }

    /// A container that waits for execs.
    pub fn idle(&self, name: &str) -> ContainerConfig {
        self.program(name, &["sleep", "1000000"])
    }

    /// Creates and starts a container of the pod.
    pub async fn run(&mut self, config: ContainerConfig) -> String {
        let pod = self.pod.clone();
        self.run_in(&pod, config).await
    }

    pub async fn run_in(&mut self, pod: &Pod, config: ContainerConfig) -> String {
        let id = self.client.create(pod, config).await;
        let id = id.expect("create container");
        self.client.start(&id).await.expect("start container");
        id
    }

    /// The address of a pod.
    pub async fn address(&mut self, pod: &Pod) -> String {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let answer = self.client.runtime.pod_sandbox_status(request).await;
        let status = answer.expect("pod status").into_inner().status;
        let network = status.and_then(|status| status.network);
        network.expect("a network").ip
    }

    /// Runs a line of shell in a container. Returns the exit code, and both outputs together.
    pub async fn sh(&mut self, id: &str, line: &str) -> (i32, String) {
        let line = format!("exec 2>&1; {line}");
        let answer = self.client.exec(id, &["sh", "-c", &line], 0).await;
        let answer = answer.expect("exec");
        let said = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        (answer.exit_code, said)
    }

    /// Runs a line of shell. The case is right if the line succeeds and `is_right` of what it says.
    pub async fn says(
        &mut self,
        case: &str,
        id: &str,
        line: &str,
        is_right: impl Fn(&str) -> bool,
    ) -> String {
        let (code, said) = self.sh(id, line).await;
        let right = code == 0 && is_right(&said);
        let seen = if code == 0 {
            said.clone()
        } else {
            format!("exit code {code}: {said}")
        };
        self.row(case, right, seen);
        said
    }

    /// A case that is right if a line succeeds and says exactly this.
    pub async fn equals(&mut self, case: &str, id: &str, line: &str, expected: &str) {
        self.says(case, id, line, |said| said == expected).await;
    }

    /// Prints a case at once, so that the cases before a panic are known.
    pub fn row(&mut self, case: &str, right: bool, seen: impl std::fmt::Display) {
        let seen = shortened(&seen.to_string());
        println!(
            "{REPORT}{}",
            json!({"case": case, "right": right, "seen": seen})
        );
        if !right {
            self.wrong.push(format!("{case}: {seen}"));
        }
    }

    /// Waits until a line succeeds. If it does not, the case is wrong and says what the line said last, and the end of
    /// what the container logged.
    pub async fn until(&mut self, case: &str, id: &str, line: &str) -> bool {
        let awaited = try_until(case, STARTS_WITHIN, async || {
            match self.sh(id, line).await {
                (0, said) => Ok(said),
                (code, said) => Err(format!("exit code {code}: {said}")),
            }
        })
        .await;
        let reached = awaited.is_ok();
        let seen = awaited.unwrap_or_else(|late| late.to_string());
        self.row(case, reached, seen);
        reached
    }

    /// What a container of the first pod has logged.
    pub async fn log(&self, name: &str) -> String {
        self.client.log_until(&self.pod, name, |_| true).await
    }

    /// Stops the pods. Fails if a case was wrong.
    pub async fn finish(mut self) {
        for pod in std::mem::take(&mut self.others) {
            self.client.end_pod(&pod).await;
        }
        self.client.end_pod(&self.pod).await;
        assert!(self.wrong.is_empty(), "wrong: {:#?}", self.wrong);
    }
}

/// The beginning and the end of a long text. The end has the result, or the error.
fn shortened(text: &str) -> String {
    const PART: usize = 300;
    let text = text.trim();
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= 2 * PART {
        return text.to_owned();
    }
    let part = |characters: &[char]| characters.iter().collect::<String>();
    let first = part(characters.get(..PART).unwrap_or_default());
    let last = part(
        characters
            .get(characters.len() - PART..)
            .unwrap_or_default(),
    );
    format!("{first} [...] {last}")
}

/// Connects from the host, sends `request`, and reads until the other side ends.
pub async fn ask(address: &str, port: u16, request: &str) -> Result<Vec<u8>, String> {
    let what = format!("{address}:{port} answers");
    let answer = try_until(&what, STARTS_WITHIN, async || {
        let connected = TcpStream::connect((address, port)).await;
        let mut stream = connected.map_err(|error| error.to_string())?;
        let sent = stream.write_all(request.as_bytes()).await;
        sent.map_err(|error| error.to_string())?;
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer).await;
        read.map_err(|error| error.to_string())?;
        if answer.is_empty() {
            return Err("an empty answer".to_owned());
        }
        Ok(answer)
    });
    answer.await.map_err(|late| late.to_string())
}

/// GET from the host. Returns the head and the body of the answer.
pub async fn get(address: &str, port: u16, path: &str, header: &str) -> (String, Vec<u8>) {
    let request = format!("GET {path} HTTP/1.0\r\nHost: workload\r\n{header}\r\n");
    let answer = match ask(address, port, &request).await {
        Ok(answer) => answer,
        Err(late) => return (late, Vec::new()),
    };
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = answer.split_at(end.map_or(answer.len(), |end| end + 4));
    (String::from_utf8_lossy(head).into_owned(), body.to_vec())
}
