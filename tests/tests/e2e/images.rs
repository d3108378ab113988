// SPDX-License-Identifier: Apache-2.0
//! Images: pulls, names, what a guest sees of a tar's entries, and bad registries.

use bulkhead_proto::cri::{
    AuthConfig, FilesystemUsage, ImageFilter, ImageFsInfoRequest, ImageSpec, ImageStatusRequest,
    ListImagesRequest, PullImageRequest, RemoveImageRequest,
};
use bulkhead_tests::client::{Client, assert_fails, image_spec};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::{Registry, free_address};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

async fn start() -> (Daemon, Client) {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let client = daemon.client().await;
    (daemon, client)
}

async fn image(client: &mut Client, name: &str) -> Option<bulkhead_proto::cri::Image> {
    let request = ImageStatusRequest {
        image: Some(image_spec(name)),
        verbose: false,
    };
    client
        .images
        .image_status(request)
        .await
        .expect("image status")
        .into_inner()
        .image
}

async fn remove(client: &mut Client, name: &str) {
    let request = RemoveImageRequest {
        image: Some(image_spec(name)),
    };
    client
        .images
        .remove_image(request)
        .await
        .expect("remove image");
}

async fn used_bytes(client: &mut Client) -> u64 {
    let info = client
        .images
        .image_fs_info(ImageFsInfoRequest {})
        .await
        .expect("image fs info")
        .into_inner();
    let usage = info.image_filesystems.first().expect("a file system");
    usage.used_bytes.as_ref().expect("used bytes").value
}

