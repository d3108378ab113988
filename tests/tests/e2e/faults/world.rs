// SPDX-License-Identifier: Apache-2.0
//! One node as kubelet sees it: an image that is pulled, a pod, a container with a volume of each kind, and the calls that
//! make and end them.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_proto::cri::{
    ContainerConfig, ContainerState, Device, LinuxContainerResources, ListImagesRequest,
    PodSandboxState, RemoveImageRequest, ReopenContainerLogRequest,
    UpdateContainerResourcesRequest,
};
use bulkhead_tests::census::Census;
use bulkhead_tests::client::{Client, Pod, container, image_spec};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::faults::Faults;
use bulkhead_tests::kubelet::{Kubelet, mount, readonly, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::spdy::Process;
use bulkhead_tests::wait::{try_until, until, whether};
use tonic::Status;

use crate::block::Loop;

/// kubelet's uid of the pod.
const UID: &str = "uid-pod";
/// How long a call may take.
const LONGEST_CALL: Duration = Duration::from_secs(90);
/// How long after a call something may still be cleaned up. A network whose plugins failed is tried again after 15 s.
const SETTLE: Duration = Duration::from_secs(45);

/// The calls, in the order of a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Pull,
    RemoveImage,
    Run,
    Create,
    Start,
    Exec,
    Stream,
    Update,
    ReopenLog,
    Restart,
    Stop,
    Remove,
    StopPod,
    RemovePod,
}

impl Call {
    pub const ALL: [Self; 14] = [
        Self::Pull,
        Self::RemoveImage,
        Self::Run,
        Self::Create,
        Self::Start,
        Self::Exec,
        Self::Stream,
        Self::Update,
        Self::ReopenLog,
        Self::Restart,
        Self::Stop,
        Self::Remove,
        Self::StopPod,
        Self::RemovePod,
    ];

    /// What must be there before the call.
    fn needs(self) -> Needs {
        match self {
            Self::Pull => Needs::NoImage,
            Self::RemoveImage => Needs::Image,
            Self::Run => Needs::NoPod,
            Self::Create => Needs::Pod,
            Self::Start => Needs::Created,
            Self::Exec
            | Self::Stream
            | Self::Update
            | Self::ReopenLog
            | Self::Restart
            | Self::Stop
            | Self::StopPod => Needs::Running,
            Self::Remove => Needs::Exited,
            Self::RemovePod => Needs::Stopped,
        }
    }

    /// Whether the call is about a pod that lives on.
    pub fn keeps_pod(self) -> bool {
        !matches!(
            self.needs(),
            Needs::NoImage | Needs::Image | Needs::NoPod | Needs::Stopped
        ) && self != Self::StopPod
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    NoImage,
    Image,
    NoPod,
    Pod,
    Created,
    Running,
    Exited,
    Stopped,
}

pub struct World {
    pub daemon: Daemon,
    pub faults: Faults,
    client: Client,
    kubelet: Kubelet,
    device: Loop,
    shared: PathBuf,
    busybox: String,
    pod: Option<Pod>,
    container: Option<String>,
    attempt: u32,
    /// The node without a pod.
    idle: Option<Census>,
}

impl World {
    /// Starts a daemon and takes the census of a node on which there was a pod.
    pub async fn new() -> Self {
        let kubelet = Kubelet::new(UID);
        let (daemon, faults) = Daemon::start_faulty(Networking::Bridge, &kubelet.config()).await;
        let shared = daemon.path("shared");
        std::fs::create_dir(&shared).expect("a directory to share");
        let mut world = Self {
            client: daemon.client().await,
            busybox: Registry::shared().image("test/busybox"),
            device: Loop::new(&[]),
            daemon,
            faults,
            kubelet,
            shared,
            pod: None,
            container: None,
            attempt: 0,
            idle: None,
        };
        // kubelet's part exists before the census.
        world.config();
        world.prepare(Call::Stop).await;
        world.end_pod().await.expect("end the first pod");
        world.accept();
        world
    }

