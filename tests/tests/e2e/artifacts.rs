// SPDX-License-Identifier: Apache-2.0
//! OCI artifacts: they are pulled, listed and mounted like images, and no container can run one. Mount options, of
//! these and of other mounts.

use bulkhead_proto::cri::{
    Image, ImageStatusRequest, ListImagesRequest, Mount, RemoveImageRequest, StatusRequest,
};
use bulkhead_tests::client::{Client, assert_fails, container, image_spec};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, with_mounts};
use bulkhead_tests::registry::Registry;
use tonic::Code;

const SLEEP: [&str; 2] = ["sleep", "1000"];

async fn list(client: &mut Client) -> Vec<Image> {
    let request = ListImagesRequest { filter: None };
    let answer = client.images.list_images(request).await;
    answer.expect("list images").into_inner().images
}

/// The image `name` and the words about it.
async fn status(client: &mut Client, name: &str) -> (Image, String) {
    let request = ImageStatusRequest {
        image: Some(image_spec(name)),
        verbose: true,
    };
    let answer = client.images.image_status(request).await;
    let answer = answer.expect("image status").into_inner();
    let info = answer.info.get("info").cloned().unwrap_or_default();
    (answer.image.expect(name), info)
}

fn options(mount: Mount, options: &[&str]) -> Mount {
    Mount {
        mount_options: options.iter().map(ToString::to_string).collect(),
        ..mount
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_is_a_volume_and_no_container() {
    let kubelet = Kubelet::new("uid-pod");
    let daemon = Daemon::start_with(Networking::Loopback, &kubelet.config()).await;
    let mut client = daemon.client().await;
    let registry = Registry::shared();
    let busybox = registry.image("test/busybox");
    let artifact = registry.image("test/artifact:latest");
    for (tag, word) in [("escape", "../escape"), ("twice", "hello.txt")] {
        let refused = client
            .pull(&registry.image(&format!("test/artifact:{tag}")))
            .await;
        assert_fails(refused, Code::InvalidArgument, &[word, "sha256:"]);
    }
    assert!(list(&mut client).await.is_empty());
    let id = client.pull(&artifact).await.expect("pull");
    let renamed = client.pull(&registry.image("test/artifact:renamed")).await;
    assert_ne!(
        renamed.expect("pull"),
        id,
        "both have the same configuration"
    );
    let (image, info) = status(&mut client, &artifact).await;
    assert_eq!(
        (&image.id, &image.repo_tags),
        (&id, &vec![artifact.clone()])
    );
    assert!(
        image.repo_digests[0].ends_with(&id),
        "the digest of its manifest: {image:?}"
    );
    assert!(image.size > 0 && image.username.is_empty(), "{image:?}");
    assert!(info.contains("application/vnd.bulkhead.tests"), "{info}");
    assert_eq!(list(&mut client).await.len(), 2);

    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");
    for name in [&artifact, &id] {
        let refused = client.create(&pod, container("runs", name, &SLEEP)).await;
        assert_fails(
            refused,
            Code::InvalidArgument,
            &["artifact", "vnd.bulkhead.tests", "image volume"],
        );
    }
    let volume = |sub_path: &str, at: &str| Mount {
        container_path: at.into(),
        image: Some(image_spec(&artifact)),
        image_sub_path: sub_path.into(),
        readonly: true,
        ..Default::default()
    };
    let data = kubelet.empty_dir("data");
    let shared = daemon.path("shared");
    std::fs::create_dir(&shared).expect("a directory to share");
    let refused = with_mounts(
        container("refused", &busybox, &SLEEP),
        vec![options(volume("", "/a"), &["noexec", "sync"])],
    );
    let refused = client.create(&pod, refused).await;
    assert_fails(
        refused,
        Code::InvalidArgument,
        &["mount option", "\"sync\"", "noexec"],
    );
    let all = ["noexec", "nosuid", "nodev"];
    let config = with_mounts(
        container("main", &busybox, &SLEEP),
        vec![
            volume("", "/a"),
            volume("dir", "/part"),
            options(volume("tree", "/no-exec"), &["ro", "noexec"]),
            mount(&data, "/data"),
            options(mount(&data, "/weak"), &all),
            options(mount(&shared, "/shared"), &["nosuid"]),
        ],
    );
    let main = client.create(&pod, config).await.expect("create");
    client.start(&main).await.expect("start");
    for (line, expected) in [
        (
            "cd /a; ls | grep -v ^sha256; ls | grep -c ^sha256",
            "dir\nhello.txt\noras.txt\ntree\n1\n",
        ),
        (
            "cd /a; cat hello.txt dir/deep.txt oras.txt sha256:*",
            "hellodeepno archiveuntitled",
        ),
        (
            "stat -c '%a %u:%g' /a/hello.txt /a/dir /a; cat /part/deep.txt",
            "644 0:0\n755 0:0\n755 0:0\ndeep",
        ),
        ("/a/tree/link", "ran\n"),
        (
            "/no-exec/program 2>&1 | grep -o 'Permission denied'",
            "Permission denied\n",
        ),
        ("touch /a/new 2>&1 | grep -o Read-only", "Read-only\n"),
        (
            "cp /a/tree/program /data; /data/program; /weak/program 2>&1 | grep -o 'Permission denied'",
            "ran\nPermission denied\n",
        ),
        ("echo x > /weak/file && cat /data/file", "x\n"),
    ] {
        assert_eq!(client.shell(&main, line).await, expected, "{line}");
    }
    let mounts = client.shell(&main, "cat /proc/self/mounts").await;
    let of = |at: &str| {
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(1) == Some(at));
        let words = line.and_then(|line| line.split(' ').nth(3)).expect(at);
        all.map(|option| words.split(',').any(|word| word == option))
    };
    assert_eq!(of("/data"), [false; 3], "{mounts}");
    assert_eq!(of("/weak"), [true; 3], "{mounts}");
    assert_eq!(of("/no-exec"), [true, false, false], "{mounts}");
    assert!(of("/shared")[1], "{mounts}");
    let shown = client.status(&main).await.expect("status").mounts;
    let shown: Vec<_> = shown
        .iter()
        .map(|mount| mount.mount_options.len())
        .collect();
    assert_eq!(shown, [0, 0, 1, 0, 3, 1], "ro is shown as readonly");
    let request = StatusRequest { verbose: false };
    let node = client.runtime.status(request).await.expect("status");
    assert!(
        node.into_inner().features.expect("features").mount_options,
        "kubelet asks for this"
    );

    // An artifact that is mounted stays until its last container is gone.
    let request = RemoveImageRequest {
        image: Some(image_spec(&id)),
    };
    client.images.remove_image(request).await.expect("remove");
    assert_eq!(client.shell(&main, "cat /a/hello.txt").await, "hello");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_shown_as_containerd_shows_it() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let registry = Registry::shared();
    let mut sizes = Vec::new();
    for name in ["test/nothing", "test/volumes", "test/artifact:latest"] {
        let name = registry.image(name);
        client.pull_by("bulkhead", &name).await;
        let (image, info) = status(&mut client, &name).await;
        // containerd 2.x fills no `spec`: neither annotations nor the handler for which an image was pulled.
        assert_eq!(image.spec, None, "{image:?}");
        sizes.push(image.size);
        if name.contains("volumes") {
            assert!(info.contains(r#""/data":{}"#), "{info}");
        }
    }
    // Without layers an image is its manifest and its configuration.
    assert!((100..2000).contains(&sizes[0]), "{sizes:?}");
    assert!(sizes[1] > 1_000_000 && sizes[2] > 0, "{sizes:?}");
}
