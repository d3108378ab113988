// SPDX-License-Identifier: Apache-2.0
//! Images of both sides: each is pulled where its pod runs, with the credentials of that pod, and kubelet sees it once.

use std::path::Path;

use bulkhead_proto::cri::{
    AuthConfig, FilesystemUsage, Image, ImageFsInfoRequest, ImageSpec, ImageStatusRequest,
    ListImagesRequest, PodSandboxConfig, PullImageRequest, RemoveImageRequest, StreamImagesRequest,
};
use bulkhead_tests::client::{Client, Pod, assert_fails, container, image_spec};
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::{PASSWORD, Registry, USERNAME};
use bulkhead_tests::wait::{until, whether};
use tonic::{Code, Status};

use super::{Both, OWN_PROCESSES, pod_config};

/// kubelet gives each pod this annotation, with the time at which it first saw the pod. It sends a pod's annotations
/// with each call about the pod's images.
const SEEN: &str = "kubernetes.io/config.seen";

/// How an image is asked for: for a pod that kubelet saw at `seen`, if it is not empty.
fn of(image: &str, seen: &str) -> ImageSpec {
    let annotations = (!seen.is_empty()).then(|| (SEEN.to_owned(), seen.to_owned()));
    ImageSpec {
        annotations: annotations.into_iter().collect(),
        ..image_spec(image)
    }
}

fn by(image: &str, handler: &str) -> ImageSpec {
    ImageSpec {
        runtime_handler: handler.into(),
        ..image_spec(image)
    }
}

async fn status(client: &mut Client, image: ImageSpec) -> Result<Option<Image>, Status> {
    let request = ImageStatusRequest {
        image: Some(image),
        verbose: false,
    };
    let answer = client.images.image_status(request).await?;
    Ok(answer.into_inner().image)
}

async fn is_there(client: &mut Client, image: ImageSpec) -> bool {
    status(client, image).await.expect("image status").is_some()
}

async fn pull(
    client: &mut Client,
    image: ImageSpec,
    pod: Option<&PodSandboxConfig>,
    auth: Option<AuthConfig>,
) -> Result<String, Status> {
    let request = PullImageRequest {
        image: Some(image),
        auth,
        sandbox_config: pod.cloned(),
    };
    Ok(client
        .images
        .pull_image(request)
        .await?
        .into_inner()
        .image_ref)
}

async fn list(client: &mut Client) -> Vec<Image> {
    let listed = client
        .images
        .list_images(ListImagesRequest { filter: None })
        .await;
    listed.expect("list images").into_inner().images
}

async fn remove(client: &mut Client, image: &str) -> Result<(), Status> {
    let request = RemoveImageRequest {
        image: Some(image_spec(image)),
    };
    client.images.remove_image(request).await.map(drop)
}

fn secret() -> AuthConfig {
    AuthConfig {
        username: USERNAME.into(),
        password: PASSWORD.into(),
        ..Default::default()
    }
}

/// A daemon with its delegate, a registry that wants credentials, and a pod of each side that kubelet has seen.
struct Bench {
    both: Both,
    private: String,
    inside: Pod,
    beside: Pod,
    _registry: Registry,
}

const INSIDE_SEEN: &str = "2026-11-29T06:00:00.000000001Z";
const BESIDE_SEEN: &str = "2026-11-29T06:00:00.000000002Z";

impl Bench {
    async fn start(release: Release) -> Self {
        let registry = Registry::shared().private();
        let containerd = Containerd::start(release).await;
        let config = format!(
            "{}[registries.\"{}\"]\nplain_http = true\n",
            containerd.config(""),
            registry.address
        );
        let daemon = Daemon::start_with(Networking::Bridge, &config).await;
        let mut both = Both {
            client: daemon.client().await,
            daemon,
            containerd,
            busybox: Registry::shared().image("test/busybox:latest"),
        };
        Self {
            inside: both.seen_pod("bulkhead", "inside", INSIDE_SEEN).await,
            beside: both.seen_pod("runc", "beside", BESIDE_SEEN).await,
            private: registry.image("test/busybox:latest"),
            both,
            _registry: registry,
        }
    }

