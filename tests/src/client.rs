// SPDX-License-Identifier: Apache-2.0
//! A CRI client for tests: one connection to both services, and helpers for what many tests do.

use std::path::{Path, PathBuf};

use bulkhead_proto::cri::image_service_client::ImageServiceClient;
use bulkhead_proto::cri::runtime_service_client::RuntimeServiceClient;
use bulkhead_proto::cri::{
    AttachRequest, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus,
    ContainerStatusRequest, CreateContainerRequest, ExecRequest, ExecSyncRequest, ExecSyncResponse,
    ImageSpec, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    ListContainersRequest, ListPodSandboxRequest, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PodSandboxState, PodSandboxStatusRequest, PortForwardRequest,
    PullImageRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::wait::{Wait, until};

/// The namespaces that kubelet asks for if a pod specifies none.
pub const OWN_PROCESSES: NamespaceOption = NamespaceOption {
    network: NamespaceMode::Pod as i32,
    pid: NamespaceMode::Container as i32,
    ipc: NamespaceMode::Pod as i32,
    target_id: String::new(),
    userns_options: None,
};
const MASKED_PATHS: [&str; 4] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/timer_list",
    "/sys/firmware",
];
const READONLY_PATHS: [&str; 4] = ["/proc/bus", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The security context that kubelet sends if a container specifies none.
pub fn kubelets_context() -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        masked_paths: MASKED_PATHS.map(str::to_owned).to_vec(),
        readonly_paths: READONLY_PATHS.map(str::to_owned).to_vec(),
        ..Default::default()
    }
}

/// A pod's configuration with the namespaces that kubelet asks for, if it has none of its own.
pub fn kubelets_pod(mut config: PodSandboxConfig) -> PodSandboxConfig {
    let context = config.linux.get_or_insert_default();
    let context = context.security_context.get_or_insert_default();
    context.namespace_options.get_or_insert(OWN_PROCESSES);
    config
}

/// The same for a container, with kubelet's security context if it has none of its own.
pub fn kubelets_container(mut config: ContainerConfig) -> ContainerConfig {
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_with(kubelets_context);
    context.namespace_options.get_or_insert(OWN_PROCESSES);
    config
}

/// A connection to one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
    log_root: PathBuf,
}

/// A sandbox, with the configuration that `CreateContainer` needs again.
#[derive(Clone, Debug)]
pub struct Pod {
    pub id: String,
    pub config: PodSandboxConfig,
}

