// SPDX-License-Identifier: Apache-2.0
//! The image endpoint between two fake servers, one of which is ours.

use std::time::{Duration, Instant};

use bulkhead_delegate::fake::{Fake, Running, image_id};
use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageService;
use tonic::{Code, Request, Status};

use super::super::Endpoint;
use super::super::sides::Side;
use super::super::sides::tests::sides;
use super::ImageEndpoint;

const SEEN: &str = "kubernetes.io/config.seen";
const IMAGE: &str = "registry/private:1";

struct Bench {
    ours: Fake,
    theirs: Fake,
    endpoint: ImageEndpoint<Fake>,
    running: Option<Running>,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new(default: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let (ours, theirs) = (Fake::new("ours"), Fake::new("theirs"));
        let running = Some(theirs.serve(&socket));
        Self {
            endpoint: endpoint(default, &ours, &directory),
            ours,
            theirs,
            running,
            directory,
        }
    }

    /// Makes the endpoint anew, with what an earlier one has left on disk.
    fn restart(&mut self, default: &str) {
        self.endpoint = endpoint(default, &self.ours, &self.directory);
    }

    async fn status(&self, spec: cri::ImageSpec) -> Result<Option<String>, Status> {
        let request = Request::new(cri::ImageStatusRequest {
            image: Some(spec),
            verbose: false,
        });
        let answer = self.endpoint.image_status(request).await?;
        Ok(answer.into_inner().image.map(|image| image.id))
    }

    async fn pull(
        &self,
        spec: cri::ImageSpec,
        pod: Option<cri::PodSandboxConfig>,
        password: &str,
    ) -> Result<String, Status> {
        let auth = cri::AuthConfig {
            password: password.into(),
            ..Default::default()
        };
        let request = Request::new(cri::PullImageRequest {
            image: Some(spec),
            auth: Some(auth),
            sandbox_config: pod,
        });
        Ok(self
            .endpoint
            .pull_image(request)
            .await?
            .into_inner()
            .image_ref)
    }

    async fn list(&self) -> Result<Vec<cri::Image>, Status> {
        let request = Request::new(cri::ListImagesRequest { filter: None });
        Ok(self
            .endpoint
            .list_images(request)
            .await?
            .into_inner()
            .images)
    }

