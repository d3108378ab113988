// SPDX-License-Identifier: Apache-2.0
//! Hostile images from a hostile registry: what they cost the others.
//!
//! The registry serves one image per repository, each built to hold something up: configurations of many entries,
//! layers that unpack to far more than they are or have very many names, downloads that drip. While all of them are
//! pulled, another client must be answered, and the daemon must not grow.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::cri::ListImagesRequest;
use bulkhead_tests::client::Client;
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::watch::Watch;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use super::IDLE;

const MIB: usize = 1 << 20;
const DRIP_BYTES: usize = 100;

/// What a registry has, by the last part of the path.
type Answers = BTreeMap<String, (&'static str, Vec<u8>)>;

/// A hostile registry.
pub struct Hostile {
    address: SocketAddr,
}

impl Hostile {
    /// The lines of a daemon's configuration for this registry, tables at the end.
    pub fn config(&self) -> String {
        format!(
            "[images]\nstall_timeout_seconds = 3\n[registries.\"{}\"]\nplain_http = true\n",
            self.address
        )
    }

    /// Serves the images by name. Blobs of those whose name begins with `drip` come byte by byte.
    pub fn start(images: Vec<(&'static str, Vec<u8>, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = listener.local_addr().expect("address");
        let mut answers = Answers::new();
        for (name, config, layer) in images {
            let describe = |kind: &str, bytes: &[u8]| {
                serde_json::json!({
                    "mediaType": format!("application/vnd.oci.image.{kind}"),
                    "digest": digest(bytes), "size": bytes.len(),
                })
            };
            let manifest = serde_json::json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": describe("config.v1+json", &config),
                "layers": [describe("layer.v1.tar+gzip", &layer)],
            });
            let pace = if name.starts_with("drip") { "drip" } else { "" };
            answers.insert(digest(&config), ("", config));
            answers.insert(digest(&layer), (pace, layer));
            answers.insert(name.to_owned(), ("", manifest.to_string().into_bytes()));
        }
        let answers = Arc::new(answers);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answers = Arc::clone(&answers);
                // The client may have closed the connection.
                std::thread::spawn(move || serve(&stream, &answers).ok());
            }
        });
        Self { address }
    }
}

fn serve(mut stream: &TcpStream, answers: &Answers) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    let mut parts = path.split('/').rev();
    let (last, kind, name) = (parts.next(), parts.next(), parts.next());
    let key = if kind == Some("manifests") {
        name
    } else {
        last
    };
    let Some((pace, body)) = answers.get(key.unwrap_or_default()) else {
        return stream
            .write_all(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\
         Content-Type: application/vnd.oci.image.manifest.v1+json\r\n\r\n",
        body.len()
    )?;
    if *pace != "drip" {
        return stream.write_all(body);
    }
    for drop in body.chunks(DRIP_BYTES) {
        stream.write_all(drop)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run sha256sum");
    let mut input = child.stdin.take().expect("its input");
    input.write_all(bytes).expect("write to it");
    drop(input);
    let output = child.wait_with_output().expect("its output").stdout;
    format!("sha256:{}", String::from_utf8_lossy(&output[..64]))
}

fn configuration(archive_digest: &str, config: &serde_json::Value) -> Vec<u8> {
    let document = serde_json::json!({
        "os": "linux", "architecture": "amd64", "config": config,
        "rootfs": { "type": "layers", "diff_ids": [archive_digest] },
    });
    document.to_string().into_bytes()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).expect("compress");
    gzip.finish().expect("compress")
}

/// A tar header. `kind` is its type flag.
fn header(name: &str, kind: u8, size: u64, link: &str) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, name);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    put(148, "        ");
    put(157, link);
    put(257, "ustar\x0000");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