    /// Brings the node to where the call begins.
    pub async fn prepare(&mut self, call: Call) {
        let needs = call.needs();
        match needs {
            Needs::NoImage => {
                self.end_pod().await.expect("end the pod");
                return self.remove_image().await.expect("remove the image");
            }
            _ if !self.has_image().await => {
                self.client.pull(&self.busybox).await.expect("pull");
            }
            _ => {}
        }
        if matches!(needs, Needs::Image | Needs::NoPod) {
            return self.end_pod().await.expect("end the pod");
        }
        if let Some(pod) = &self.pod {
            let state = self.client.pod_state(&pod.id.clone()).await;
            let is_ready = state.is_ok_and(|state| state == PodSandboxState::SandboxReady);
            if !is_ready && needs != Needs::Stopped {
                self.end_pod().await.expect("end the pod");
            }
        }
        if self.pod.is_none() {
            let pod = self.call(Call::Run).await.expect("run pod");
            self.note(Call::Run, pod);
        }
        if needs == Needs::Stopped {
            return self.call(Call::StopPod).await.map(drop).expect("stop pod");
        }
        let state = self.container_state().await;
        let fits = match needs {
            Needs::Created => state == Some(ContainerState::ContainerCreated),
            Needs::Running => state == Some(ContainerState::ContainerRunning),
            _ => state.is_none(),
        };
        if fits && needs != Needs::Exited {
            return;
        }
        self.remove_containers().await.expect("remove containers");
        for (step, least) in [
            (Call::Create, Needs::Created),
            (Call::Start, Needs::Running),
            (Call::Stop, Needs::Exited),
        ] {
            if needs as u8 >= least as u8 {
                let made = self.call(step).await;
                let made = made.unwrap_or_else(|error| panic!("{step:?}: {error:?}"));
                self.note(step, made);
            }
        }
    }

    /// Makes a call. Returns the id that it answers with, if it does.
    pub async fn call(&self, call: Call) -> Result<Option<Pod>, Status> {
        let late = |_| Err(Status::deadline_exceeded(format!("{call:?} did not end")));
        let made = tokio::time::timeout(LONGEST_CALL, self.call_now(call)).await;
        made.unwrap_or_else(late)
    }

