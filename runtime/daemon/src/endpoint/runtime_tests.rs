// SPDX-License-Identifier: Apache-2.0
//! The whole service with a fake server as Bulkhead's own side and another one as delegate.

use std::path::Path;
use std::time::Duration;

use bulkhead_delegate::Health;
use bulkhead_delegate::fake::{Fake, Running, image_id};
use bulkhead_proto::cri::image_service_server::ImageService;
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::super::ImageEndpoint;
use super::super::sides::tests::sides;
use super::*;
use crate::cri::Found;

impl Own for Fake {
    fn find_pod(&self, id: &str) -> Found {
        found(self.world().pods.iter().any(|pod| pod.id == id))
    }

    fn find_container(&self, id: &str) -> Found {
        found(self.world().containers.iter().any(|one| one.id == id))
    }

    type Images = Self;
    fn images(&self) -> &Self {
        self
    }
}

fn found(is_there: bool) -> Found {
    if is_there { Found::Whole } else { Found::No }
}

/// A node whose pods without a handler are Bulkhead's, and those that need the host are the delegate's.
struct Node {
    directory: tempfile::TempDir,
    ours: Fake,
    theirs: Fake,
    running: Option<Running>,
    endpoint: Endpoint<Fake>,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (ours, theirs) = (Fake::new("ours"), Fake::new("theirs"));
        let endpoint = endpoint(&ours, directory.path());
        let mut node = Self {
            directory,
            ours,
            theirs,
            running: None,
            endpoint,
        };
        node.start();
        node
    }

    fn start(&mut self) {
        let socket = self.directory.path().join("cri.sock");
        self.running = Some(self.theirs.serve(&socket));
    }

    fn stop(&mut self) {
        self.running = None;
    }

    async fn run(&self, handler: &str) -> Result<String, Status> {
        let request = Request::new(cri::RunPodSandboxRequest {
            config: Some(cri::PodSandboxConfig::default()),
            runtime_handler: handler.into(),
        });
        let ran = self.endpoint.run_pod_sandbox(request).await?;
        Ok(ran.into_inner().pod_sandbox_id)
    }

    async fn create(&self, pod: &str) -> Result<String, Status> {
        let request = Request::new(cri::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(cri::ContainerConfig {
                image: Some(cri::ImageSpec {
                    runtime_handler: "runc".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let created = self.endpoint.create_container(request).await?;
        Ok(created.into_inner().container_id)
    }

    /// Ids and handlers.
    async fn pods(&self) -> Vec<(String, String)> {
        let pods = self.endpoint.all_pods(None).await.unwrap().into_iter();
        pods.map(|pod| (pod.id, pod.runtime_handler)).collect()
    }

    async fn stop_pod(&self, id: &str) -> Result<(), Status> {
        let pod_sandbox_id = id.to_owned();
        let request = Request::new(cri::StopPodSandboxRequest { pod_sandbox_id });
        self.endpoint.stop_pod_sandbox(request).await.map(drop)
    }

    async fn exec(&self, container: &str) -> Result<Vec<u8>, Status> {
        let request = Request::new(cri::ExecSyncRequest {
            container_id: container.into(),
            ..Default::default()
        });
        Ok(self.endpoint.exec_sync(request).await?.into_inner().stdout)
    }
}

fn endpoint(ours: &Fake, directory: &Path) -> Endpoint<Fake> {
    let socket = directory.join("cri.sock");
    let delegates = [("runc", socket.to_str().unwrap(), "theirs")];
    let sides = sides("bulkhead", Some("runc"), &delegates);
    Endpoint::new(ours.clone(), sides, directory, directory)
}

fn pair(id: &str, handler: &str) -> (String, String) {
    (id.to_owned(), handler.to_owned())
}

#[tokio::test]
async fn pods_go_to_their_side_and_every_call_about_them_follows() {
    let node = Node::new();
    let (ours, theirs) = (node.run("").await.unwrap(), node.run("runc").await.unwrap());
    assert_eq!(
        (ours.as_str(), theirs.as_str()),
        ("ours-pod-1", "theirs-pod-1")
    );
    assert_eq!(node.theirs.world().ran[0].runtime_handler, "theirs");
    let expected = [pair(&ours, ""), pair(&theirs, "runc")];
    assert_eq!(node.pods().await, expected);
    let container = node.create(&theirs).await.unwrap();
    let created = node.theirs.world().created[0].config.clone().unwrap();
    assert_eq!(created.image.unwrap().runtime_handler, "theirs");
    assert_eq!(node.exec(&container).await.unwrap(), b"theirs");
    let of_ours = node.create(&ours).await.unwrap();
    assert_eq!(node.exec(&of_ours).await.unwrap(), b"ours");
    let request = cri::ExecRequest {
        container_id: container.clone(),
        ..Default::default()
    };
    let url = node.endpoint.exec(Request::new(request)).await.unwrap();
    assert_eq!(url.into_inner().url, "http://theirs/exec");
    let listed = node.endpoint.all_containers(None).await.unwrap();
    assert_eq!(listed.len(), 2);
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: theirs.clone(),
        verbose: false,
    };
    let request = Request::new(request);
    let status = node.endpoint.pod_sandbox_status(request).await.unwrap();
    assert_eq!(status.into_inner().status.unwrap().runtime_handler, "runc");
    node.stop_pod(&theirs).await.unwrap();
    assert!(!node.ours.world().calls.contains(&"stop_pod_sandbox"));
}

#[tokio::test]
async fn a_pod_that_needs_the_host_keeps_the_handler_that_it_was_sent_with() {
    let node = Node::new();
    let options = cri::NamespaceOption {
        network: cri::NamespaceMode::Node.into(),
        ..Default::default()
    };
    let config = cri::PodSandboxConfig {
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = |handler: &str| {
        Request::new(cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        })
    };
    node.endpoint.run_pod_sandbox(request("")).await.unwrap();
    assert_eq!(node.pods().await, [pair("theirs-pod-1", "")]);
    // Bulkhead refuses it; it never goes to the delegate.
    node.endpoint
        .run_pod_sandbox(request("bulkhead"))
        .await
        .unwrap();
    assert_eq!(node.ours.world().ran.len(), 1);
    let error = node
        .endpoint
        .run_pod_sandbox(request("kata"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn pods_of_a_delegate_that_is_down_stay_in_lists_and_bulkheads_go_on() {
    let mut node = Node::new();
    let theirs = node.run("runc").await.unwrap();
    let container = node.create(&theirs).await.unwrap();
    let before = node.pods().await;
    node.endpoint.all_containers(None).await.unwrap();
    node.stop();
    assert_eq!(node.pods().await, before);
    assert_eq!(node.endpoint.all_containers(None).await.unwrap().len(), 1);
    let ours = node.run("").await.unwrap();
    node.stop_pod(&ours).await.unwrap();
    for error in [
        node.exec(&container).await.unwrap_err(),
        node.stop_pod(&theirs).await.unwrap_err(),
        node.stop_pod("unknown").await.unwrap_err(),
        node.run("runc").await.unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::Unavailable, "{error}");
        assert!(error.message().contains("runc"), "{error}");
    }
    node.start();
    assert_eq!(node.exec(&container).await.unwrap(), b"theirs");
    node.stop_pod("unknown").await.unwrap();
    assert_eq!(node.pods().await.len(), 2);
}

#[tokio::test]
async fn the_next_daemon_knows_what_a_delegate_has_that_is_down() {
    let mut node = Node::new();
    node.endpoint.watch();
    let theirs = node.run("runc").await.unwrap();
    let file = node.directory.path().join("runc.list");
    while !file.exists() {
        sleep(Duration::from_millis(5)).await;
    }
    node.stop();
    node.endpoint = endpoint(&node.ours, node.directory.path());
    assert_eq!(node.pods().await, [pair(&theirs, "runc")]);
}

#[tokio::test]
async fn a_slow_delegate_delays_a_list_once_and_the_watch_notices_when_it_is_back() {
    let node = Node::new();
    let theirs = node.run("runc").await.unwrap();
    node.run("").await.unwrap();
    node.theirs.freeze(true);
    assert_eq!(node.pods().await.len(), 2);
    let delegate = &node.endpoint.sides.delegates()[0];
    assert_eq!(delegate.health(), Health::Slow);
    let began = Instant::now();
    assert_eq!(node.pods().await.len(), 2);
    assert!(began.elapsed() < Duration::from_millis(500));
    let error = node.stop_pod("unknown").await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let watch = tokio::spawn(delegate.clone().watch());
    node.theirs.freeze(false);
    let mut health = delegate.health_changes();
    health.wait_for(Health::is_up).await.unwrap();
    watch.abort();
    node.stop_pod(&theirs).await.unwrap();
}

#[tokio::test]
async fn filters_hold_for_what_a_delegate_listed() {
    let node = Node::new();
    let (ours, theirs) = (node.run("").await.unwrap(), node.run("runc").await.unwrap());
    for id in [ours, theirs] {
        let filter = cri::PodSandboxFilter {
            id: id.clone(),
            ..Default::default()
        };
        let pods = node.endpoint.all_pods(Some(filter)).await.unwrap();
        assert_eq!(pods.iter().map(|pod| &pod.id).collect::<Vec<_>>(), [&id]);
    }
}

#[tokio::test]
async fn statistics_and_metrics_are_merged_and_a_side_without_them_is_left_out() {
    let mut node = Node::new();
    for (fake, id) in [(&node.ours, "a"), (&node.theirs, "b")] {
        let attributes = Some(cri::ContainerAttributes {
            id: id.into(),
            ..Default::default()
        });
        let mut world = fake.world();
        world.container_stats.push(cri::ContainerStats {
            attributes,
            ..Default::default()
        });
        world.descriptors.push(cri::MetricDescriptor {
            name: "same".into(),
            ..Default::default()
        });
        world.metrics.push(cri::PodSandboxMetrics {
            pod_sandbox_id: id.into(),
            ..Default::default()
        });
    }
    let count = async |node: &Node| {
        let stats = node.endpoint.all_container_stats(None).await.unwrap().len();
        let metrics = node.endpoint.all_metrics().await.unwrap().len();
        let request = Request::new(cri::ListMetricDescriptorsRequest {});
        let listed = node
            .endpoint
            .list_metric_descriptors(request)
            .await
            .unwrap();
        (stats, metrics, listed.into_inner().descriptors.len())
    };
    assert_eq!(count(&node).await, (2, 2, 1));
    let missing = ["stream_pod_sandbox_metrics", "list_pod_sandbox_metrics"];
    node.theirs.world().missing.extend(missing);
    assert_eq!(count(&node).await, (2, 1, 1));
    node.stop();
    assert_eq!(count(&node).await, (1, 1, 1));
}

#[tokio::test]
async fn a_delegate_that_was_away_is_told_the_runtimes_configuration_when_it_comes_back() {
    let mut node = Node::new();
    node.stop();
    node.endpoint.watch();
    let request = cri::UpdateRuntimeConfigRequest::default();
    let request = Request::new(request);
    node.endpoint.update_runtime_config(request).await.unwrap();
    node.start();
    let told = |node: &Node| node.theirs.world().calls.contains(&"update_runtime_config");
    while !told(&node) {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(node.ours.world().calls.contains(&"update_runtime_config"));
}

/// Issue 12, point 4.
#[tokio::test]
async fn an_image_that_only_another_side_has_is_pulled_without_credentials_for_a_container() {
    let node = Node::new();
    for world in [&node.ours, &node.theirs] {
        world.world().needs_images = true;
    }
    let (ours, theirs) = (node.run("").await.unwrap(), node.run("runc").await.unwrap());
    let create = async |pod: &str, image: &str| {
        let request = Request::new(cri::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(cri::ContainerConfig {
                image: Some(cri::ImageSpec {
                    image: image.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let created = node.endpoint.create_container(request).await;
        created.map(|created| created.into_inner().container_id)
    };
    let pull = async |side: &Fake, image: &str| {
        let request = cri::PullImageRequest {
            image: Some(cri::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            auth: Some(cri::AuthConfig {
                password: side.world().secret.clone().unwrap_or_default(),
                ..Default::default()
            }),
            ..Default::default()
        };
        side.pull_image(Request::new(request)).await.unwrap();
    };
    let error = create(&ours, "nobody:1").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    pull(&node.theirs, "theirs:1").await;
    pull(&node.ours, "ours:1").await;
    create(&ours, "theirs:1").await.unwrap();
    create(&theirs, &image_id("ours:1")).await.unwrap();
    // Nothing was tried before the image was there.
    let tried = |side: &Fake| {
        let world = side.world();
        let calls = world.calls.iter();
        calls.filter(|call| **call == "create_container").count()
    };
    assert_eq!((tried(&node.ours), tried(&node.theirs)), (2, 1));
    let last = |side: &Fake| side.world().pulls.last().cloned().unwrap();
    for (side, image) in [(&node.ours, "theirs:1"), (&node.theirs, "ours:1")] {
        let pulled = last(side);
        assert_eq!(pulled.image.unwrap().image, image);
        assert_eq!(pulled.auth, None);
    }
    // What another pod's credentials have opened stays closed.
    node.theirs.world().secret = Some("s".into());
    node.ours.world().secret = Some("s".into());
    pull(&node.theirs, "private:1").await;
    let error = create(&ours, "private:1").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("another password"), "{error}");
}

#[tokio::test]
async fn an_image_that_was_fetched_for_a_container_stays_listed_when_the_delegate_goes_away() {
    let mut node = Node::new();
    node.theirs.world().needs_images = true;
    let theirs = node.run("runc").await.unwrap();
    node.ours.world().images.push(cri::Image {
        id: image_id("ours:1"),
        repo_tags: vec!["ours:1".into()],
        ..Default::default()
    });
    let request = Request::new(cri::CreateContainerRequest {
        pod_sandbox_id: theirs,
        config: Some(cri::ContainerConfig {
            image: Some(cri::ImageSpec {
                image: "ours:1".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    node.endpoint.create_container(request).await.unwrap();
    node.stop();
    node.ours.world().images.clear();
    let images = ImageEndpoint::new(node.endpoint.clone());
    let request = Request::new(cri::ListImagesRequest { filter: None });
    let listed = images.list_images(request).await.unwrap().into_inner();
    let listed: Vec<_> = listed.images.into_iter().map(|image| image.id).collect();
    assert_eq!(listed, [image_id("ours:1")]);
}