#[tokio::test(flavor = "multi_thread")]
async fn names_digests_and_ids_find_an_image_until_it_is_removed() {
    let registry = Registry::shared();
    let pinned = registry.image("test/busybox:1");
    let config = format!("[images]\npinned = [{pinned:?}]\n");
    let daemon = Daemon::start_with(Networking::Loopback, &config).await;
    let mut client = daemon.client().await;
    let empty = used_bytes(&mut client).await;
    let latest = registry.image("test/busybox:latest");
    let id = client
        .pull(&registry.image("test/busybox"))
        .await
        .expect("pull");
    let found = image(&mut client, &latest).await.expect("by tag");
    assert!(!found.pinned, "its pinned name was not pulled: {found:?}");
    client.pull(&pinned).await.expect("pull");
    assert!(used_bytes(&mut client).await > empty + 1_000_000);
    let found = image(&mut client, &latest).await.expect("by tag");
    assert_eq!(found.id, id);
    let mut tags = found.repo_tags.clone();
    tags.sort();
    assert_eq!(tags, [registry.image("test/busybox:1"), latest.clone()]);
    assert_eq!(found.repo_digests.len(), 1, "{found:?}");
    assert!(found.size > 0 && found.pinned, "{found:?}");
    for name in [
        &found.id,
        &found.repo_digests[0],
        &registry.image("test/busybox:1"),
    ] {
        assert_eq!(image(&mut client, name).await.expect(name).id, id, "{name}");
    }
    client
        .pull(&found.repo_digests[0])
        .await
        .expect("pull by digest");
    let listed = client
        .images
        .list_images(ListImagesRequest { filter: None })
        .await
        .expect("list")
        .into_inner()
        .images;
    assert_eq!(listed.len(), 1, "{listed:?}");
    remove(&mut client, &id).await;
    remove(&mut client, &id).await;
    assert!(image(&mut client, &latest).await.is_none());
    assert_eq!(
        used_bytes(&mut client).await,
        empty,
        "removal frees the space"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_use_keeps_its_files_until_the_container_goes() {
    let (_daemon, mut client) = start().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    let image_id = image(&mut client, &busybox).await.expect("image").id;
    remove(&mut client, &image_id).await;
    assert_eq!(
        client.shell(&id, "cat /etc/group | head -n 1").await,
        "root:x:0:\n"
    );
    client.end_pod(&pod).await;
    assert!(used_bytes(&mut client).await < 1_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_entry_and_whiteout_arrives_in_the_guest() {
    let (_daemon, mut client) = start().await;
    let oddities = Registry::shared().image("test/oddities");
    client.pull(&oddities).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &oddities, "exec sleep 1000")
        .await;
    let long = format!(
        "/long/{}/{}/{}",
        "n".repeat(100),
        "m".repeat(120),
        "o".repeat(250)
    );
    let table = [
        (
            "whiteout",
            "ls /gone /removed 2>&1 | grep -c 'No such file'",
            "2\n",
        ),
        ("kept", "cat /kept", "kept"),
        ("changed above", "cat /changed", "new"),
        ("opaque", "ls /opaque", "above\n"),
        ("merged", "ls /merged", "above\n"),
        ("file becomes directory", "cat /file-then-dir/inside", "in"),
        ("directory becomes file", "cat /dir-then-file", "file"),
        (
            "no whiteout shows",
            "find / -xdev -name '.wh.*' | wc -l",
            "0\n",
        ),
        (
            "hard link",
            "stat -c %h /hard-a; [ $(stat -c %i /hard-a) = $(stat -c %i /hard-b) ] && cat /hard-b",
            "2\nlinked",
        ),
        ("set-uid", "stat -c %a /setuid", "4755\n"),
        ("sticky", "stat -c %a /sticky", "1777\n"),
        ("owner", "stat -c '%u %g %a' /owned", "1000 100000 640\n"),
        (
            "device",
            "stat -c '%F %t %T' /null",
            "character special file 1 3\n",
        ),
        ("fifo", "stat -c %F /fifo", "fifo\n"),
        ("symlink", "cat /link; readlink /link", "keptkept\n"),
        ("long symlink", "readlink /dangling | wc -c", "210\n"),
        ("dotted name", "cat /dotted/name", "dotted"),
        (
            "directories that an upper layer only implies",
            "stat -c '%a %u:%g' /tmp /private /private/sub /new /emptied; stat -c %Y /private; \
             for directory in /private/sub /tmp /emptied; do ls $directory; done",
            "1777 0:0\n750 33:33\n700 34:35\n755 0:0\n700 0:0\n7\nabove\nabove\nabove\n",
        ),
        ("old time", "stat -c %Y /old", "1\n"),
        ("empty file", "stat -c %s /empty", "0\n"),
        (
            "big file",
            "stat -c %s /big; head -c 256 /big | tail -c 1 | od -An -tx1",
            "5120000\n ff\n",
        ),
    ];
    for (case, line, expected) in table {
        assert_eq!(client.shell(&id, line).await, expected, "{case}");
    }
    assert_eq!(client.shell(&id, &format!("cat {long}")).await, "long");
    let sum = client.shell(&id, "md5sum /big | cut -d' ' -f1").await;
    assert_eq!(
        sum.trim(),
        "dcf6a99f83b3a50b2ff3ecc6490d966f",
        "md5 of what make_images.py wrote"
    );
    client
        .shell(
            &id,
            "echo more >> /kept && rm /changed && mkdir /opaque/new",
        )
        .await;
    assert_eq!(
        client.shell(&id, "cat /kept; ls /opaque").await,
        "keptmore\nabove\nnew\n"
    );
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_this_machines_image_and_docker_manifests_work() {
    let (_daemon, mut client) = start().await;
    let registry = Registry::shared();
    client
        .pull(&registry.image("test/index"))
        .await
        .expect("index");
    client
        .pull(&registry.image("test/docker"))
        .await
        .expect("docker schema 2");
    assert_fails(
        client.pull(&registry.image("test/index:only-arm64")).await,
        Code::NotFound,
        &["arm64", "amd64"],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_pulls_name_the_cause_and_leave_nothing() {
    let (_daemon, mut client) = start().await;
    let registry = Registry::shared();
    let empty = used_bytes(&mut client).await;
    let nobody = free_address();
    let zeros = "0".repeat(64);
    let table = [
        (
            "unknown tag",
            registry.image("test/busybox:no-such-tag"),
            Code::NotFound,
            "no-such-tag",
        ),
        (
            "unknown name",
            registry.image("test/no-such-image"),
            Code::NotFound,
            "no-such-image",
        ),
        (
            "unknown digest",
            registry.image(&format!("test/busybox@sha256:{zeros}")),
            Code::NotFound,
            "sha256:0000",
        ),
        (
            "bad reference",
            "UPPER/case image".to_owned(),
            Code::InvalidArgument,
            "UPPER/case",
        ),
        (
            "short digest",
            registry.image("test/busybox@sha256:12"),
            Code::InvalidArgument,
            "sha256:12",
        ),
        (
            "nobody listens",
            format!("{nobody}/test/busybox"),
            // kubelet knows this error by the beginning of its message; it has no gRPC code.
            Code::Unknown,
            "RegistryUnavailable: ",
        ),
        (
            "dot dot",
            registry.image("test/hostile-dotdot"),
            Code::InvalidArgument,
            "..",
        ),
    ];
    for (case, reference, code, word) in table {
        let error = client.pull(&reference).await.expect_err(case);
        assert_eq!(error.code(), code, "{case}: {error:?}");
        assert!(error.message().contains(word), "{case}: {error:?}");
        assert_eq!(used_bytes(&mut client).await, empty, "{case} leaves files");
    }
    let listed = client
        .images
        .list_images(ListImagesRequest { filter: None })
        .await
        .expect("list")
        .into_inner()
        .images;
    assert!(listed.is_empty(), "{listed:?}");
    client
        .pull(&registry.image("test/hostile-absolute"))
        .await
        .expect("absolute names are made relative, as tar does");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_layer_is_detected() {
    let (_daemon, mut client) = start().await;
    let registry = Registry::shared();
    // No other image has the second layer of this image. Change a byte of it in the registry's storage.
    let links = registry
        .storage
        .join("docker/registry/v2/repositories/test/corrupt/_layers/sha256");
    let mut blobs: Vec<_> = std::fs::read_dir(links)
        .expect("layer links")
        .flatten()
        .map(|entry| {
            let hex = entry.file_name().to_string_lossy().into_owned();
            registry.storage.join(format!(
                "docker/registry/v2/blobs/sha256/{}/{hex}/data",
                &hex[..2]
            ))
        })
        .collect();
    // Sorted by size: the configuration, the layer of random bytes, busybox.
    blobs.sort_by_key(|path| std::fs::metadata(path).expect("blob").len());
    let noise = &blobs[1];
    let mut bytes = std::fs::read(noise).expect("read the layer");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    std::fs::write(noise, bytes).expect("corrupt the layer");
    let error = client
        .pull(&registry.image("test/corrupt"))
        .await
        .expect_err("a corrupt layer must not be accepted");
    assert!(
        matches!(error.code(), Code::DataLoss | Code::Internal),
        "{error:?}"
    );
    assert!(error.message().contains("sha256:"), "{error:?}");
    assert!(used_bytes(&mut client).await < 100_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_from_a_registry_that_stalls_is_given_up() {
    let daemon =
        Daemon::start_with(Networking::Loopback, "[images]\nstall_timeout_seconds = 2").await;
    let mut client = daemon.client().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("bind");
    let address = listener.local_addr().expect("address");
    let held = tokio::spawn(async move {
        let mut connections = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            connections.push(connection);
        }
    });
    let request = PullImageRequest {
        image: Some(image_spec(&format!("{address}/test/busybox"))),
        auth: Some(AuthConfig {
            username: "someone".into(),
            password: "secret-word".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let error = client
        .images
        .pull_image(request)
        .await
        .expect_err("a stalled pull");
    assert_eq!(error.code(), Code::Unknown, "{error:?}");
    assert!(error.message().starts_with("RegistryUnavailable: "));
    assert!(!error.message().contains("secret-word"), "{error:?}");
    assert!(!daemon.output().contains("secret-word"));
    held.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_go_only_to_the_registry_that_they_are_for() {
    let address = free_address().to_string();
    let config = format!("[registries.\"{address}\"]\nplain_http = true\n");
    let daemon = Daemon::start_with(Networking::Loopback, &config).await;
    let mut client = daemon.client().await;
    let listener = tokio::net::TcpListener::bind(&address).await.expect("bind");
    let (says, heard) = std::sync::mpsc::channel();
    let serving = tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(connection.read_u8().await.expect("a request"));
            }
            let request = String::from_utf8_lossy(&request).to_ascii_lowercase();
            says.send(request.contains("\r\nauthorization: basic "))
                .expect("send");
            let answer = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\n\
                          Content-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = connection.write_all(answer.as_bytes()).await;
        }
    });
    for (server, expected) in [
        (String::new(), true),
        (address.clone(), true),
        (format!("http://{address}/v2/"), true),
        ("other.example".to_owned(), false),
    ] {
        let request = PullImageRequest {
            image: Some(image_spec(&format!("{address}/test/busybox"))),
            auth: Some(AuthConfig {
                username: "someone".into(),
                password: "secret-word".into(),
                server_address: server.clone(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let refused = client.images.pull_image(request).await;
        assert_fails(refused, Code::Unauthenticated, &[&address]);
        let mut came = false;
        while let Ok(one) = heard.try_recv() {
            came |= one;
        }
        assert_eq!(came, expected, "{server:?}");
    }
    assert!(!daemon.output().contains("secret-word"));
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn images_serve_every_known_runtime_handler_and_no_other() {
    let (_daemon, mut client) = start().await;
    let busybox = Registry::shared().image("test/busybox");
    let of = |handler: &str| ImageSpec {
        runtime_handler: handler.into(),
        ..image_spec(&busybox)
    };
    let pull = |handler: &str| PullImageRequest {
        image: Some(of(handler)),
        ..Default::default()
    };
    let refused = client.images.pull_image(pull("runc")).await;
    assert_fails(refused, Code::InvalidArgument, &["runc", "bulkhead"]);
    let pulled = client.images.pull_image(pull("bulkhead")).await;
    let id = pulled.expect("pull").into_inner().image_ref;
    for handler in ["", "bulkhead"] {
        let request = ImageStatusRequest {
            image: Some(of(handler)),
            verbose: false,
        };
        let answer = client.images.image_status(request).await.expect("status");
        assert_eq!(answer.into_inner().image.expect("image").id, id);
        let request = ListImagesRequest {
            filter: Some(ImageFilter {
                image: Some(of(handler)),
            }),
        };
        let answer = client.images.list_images(request).await.expect("list");
        assert_eq!(answer.into_inner().images.len(), 1, "{handler}");
    }
    let request = ImageStatusRequest {
        image: Some(of("runc")),
        verbose: false,
    };
    let refused = client.images.image_status(request).await;
    assert_fails(refused, Code::InvalidArgument, &["runc"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_containers_write_is_reported_apart_from_images() {
    let (_daemon, mut client) = start().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let empty = written_bytes(&mut client).await;
    let pod = client.run_pod("writes").await.expect("run pod");
    let script = "head -c 20000000 /dev/urandom > /file; sync; echo written; exec sleep 1000";
    client.run_script(&pod, "main", &busybox, script).await;
    client
        .log_until(&pod, "main", |log| log.contains("written"))
        .await;
    let written = written_bytes(&mut client).await - empty;
    assert!(
        (20_000_000..200_000_000).contains(&written),
        "{written} bytes of 20000000"
    );
    client.end_pod(&pod).await;
    assert_eq!(written_bytes(&mut client).await, empty);
}

async fn written_bytes(client: &mut Client) -> u64 {
    let info = client.images.image_fs_info(ImageFsInfoRequest {}).await;
    let info = info.expect("image fs info").into_inner();
    let [image, container] = [&info.image_filesystems, &info.container_filesystems].map(|list| {
        let [usage] = list.as_slice() else {
            panic!("one file system: {list:?}");
        };
        usage
    });
    let place = |usage: &FilesystemUsage| usage.fs_id.clone().expect("a place").mountpoint;
    assert_ne!(place(image), place(container));
    for usage in [image, container] {
        let place = place(usage);
        assert!(std::path::Path::new(&place).is_dir(), "{place}");
    }
    container.used_bytes.expect("used bytes").value
}