    async fn remove(&self, image: &str) -> Result<(), Status> {
        let request = Request::new(cri::RemoveImageRequest {
            image: Some(cri::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
        });
        self.endpoint.remove_image(request).await.map(drop)
    }

    /// How many pulls each side was asked for.
    fn pulls(&self) -> (usize, usize) {
        (
            self.ours.world().pulls.len(),
            self.theirs.world().pulls.len(),
        )
    }
}

fn endpoint(default: &str, ours: &Fake, directory: &tempfile::TempDir) -> ImageEndpoint<Fake> {
    let socket = directory.path().join("cri.sock").display().to_string();
    let sides = sides(default, None, &[("runc", &socket, "passed")]);
    let directory = directory.path();
    ImageEndpoint::new(Endpoint::new(ours.clone(), sides, directory, directory))
}

fn spec(seen: &str, handler: &str) -> cri::ImageSpec {
    let annotations = (!seen.is_empty()).then(|| (SEEN.to_owned(), seen.to_owned()));
    cri::ImageSpec {
        image: IMAGE.into(),
        annotations: annotations.into_iter().collect(),
        runtime_handler: handler.into(),
        ..Default::default()
    }
}

fn pod(uid: &str, seen: &str) -> cri::PodSandbox {
    cri::PodSandbox {
        id: uid.into(),
        metadata: Some(cri::PodSandboxMetadata {
            uid: uid.into(),
            ..Default::default()
        }),
        annotations: [(SEEN.to_owned(), seen.to_owned())].into(),
        ..Default::default()
    }
}

fn config(pod: &cri::PodSandbox) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: pod.metadata.clone(),
        annotations: pod.annotations.clone(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_pods_image_is_pulled_and_found_on_the_side_of_the_pod_alone() {
    let bench = Bench::new("bulkhead");
    let (inside, beside) = (pod("a", "1"), pod("b", "2"));
    bench.ours.world().pods.push(inside.clone());
    bench.theirs.world().pods.push(beside.clone());
    bench.ours.world().secret = Some("secret".into());
    bench.theirs.world().secret = Some("secret".into());
    let id = image_id(IMAGE);
    let pulled = bench
        .pull(spec("2", ""), Some(config(&beside)), "secret")
        .await;
    assert_eq!(pulled.unwrap(), id);
    assert_eq!(bench.pulls(), (0, 1));
    assert_eq!(bench.status(spec("2", "")).await.unwrap(), Some(id.clone()));
    assert_eq!(bench.status(spec("1", "")).await.unwrap(), None);
    let denied = bench
        .pull(spec("1", ""), Some(config(&inside)), "wrong")
        .await;
    assert_eq!(denied.unwrap_err().code(), Code::Unknown);
    assert_eq!(bench.pulls(), (1, 1));
    // A kubelet that was started again gives the pod another time, but its metadata stay.
    let again = cri::PodSandboxConfig {
        annotations: pod("a", "3").annotations,
        ..config(&inside)
    };
    assert_eq!(
        bench.status(spec("3", "")).await.unwrap(),
        Some(id.clone()),
        "on any side"
    );
    bench
        .pull(spec("3", ""), Some(again), "secret")
        .await
        .unwrap();
    assert_eq!(bench.pulls(), (2, 1));
    assert_eq!(bench.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_create_container_has_told_is_known_at_the_next_question() {
    let bench = Bench::new("bulkhead");
    bench.theirs.world().images.push(cri::Image {
        id: image_id(IMAGE),
        repo_tags: vec![IMAGE.into()],
        ..Default::default()
    });
    assert!(bench.status(spec("5", "")).await.unwrap().is_some());
    bench
        .endpoint
        .pods
        .seen
        .learn(&pod("a", "5").annotations, &Side::Ours);
    assert!(bench.status(spec("5", "")).await.unwrap().is_none());
}

#[tokio::test]
async fn a_handler_means_its_side_and_no_pod_means_all() {
    let bench = Bench::new("bulkhead");
    let id = image_id(IMAGE);
    bench.pull(spec("", "runc"), None, "").await.unwrap();
    assert_eq!(bench.pulls(), (0, 1));
    let passed = bench.theirs.world().pulls[0].image.clone().unwrap();
    assert_eq!(passed.runtime_handler, "passed");
    assert_eq!(bench.status(spec("", "bulkhead")).await.unwrap(), None);
    assert_eq!(bench.status(spec("", "")).await.unwrap(), Some(id.clone()));
    let unknown = bench.status(spec("", "kata")).await.unwrap_err();
    assert!(unknown.message().contains("kata"), "{unknown}");
    bench.pull(spec("", ""), None, "").await.unwrap();
    assert_eq!(bench.pulls(), (1, 2));
    let listed = bench.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].size, 200, "of both sides");
    bench.remove(&id).await.unwrap();
    assert!(bench.list().await.unwrap().is_empty());
    bench.theirs.world().secret = Some("secret".into());
    bench.pull(spec("", ""), None, "").await.unwrap_err();
}

#[tokio::test]
async fn a_name_that_means_different_images_means_that_of_the_default_side() {
    for (default, expected) in [("bulkhead", "ours"), ("runc", "theirs")] {
        let bench = Bench::new(default);
        for (fake, id) in [(&bench.ours, "ours"), (&bench.theirs, "theirs")] {
            fake.world().images.push(cri::Image {
                id: id.into(),
                repo_tags: vec![IMAGE.into()],
                ..Default::default()
            });
        }
        let found = bench.status(spec("", "")).await.unwrap();
        assert_eq!(found.as_deref(), Some(expected));
        assert_eq!(bench.list().await.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn images_of_a_delegate_that_is_down_stay_listed_and_cannot_be_removed() {
    let mut bench = Bench::new("bulkhead");
    let beside = pod("b", "2");
    bench.theirs.world().pods.push(beside.clone());
    let id = bench
        .pull(spec("2", ""), Some(config(&beside)), "")
        .await
        .unwrap();
    // It was not listed since, and stays listed nevertheless.
    bench.running = None;
    let listed = bench.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, id);
    let error = bench.status(spec("2", "")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("runc"), "{error}");
    assert_eq!(bench.status(spec("", "")).await.unwrap(), None);
    for request in [
        bench.remove(&id).await,
        bench.pull(spec("", ""), None, "").await.map(drop),
    ] {
        assert_eq!(request.unwrap_err().code(), Code::Unavailable);
    }
    assert_eq!(bench.pulls().0, 1, "ours has pulled meanwhile");
    bench.restart("bulkhead");
    let listed = bench.list().await.unwrap();
    assert!(listed.iter().any(|image| image.id == id), "{listed:?}");
    // Whose images were never seen, of that nobody can say which ones are there.
    std::fs::remove_file(bench.directory.path().join("runc.images.list")).unwrap();
    bench.restart("bulkhead");
    assert_eq!(bench.list().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_slow_delegate_delays_no_pod_of_ours() {
    let bench = Bench::new("bulkhead");
    let inside = pod("a", "1");
    bench.ours.world().pods.push(inside.clone());
    bench.list().await.unwrap();
    bench.theirs.freeze(true);
    let started = Instant::now();
    bench
        .pull(spec("1", ""), Some(config(&inside)), "")
        .await
        .unwrap();
    assert!(bench.status(spec("1", "")).await.unwrap().is_some());
    assert!(started.elapsed() < Duration::from_millis(500));
    assert_eq!(bench.list().await.unwrap().len(), 1);
    let started = Instant::now();
    assert_eq!(bench.list().await.unwrap().len(), 1);
    assert!(bench.status(spec("", "")).await.unwrap().is_some());
    assert!(
        started.elapsed() < Duration::from_millis(500),
        "known to be slow"
    );
}

#[tokio::test]
async fn our_file_system_is_the_first_and_a_delegate_that_is_away_has_none() {
    let mut bench = Bench::new("runc");
    let request = || Request::new(cri::ImageFsInfoRequest {});
    let places = |answer: cri::ImageFsInfoResponse| -> Vec<String> {
        let systems = answer.image_filesystems.into_iter();
        systems
            .filter_map(|one| Some(one.fs_id?.mountpoint))
            .collect()
    };
    let answer = bench.endpoint.image_fs_info(request()).await.unwrap();
    assert_eq!(places(answer.into_inner()), ["/ours", "/theirs"]);
    bench.running = None;
    let answer = bench.endpoint.image_fs_info(request()).await.unwrap();
    assert_eq!(places(answer.into_inner()), ["/ours"]);
}