impl Client {
    /// Connects to `socket`; pods log below `log_root`.
    pub async fn connect(socket: &Path, log_root: &Path) -> Result<Self, tonic::transport::Error> {
        let socket = socket.to_owned();
        let channel = Endpoint::from_static("http://bulkhead")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move {
                    tokio::net::UnixStream::connect(socket)
                        .await
                        .map(TokioIo::new)
                }
            }))
            .await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            images: ImageServiceClient::new(channel),
            log_root: log_root.to_owned(),
        })
    }

    /// Returns the configuration of a pod called `name`, with a directory for its logs.
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "tests".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.log_root.join(name).display().to_string(),
            ..Default::default()
        }
    }

    /// The same of a pod whose containers may be privileged.
    pub fn privileged_pod_config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    privileged: true,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..self.pod_config(name)
        }
    }

    pub async fn pull(&mut self, image: &str) -> Result<String, Status> {
        let request = PullImageRequest {
            image: Some(image_spec(image)),
            ..Default::default()
        };
        Ok(self
            .images
            .pull_image(request)
            .await?
            .into_inner()
            .image_ref)
    }

    /// Pulls an image for the pods of one RuntimeClass handler.
    pub async fn pull_by(&mut self, handler: &str, image: &str) {
        let spec = ImageSpec {
            runtime_handler: handler.into(),
            ..image_spec(image)
        };
        let request = PullImageRequest {
            image: Some(spec),
            ..Default::default()
        };
        self.images.pull_image(request).await.expect("pull");
    }

    pub async fn run_pod(&mut self, name: &str) -> Result<Pod, Status> {
        self.run_pod_with(self.pod_config(name)).await
    }

    /// Runs a pod. Namespaces that the test does not set are those that kubelet asks for, so containers see only their
    /// own processes.
    pub async fn run_pod_with(&mut self, config: PodSandboxConfig) -> Result<Pod, Status> {
        self.run_pod_as_it_is(kubelets_pod(config)).await
    }

    pub async fn run_pod_as_it_is(&mut self, config: PodSandboxConfig) -> Result<Pod, Status> {
        self.run_pod_by("", config).await
    }

    /// Runs a pod whose RuntimeClass has this handler.
    pub async fn run_pod_by(
        &mut self,
        handler: &str,
        config: PodSandboxConfig,
    ) -> Result<Pod, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        let id = self
            .runtime
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id;
        Ok(Pod { id, config })
    }

    /// Creates a container, with kubelet's defaults as in [`Self::run_pod_with`].
    pub async fn create(&mut self, pod: &Pod, config: ContainerConfig) -> Result<String, Status> {
        self.create_as_it_is(pod, kubelets_container(config)).await
    }

    pub async fn create_as_it_is(
        &mut self,
        pod: &Pod,
        config: ContainerConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(self
            .runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id)
    }

    pub async fn start(&mut self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: id.into(),
        };
        self.runtime.start_container(request).await.map(drop)
    }

    /// Creates and starts a container that runs `script` in the image's shell.
    pub async fn run_script(&mut self, pod: &Pod, name: &str, image: &str, script: &str) -> String {
        let config = container(name, image, &["sh", "-c", script]);
        let id = self.create(pod, config).await.expect("create container");
        self.start(&id).await.expect("start container");
        id
    }

    pub async fn stop(&mut self, id: &str, timeout_seconds: i64) -> Result<(), Status> {
        let request = StopContainerRequest {
            container_id: id.into(),
            timeout: timeout_seconds,
        };
        self.runtime.stop_container(request).await.map(drop)
    }

    pub async fn remove(&mut self, id: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
        };
        self.runtime.remove_container(request).await.map(drop)
    }

    pub async fn stop_pod(&mut self, id: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.runtime.stop_pod_sandbox(request).await.map(drop)
    }

    pub async fn remove_pod(&mut self, id: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.runtime.remove_pod_sandbox(request).await.map(drop)
    }

    /// Stops and removes a pod as kubelet does.
    pub async fn end_pod(&mut self, pod: &Pod) {
        self.stop_pod(&pod.id).await.expect("stop pod");
        self.remove_pod(&pod.id).await.expect("remove pod");
    }

    pub async fn status(&mut self, id: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let response = self.runtime.container_status(request).await?.into_inner();
        response
            .status
            .ok_or_else(|| Status::internal("container status without a status"))
    }

    pub async fn pod_state(&mut self, id: &str) -> Result<PodSandboxState, Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: false,
        };
        let response = self.runtime.pod_sandbox_status(request).await?.into_inner();
        let status = response
            .status
            .ok_or_else(|| Status::internal("pod status without a status"))?;
        Ok(status.state())
    }

    /// Waits until the container has exited.
    pub async fn exited(&mut self, id: &str) -> ContainerStatus {
        let mut wait = Wait::until("the container has exited");
        loop {
            let status = self.status(id).await.expect("container status");
            if status.state() == ContainerState::ContainerExited {
                return status;
            }
            wait.again(format!("{status:?}")).await;
        }
    }

    pub async fn exec(
        &mut self,
        id: &str,
        command: &[&str],
        timeout_seconds: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: timeout_seconds,
        };
        Ok(self.runtime.exec_sync(request).await?.into_inner())
    }

    /// Returns the URL of a streaming exec with the streams named in `kinds`.
    pub async fn exec_url(
        &mut self,
        id: &str,
        command: &[&str],
        kinds: &[&str],
    ) -> Result<String, Status> {
        let request = ExecRequest {
            container_id: id.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty: kinds.contains(&"resize"),
            stdin: kinds.contains(&"stdin"),
            stdout: kinds.contains(&"stdout"),
            stderr: kinds.contains(&"stderr"),
        };
        Ok(self.runtime.exec(request).await?.into_inner().url)
    }

    /// Returns the URL of an attach with the streams named in `kinds`.
    pub async fn attach_url(&mut self, id: &str, kinds: &[&str]) -> Result<String, Status> {
        let request = AttachRequest {
            container_id: id.into(),
            tty: kinds.contains(&"resize"),
            stdin: kinds.contains(&"stdin"),
            stdout: kinds.contains(&"stdout"),
            stderr: kinds.contains(&"stderr"),
        };
        Ok(self.runtime.attach(request).await?.into_inner().url)
    }

    pub async fn port_forward_url(&mut self, pod: &str, ports: &[i32]) -> Result<String, Status> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.into(),
            port: ports.to_vec(),
        };
        Ok(self.runtime.port_forward(request).await?.into_inner().url)
    }

    /// Runs a shell line in a container, requires exit code 0, and returns its standard output.
    pub async fn shell(&mut self, id: &str, line: &str) -> String {
        let answer = self
            .exec(id, &["sh", "-c", line], 0)
            .await
            .expect("exec a shell line");
        let stderr = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert_eq!(answer.exit_code, 0, "{line}: {stderr}");
        String::from_utf8_lossy(&answer.stdout).into_owned()
    }

    /// Waits until a process in the pod of this container listens on a port, by TCP or UDP.
    pub async fn until_listening(&mut self, id: &str, port: u16) {
        let what = format!("somebody listens on port {port} of the pod");
        let address_end = format!(":{port:04X}");
        until(&what, async || {
            let sockets = self.shell(id, "cat /proc/net/tcp* /proc/net/udp*").await;
            let listens = sockets.lines().any(|line| {
                let mut fields = line.split_whitespace().skip(1);
                let (local, state) = (fields.next(), fields.nth(1));
                // TCP_LISTEN, or what UDP has instead.
                local.is_some_and(|local| local.ends_with(&address_end))
                    && matches!(state, Some("0A" | "07"))
            });
            if listens { Ok(()) } else { Err(sockets) }
        })
        .await;
    }

    /// Waits until `enough` is true of what the container has logged, and returns it without CRI's prefixes.
    pub async fn log_until(&self, pod: &Pod, name: &str, enough: impl Fn(&str) -> bool) -> String {
        let path = self.log_path(pod, name);
        let mut wait = Wait::until(&format!("{} has all that is expected", path.display()));
        loop {
            let text = tokio::fs::read_to_string(&path).await.unwrap_or_default();
            let payload = log_payload(&text);
            if enough(&payload) {
                return payload;
            }
            wait.again(payload).await;
        }
    }

    pub fn log_path(&self, pod: &Pod, name: &str) -> PathBuf {
        Path::new(&pod.config.log_directory).join(format!("{name}.log"))
    }

    pub async fn pod_ids(&mut self) -> Vec<String> {
        let pods = self
            .runtime
            .list_pod_sandbox(ListPodSandboxRequest { filter: None })
            .await
            .expect("list pods")
            .into_inner();
        pods.items.into_iter().map(|pod| pod.id).collect()
    }

    pub async fn container_ids(&mut self) -> Vec<String> {
        let containers = self
            .runtime
            .list_containers(ListContainersRequest { filter: None })
            .await
            .expect("list containers")
            .into_inner();
        containers
            .containers
            .into_iter()
            .map(|one| one.id)
            .collect()
    }
}

pub fn image_spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.into(),
        user_specified_image: image.into(),
        ..Default::default()
    }
}

/// A container's configuration: a name, an image, a command, and a log.
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(image_spec(image)),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}.log"),
        ..Default::default()
    }
}

/// Asserts that a call failed with `code` and a message that contains all of `words`.
pub fn assert_fails<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("the call should have failed");
    assert_eq!(status.code(), code, "{status:?}");
    for word in words {
        assert!(
            status.message().contains(word),
            "{word:?} is not in {:?}",
            status.message()
        );
    }
}

/// Joins the texts of CRI log lines: `TIME STREAM P|F TEXT`.
fn log_payload(text: &str) -> String {
    let mut payload = String::new();
    for line in text.lines() {
        let mut fields = line.splitn(4, ' ').skip(2);
        let whole = fields.next() == Some("F");
        payload.push_str(fields.next().unwrap_or_default());
        if whole {
            payload.push('\n');
        }
    }
    payload
}