    async fn call_now(&self, call: Call) -> Result<Option<Pod>, Status> {
        let mut client = self.client.clone();
        let pod = self.pod.clone();
        let pod_id = || pod.as_ref().expect("a pod").id.clone();
        let id = || self.container.clone().expect("a container");
        match call {
            Call::Pull => drop(client.pull(&self.busybox).await?),
            Call::RemoveImage => self.remove_image().await?,
            Call::Run => {
                let mut config = client.pod_config("pod");
                config.metadata.as_mut().expect("metadata").uid = UID.into();
                // Something that is set in the guest for all containers together.
                let unified = [("pids.max".to_owned(), "10000".to_owned())].into();
                config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
                    unified,
                    ..Default::default()
                });
                return client.run_pod_with(config).await.map(Some);
            }
            Call::Create => {
                let pod = pod.clone().expect("a pod");
                let id = client.create(&pod, self.config()).await?;
                return Ok(Some(Pod { id, ..pod }));
            }
            Call::Start => client.start(&id()).await?,
            Call::Exec => drop(client.exec(&id(), &["true"], 20).await?),
            Call::Stream => {
                let kinds = ["stdout"];
                let url = client.exec_url(&id(), &["true"], &kinds).await?;
                // It panics if the daemon dies.
                let session = tokio::spawn(async move {
                    drop(Process::connect(&url, &kinds).await.end().await);
                });
                let ended = session.await;
                ended.map_err(|_| Status::unavailable("the session broke"))?;
            }
            Call::Update => {
                let linux = LinuxContainerResources {
                    cpu_shares: 512,
                    memory_limit_in_bytes: 64 << 20,
                    ..Default::default()
                };
                let request = UpdateContainerResourcesRequest {
                    container_id: id(),
                    linux: Some(linux),
                    ..Default::default()
                };
                client.runtime.update_container_resources(request).await?;
            }
            Call::ReopenLog => {
                let container_id = id();
                let request = ReopenContainerLogRequest { container_id };
                client.runtime.reopen_container_log(request).await?;
            }
            // The caller has the daemon.
            Call::Restart => {}
            Call::Stop => client.stop(&id(), 0).await?,
            Call::Remove => client.remove(&id()).await?,
            Call::StopPod => client.stop_pod(&pod_id()).await?,
            Call::RemovePod => client.remove_pod(&pod_id()).await?,
        }
        Ok(None)
    }

    /// Remembers what a call has made or removed.
    pub fn note(&mut self, call: Call, made: Option<Pod>) {
        match call {
            Call::Run => self.pod = made,
            Call::Create => self.container = made.map(|made| made.id),
            Call::Remove => self.container = None,
            Call::RemovePod => (self.pod, self.container) = (None, None),
            _ => {}
        }
        self.attempt += 1;
    }

    /// Starts the daemon again if it has ended. It may die once more while it starts, if a plan says so.
    pub async fn revive(&mut self) -> Result<(), String> {
        if self.daemon.has_ended() && self.daemon.try_restart().await.is_err() {
            self.daemon.try_restart().await?;
        }
        self.client = self.daemon.client().await;
        Ok(())
    }

    /// Does what kubelet does after a call that failed or was not answered: looks, and calls again or cleans up. The
    /// error says what is not as it should be then.
    pub async fn recover(&mut self, call: Call) -> Result<(), String> {
        let said = |error: Status| format!("{}: {}", error.code(), error.message());
        match call {
            // It was done although the record of it could not be written.
            Call::Remove if self.container.is_none() => {}
            Call::RemovePod if self.pod.is_none() => {}
            Call::Pull
            | Call::RemoveImage
            | Call::Stop
            | Call::Remove
            | Call::StopPod
            | Call::RemovePod => {
                self.call(call)
                    .await
                    .map_err(|error| format!("again: {}", said(error)))?;
                self.note(call, None);
            }
            Call::Run => self.end_pod().await.map_err(said)?,
            Call::Create | Call::Start => self.remove_containers().await.map_err(said)?,
            Call::Exec | Call::Stream | Call::Update | Call::ReopenLog | Call::Restart => {
                let state = self.container_state().await;
                whether(state == Some(ContainerState::ContainerRunning), state)?;
            }
        }
        if call.keeps_pod() {
            let id = self
                .pod
                .as_ref()
                .map(|pod| pod.id.clone())
                .unwrap_or_default();
            let state = self.client.pod_state(&id).await.map_err(said)?;
            if call == Call::Stop && state == PodSandboxState::SandboxNotready {
                // A container whose guest does not take its signals is stopped with its VM.
                self.end_pod().await.map_err(said)?;
                return self.is_idle().await;
            }
            whether(state == PodSandboxState::SandboxReady, state)?;
        }
        if matches!(call, Call::StopPod | Call::RemovePod) {
            self.end_pod().await.map_err(said)?;
        }
        if !call.keeps_pod() && !matches!(call, Call::Pull | Call::RemoveImage) {
            self.is_idle().await?;
        }
        Ok(())
    }

    /// Removes the pod and all others that are listed.
    pub async fn end_pod(&mut self) -> Result<(), Status> {
        for id in self.client.pod_ids().await {
            self.client.stop_pod(&id).await?;
            self.client.remove_pod(&id).await?;
        }
        (self.pod, self.container) = (None, None);
        // kubelet removes the volume with the pod.
        let disk = self.kubelet.empty_dir("data").join(".bulkhead.ext4");
        let _ = std::fs::remove_file(disk);
        Ok(())
    }

    /// Waits until the node is as it was without a pod. The error says what is different.
    pub async fn is_idle(&mut self) -> Result<(), String> {
        let listed = self.client.container_ids().await;
        whether(listed.is_empty(), listed)?;
        let idle = self.idle.clone().expect("a census");
        let settled = try_until("the node is idle", SETTLE, async || {
            let difference = self.census().difference(&idle);
            difference.map_or(Ok(()), Err)
        });
        settled.await.map_err(|late| late.seen)
    }

    /// Takes the node as it is now for an idle one, so that one leak is not seen again and again.
    pub fn accept(&mut self) {
        self.idle = Some(self.census());
    }

    /// Asserts that no pod is left, and that another one can live.
    pub async fn assert_sound(&mut self) {
        self.prepare(Call::Stop).await;
        let id = self.container.clone().expect("a container");
        assert_eq!(self.client.shell(&id, "cat /config/key").await, "value");
        self.end_pod().await.expect("end the pod");
        self.is_idle().await.unwrap_or_else(|why| panic!("{why}"));
    }

    /// Kills VMMs or file servers and waits until they are gone.
    pub async fn kill_processes(&self, pids: &[i32]) {
        for pid in pids {
            let mut kill = std::process::Command::new("kill");
            let _ = kill.args(["-9", &pid.to_string()]).status();
        }
        until("the processes are gone", async || {
            let (vmms, servers) = (self.daemon.vmm_pids(), self.daemon.file_server_pids());
            let left = pids
                .iter()
                .filter(|pid| vmms.contains(pid) || servers.contains(pid));
            let left: Vec<_> = left.collect();
            whether(left.is_empty(), left)
        })
        .await;
    }

    fn census(&self) -> Census {
        let paths = [
            "run/pods",
            "run/netns",
            "state/pods",
            "state/cni",
            "state/templates",
        ];
        let images = ["layers", "partial", "sources"].map(|name| format!("state/images/{name}"));
        let paths = paths.iter().map(ToString::to_string).chain(images);
        let mut paths: Vec<_> = paths.map(|path| self.daemon.path(&path)).collect();
        paths.push("/run/bulkhead-tests-ipam/bulkhead-tests".into());
        // Of an emptyDir, only its disk stays.
        paths.push(self.kubelet.empty_dir("data"));
        let paths: Vec<_> = paths.iter().map(PathBuf::as_path).collect();
        Census::take(&paths)
            .without(&self.daemon_line())
            .without("file /run/bulkhead-tests-ipam/bulkhead-tests/last")
    }

    /// The daemon's own line in a census, because it gets a new process id with each start.
    fn daemon_line(&self) -> String {
        format!("process {} ", self.daemon.pid().unwrap_or_default())
    }

    /// Removes every container that is listed, as kubelet does with those that it does not want.
    async fn remove_containers(&mut self) -> Result<(), Status> {
        for id in self.client.container_ids().await {
            self.client.stop(&id, 0).await?;
            self.client.remove(&id).await?;
        }
        self.container = None;
        Ok(())
    }

    async fn container_state(&mut self) -> Option<ContainerState> {
        let id = self.container.clone()?;
        self.client
            .status(&id)
            .await
            .ok()
            .map(|status| status.state())
    }

    async fn has_image(&mut self) -> bool {
        let request = ListImagesRequest { filter: None };
        let listed = self.client.images.list_images(request).await;
        !listed.expect("list images").into_inner().images.is_empty()
    }

    async fn remove_image(&self) -> Result<(), Status> {
        let mut client = self.client.clone();
        let request = RemoveImageRequest {
            image: Some(image_spec(&self.busybox)),
        };
        client.images.remove_image(request).await.map(drop)
    }

    /// A container with a volume of each kind. Makes on the host what kubelet makes there.
    fn config(&self) -> ContainerConfig {
        let data = self.kubelet.empty_dir("data");
        let log = self.kubelet.file("containers/main/0a1b", "");
        let settings = self.kubelet.volume("kubernetes.io~configmap", "config");
        if std::fs::read_dir(&settings).expect("list").next().is_none() {
            std::fs::create_dir(settings.join("..2026")).expect("a state");
            std::fs::write(settings.join("..2026/key"), "value").expect("a file");
            for (target, link) in [("..2026", "..data"), ("..data/key", "key")] {
                std::os::unix::fs::symlink(target, settings.join(link)).expect("a link");
            }
        }
        let mut config = container("main", &self.busybox, &["sleep", "10000"]);
        config.metadata.as_mut().expect("metadata").attempt = self.attempt;
        config.devices = vec![Device {
            host_path: self.device.path(),
            container_path: "/dev/xvda".into(),
            permissions: "rwm".into(),
        }];
        let mounts = vec![
            mount(&data, "/data"),
            mount(&log, "/dev/termination-log"),
            readonly(&settings, "/config"),
            mount(&self.shared, "/shared"),
        ];
        with_mounts(config, mounts)
    }
}