/// One file of zeroes, in as many members of gzip as it has pieces of 16 MiB. They shrink to a thousandth.
fn bomb(mib: usize) -> Vec<u8> {
    let mut piece = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    piece.write_all(&vec![0; 16 * MIB]).expect("compress");
    let piece = piece.finish().expect("compress");
    let mut packed = gzip(&header("zeroes", b'0', (mib * MIB) as u64, ""));
    for _ in 0..mib / 16 {
        packed.extend_from_slice(&piece);
    }
    packed
}

fn hard_links(count: usize) -> Vec<u8> {
    let mut archive = header("d/file", b'0', 0, "").to_vec();
    for number in 0..count {
        archive.extend(header(&format!("d/{number:07}"), b'1', 0, "d/file"));
    }
    gzip(&archive)
}

pub fn hostile_images() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let empty = [0; 1024];
    let plain = |config| configuration(&digest(&empty), &config);
    let variables: Vec<_> = (0..200_000).map(|number| format!("V{number}=x")).collect();
    let nothing = digest(b"what the layer does not unpack to");
    let other = || configuration(&nothing, &serde_json::json!({}));
    vec![
        (
            "variables",
            plain(serde_json::json!({ "Env": variables })),
            gzip(&empty),
        ),
        (
            "user",
            plain(serde_json::json!({ "User": "u".repeat(7 * MIB) })),
            gzip(&empty),
        ),
        ("bomb", other(), bomb(4096)),
        ("links", other(), hard_links(200_000)),
        ("drip", other(), vec![6; MIB]),
        ("drip2", other(), vec![7; MIB]),
        ("drip3", other(), vec![8; MIB]),
    ]
}

/// Pulls of all hostile images, at once.
pub struct Pulls(Vec<JoinHandle<(&'static str, Result<String, Status>)>>);

impl Pulls {
    /// Begins with the slow ones, which take no place from anybody.
    pub fn start(daemon: &Daemon, hostile: &Hostile) -> Self {
        let names = [
            "drip",
            "drip2",
            "drip3",
            "variables",
            "user",
            "bomb",
            "links",
        ];
        Self(
            names
                .map(|name| {
                    let reference = format!("{}/{name}:1", hostile.address);
                    let socket = daemon.socket();
                    tokio::spawn(async move {
                        let logs = socket.parent().expect("a directory").to_owned();
                        let client = Client::connect(&socket, &logs).await;
                        (name, client.expect("connect").pull(&reference).await)
                    })
                })
                .into(),
        )
    }

    /// Waits until all of them were refused. Returns the errors by the images' names.
    pub async fn refused(self) -> Vec<(&'static str, Status)> {
        let mut errors = Vec::new();
        for pull in self.0 {
            let (name, result) = pull.await.expect("pull");
            errors.push((name, result.expect_err(name)));
        }
        errors
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_images_fail_and_the_others_are_answered_all_the_while() {
    let hostile = Hostile::start(hostile_images());
    let daemon = Daemon::start_with(Networking::Loopback, &hostile.config()).await;
    let idle = Watch::over(&daemon, None).await;
    tokio::time::sleep(IDLE).await;
    let idle = idle.end().await;
    let watch = Watch::over(&daemon, None).await;
    let pulls = Pulls::start(&daemon, &hostile);
    let busybox = Registry::shared().image("test/busybox");
    let mut client = daemon.client().await;
    client.pull(&busybox).await.expect("pull busybox");
    for (name, error) in pulls.refused().await {
        let code = match name {
            "links" => Code::DataLoss,
            _ if name.starts_with("drip") => Code::Unknown,
            _ => Code::InvalidArgument,
        };
        assert_eq!(error.code(), code, "{name}: {error:?}");
        assert!(error.message().len() < 4096, "{name}");
    }
    let seen = watch.end().await;
    let mut table = Table::new("another client beside hostile images");
    table.row("idle", idle.is_bounded(), idle);
    table.row("hostile images and registry", seen.is_bounded(), seen);
    table.finish();
    let request = ListImagesRequest { filter: None };
    let listed = client.images.list_images(request).await.expect("list");
    assert_eq!(listed.into_inner().images.len(), 1);
}