    async fn end(mut self) {
        self.both.client.end_pod(&self.inside).await;
        self.both.client.end_pod(&self.beside).await;
        assert!(!self.both.daemon.output().contains(PASSWORD));
    }
}

impl Both {
    async fn seen_pod(&mut self, handler: &str, name: &str, seen: &str) -> Pod {
        let mut config = pod_config(&self.client, name, OWN_PROCESSES);
        config.annotations.insert(SEEN.into(), seen.into());
        let pod = self.client.run_pod_by(handler, config).await;
        pod.unwrap_or_else(|error| panic!("a pod of {handler}: {error:?}"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_where_its_pod_runs_with_the_credentials_of_that_pod() {
    for release in Release::ALL {
        let mut bench = Bench::start(release).await;
        let (private, inside, beside) = (&bench.private, &bench.inside, &bench.beside);
        let client = &mut bench.both.client;
        let direct = bench.both.containerd.client(Path::new("/nowhere"));
        let direct = &mut direct.await;
        for seen in [INSIDE_SEEN, BESIDE_SEEN, ""] {
            assert!(!is_there(client, of(private, seen)).await, "{seen:?}");
        }
        let denied = pull(client, of(private, BESIDE_SEEN), Some(&beside.config), None).await;
        denied.expect_err("the registry wants credentials");
        let pulled = pull(
            client,
            of(private, BESIDE_SEEN),
            Some(&beside.config),
            Some(secret()),
        );
        let id = pulled.await.expect("pull");
        let found = status(client, of(private, BESIDE_SEEN)).await;
        assert_eq!(found.expect("status").expect("an image").id, id);
        assert!(is_there(direct, image_spec(private)).await);
        // The other pod has brought no credentials, so it does not get what the first pod's have opened.
        assert!(!is_there(client, of(private, INSIDE_SEEN)).await);
        let denied = pull(client, of(private, INSIDE_SEEN), Some(&inside.config), None).await;
        denied.expect_err("the registry wants credentials");
        assert!(!is_there(client, by(private, "bulkhead")).await);
        assert!(is_there(client, by(private, "runc")).await);

        let config = container("main", &id, &["sh", "-c", "echo hello"]);
        let one = client.create(beside, config.clone()).await.expect("create");
        client.start(&one).await.expect("start");
        assert_eq!(client.exited(&one).await.exit_code, 0);
        let alone = list(client).await;
        let alone = alone.iter().find(|image| image.id == id).expect("listed");

        let pulled = pull(
            client,
            of(private, INSIDE_SEEN),
            Some(&inside.config),
            Some(secret()),
        );
        assert_eq!(pulled.await.expect("pull"), id, "the same image");
        let one = client.create(inside, config).await.expect("create");
        client.start(&one).await.expect("start");
        assert_eq!(client.exited(&one).await.exit_code, 0);
        let listed = list(client).await;
        let same: Vec<_> = listed.iter().filter(|image| image.id == id).collect();
        assert_eq!(same.len(), 1, "{listed:?}");
        assert!(same[0].repo_tags.contains(private), "{listed:?}");
        assert!(same[0].size > alone.size, "both sides have it: {listed:?}");
        let mut streamed = client
            .images
            .stream_images(StreamImagesRequest::default())
            .await
            .expect("stream images")
            .into_inner();
        let mut images = Vec::new();
        while let Some(message) = streamed.message().await.expect("a message") {
            images.extend(message.images);
        }
        assert_eq!(images, listed);

        remove(client, &id).await.expect("remove");
        for seen in [INSIDE_SEEN, BESIDE_SEEN, ""] {
            assert!(!is_there(client, of(private, seen)).await, "{seen:?}");
        }
        assert!(!is_there(direct, image_spec(private)).await);
        bench.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_there_before_is_found_by_the_pods_of_its_side() {
    for release in Release::ALL {
        let mut bench = Bench::start(release).await;
        let busybox = bench.both.busybox.clone();
        let direct = bench.both.containerd.client(Path::new("/nowhere"));
        direct.await.pull(&busybox).await.expect("pull");
        let client = &mut bench.both.client;
        assert!(is_there(client, of(&busybox, BESIDE_SEEN)).await);
        assert!(!is_there(client, of(&busybox, INSIDE_SEEN)).await);
        // kubelet was started again and sees the pod anew. It finds the image, and with the first container the pod.
        let again = "2026-11-29T07:00:00.000000003Z";
        assert!(is_there(client, of(&busybox, again)).await);
        bench
            .inside
            .config
            .annotations
            .insert(SEEN.into(), again.into());
        // The daemon that was started again finds the pods where they run.
        bench.both.daemon.restart().await;
        let client = &mut bench.both.client;
        *client = bench.both.daemon.client().await;
        assert!(is_there(client, of(&busybox, BESIDE_SEEN)).await);
        assert!(!is_there(client, of(&busybox, INSIDE_SEEN)).await);
        // Then the image is pulled for that container, which needs no credentials.
        let config = container("main", &busybox, &["true"]);
        let created = client.create(&bench.inside, config).await;
        created.expect("create");
        assert!(is_there(client, of(&busybox, again)).await);
        bench.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_for_no_pod_is_for_all_sides_and_a_handler_names_one() {
    for release in Release::ALL {
        let mut both = Both::start(release, "").await;
        let busybox = both.busybox.clone();
        let client = &mut both.client;
        let id = pull(client, by(&busybox, "runc"), None, None)
            .await
            .expect("pull");
        assert!(!is_there(client, by(&busybox, "bulkhead")).await);
        assert!(is_there(client, image_spec(&busybox)).await, "on any side");
        let unknown = pull(client, by(&busybox, "nobody"), None, None).await;
        assert_fails(
            unknown,
            Code::InvalidArgument,
            &["nobody", "bulkhead", "runc"],
        );
        let pulled = pull(client, image_spec(&busybox), None, None).await;
        assert_eq!(pulled.expect("pull"), id);
        for handler in ["bulkhead", "runc"] {
            assert!(is_there(client, by(&busybox, handler)).await, "{handler}");
        }

        // A side that measures for long is left out.
        let info = until("both sides say where their images are", async || {
            let info = client.images.image_fs_info(ImageFsInfoRequest {}).await;
            let info = info.expect("file systems").into_inner();
            whether(info.image_filesystems.len() == 2, &info).map(|()| info)
        });
        let info = info.await;
        let place = |usage: &FilesystemUsage| usage.fs_id.clone().expect("a place").mountpoint;
        let places: Vec<_> = info.image_filesystems.iter().map(place).collect();
        assert!(
            places[0].contains("/e2e-") && places[1].contains("/containerd-"),
            "{places:?}"
        );
        let written = place(&info.container_filesystems[0]);
        assert!(written.contains("/e2e-"), "{written:?}");

        both.containerd.kill();
        let client = &mut both.client;
        let again = pull(client, image_spec(&busybox), None, None).await;
        assert_fails(again, Code::Unavailable, &["runc"]);
        // An image that cannot be removed everywhere is not gone, and kubelet must not forget it.
        assert!(list(client).await.iter().any(|image| image.id == id));
        both.daemon.restart().await;
        both.client = both.daemon.client().await;
        let client = &mut both.client;
        assert!(
            list(client).await.iter().any(|image| image.id == id),
            "after a restart"
        );
        assert_fails(remove(client, &id).await, Code::Unavailable, &["runc"]);
        assert!(list(client).await.iter().any(|image| image.id == id));
        both.containerd.start_again().await;
        until("the image can be removed", async || {
            let removed = remove(client, &id).await;
            removed.map_err(|status| status.to_string())
        })
        .await;
        assert!(!list(client).await.iter().any(|image| image.id == id));
    }
}
