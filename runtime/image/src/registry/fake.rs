// SPDX-License-Identifier: Apache-2.0
//! For tests: an HTTP server that answers as a closure says, and an image for it to serve.
//!
//! There is one thread and one request per connection. Nothing is checked, because tests let it misbehave on purpose.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::config::{Config, HostConfig};
use crate::digest::Digest;

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A client's request.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// By name in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// How a body ends before its time.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    CloseAfter(usize),
    SilenceAfter(usize),
    Drip(Duration),
    DripHead(Duration),
}

#[derive(Clone, Debug)]
pub struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    fault: Fault,
    without_body: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            fault: Fault::None,
            without_body: false,
        }
    }

    pub fn with(mut self, header: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((header, value.into()));
        self
    }

    pub fn redirect(to: impl Into<String>) -> Self {
        Self::new(307, "").with("Location", to)
    }

    pub fn changed(mut self, change: impl Fn(&[u8]) -> Vec<u8>) -> Self {
        self.body = change(&self.body);
        self
    }

    /// Demands authentication.
    pub fn challenge(challenge: impl Into<String>) -> Self {
        Self::new(401, "").with("WWW-Authenticate", challenge)
    }

    /// The rest of the body, as a server with support for ranges answers.
    pub fn ranged(mut self, request: &Request) -> Self {
        let range = request.header("range");
        let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        if let Some(from) = from {
            let from: usize = from.parse().unwrap();
            let (total, last) = (self.body.len(), self.body.len() - 1);
            self.status = 206;
            self.body.drain(..from);
            self = self.with("Content-Range", format!("bytes {from}-{last}/{total}"));
        }
        self
    }

    pub fn closing_after(mut self, bytes: usize) -> Self {
        self.fault = Fault::CloseAfter(bytes);
        self
    }

    /// After `bytes` sends nothing more, but keeps the connection open.
    pub fn silent_after(mut self, bytes: usize) -> Self {
        self.fault = Fault::SilenceAfter(bytes);
        self
    }

    /// Sends one byte per `pause`.
    pub fn dripping(mut self, pause: Duration) -> Self {
        self.fault = Fault::Drip(pause);
        self
    }

    /// Sends one byte of the head per `pause`.
    pub fn dripping_head(mut self, pause: Duration) -> Self {
        self.fault = Fault::DripHead(pause);
        self
    }

    /// This answer, or `other` if this is that there is nothing.
    pub fn or(self, other: Self) -> Self {
        if self.status == 404 { other } else { self }
    }

    fn send(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        let (status, length) = (self.status, self.body.len());
        let mut head = format!(
            "HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\nConnection: close\r\n"
        );
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        if let Fault::DripHead(pause) = self.fault {
            drip(stream, pause, head.as_bytes())?;
        } else {
            stream.write_all(head.as_bytes())?;
        }
        if self.without_body {
            return Ok(());
        }
        match self.fault {
            Fault::None | Fault::DripHead(_) => stream.write_all(&self.body),
            Fault::CloseAfter(bytes) => stream.write_all(&self.body[..bytes]),
            Fault::SilenceAfter(bytes) => {
                stream.write_all(&self.body[..bytes])?;
                // Wait until the client closes the connection.
                stream.read(&mut [0]).map(|_| ())
            }
            Fault::Drip(pause) => drip(stream, pause, &self.body),
        }
    }
}

fn drip(mut stream: &TcpStream, pause: Duration, bytes: &[u8]) -> std::io::Result<()> {
    bytes.iter().try_for_each(|byte| {
        std::thread::sleep(pause);
        stream.write_all(&[*byte])
    })
}

/// The server. Its threads run until the process ends.
pub struct Fake {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Fake {
    /// `answer` is called for one request at a time.
    pub fn start(answer: impl FnMut(&Request) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let fake = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
        };
        let requests = Arc::clone(&fake.requests);
        let answer = Arc::new(Mutex::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (requests, answer) = (Arc::clone(&requests), Arc::clone(&answer));
                std::thread::spawn(move || {
                    let Some(request) = read_request(&stream) else {
                        return;
                    };
                    requests.lock().unwrap().push(request.clone());
                    let mut reply = answer.lock().unwrap()(&request);
                    reply.without_body = request.method == "HEAD";
                    // The client may have closed the connection.
                    let _ = reply.send(&stream);
                });
            }
        });
        fake
    }

    /// The server's host as it appears in a reference.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How many requests had `part` in their path.
    pub fn count(&self, part: &str) -> usize {
        let requests = self.requests();
        requests.iter().filter(|r| r.path.contains(part)).count()
    }

    /// How many requests with this method had `part` in their path.
    pub fn count_of(&self, method: &str, part: &str) -> usize {
        let requests = self.requests();
        let is_it = |r: &&Request| r.method == method && r.path.contains(part);
        requests.iter().filter(is_it).count()
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut lines = reader.by_ref().lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let lines = lines.take_while(|line| !line.is_empty());
    let pair = |line: String| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    let headers: BTreeMap<_, _> = lines.filter_map(pair).collect();
    let length = headers.get("content-length");
    let length = length.map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request {
        method,
        path,
        headers,
        body: String::from_utf8(body).unwrap(),
    })
}

/// A configuration that uses plain HTTP for `hosts`.
pub fn plain_http(hosts: &[&str]) -> Config {
    let plain = HostConfig {
        plain_http: true,
        ..HostConfig::default()
    };
    let registries = hosts.iter().map(|host| ((*host).to_owned(), plain.clone()));
    Config {
        registries: registries.collect(),
        ..Config::default()
    }
}

/// An image as a registry stores it.
#[derive(Clone, Debug)]
pub struct FakeImage {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    pub layers: Vec<Vec<u8>>,
}

impl FakeImage {
    /// One layer with one file for each of `files`. With another `command`, the same layers give another image.
    pub fn new(command: &str, files: &[&[u8]]) -> Self {
        let archives: Vec<_> = files.iter().map(|content| archive(content)).collect();
        let diff_ids: Vec<_> = archives.iter().map(|archive| Digest::of(archive)).collect();
        let config = serde_json::json!({
            "os": "linux", "architecture": "amd64", "config": { "Cmd": [command] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let layers = archives.iter().map(|archive| gzip(archive)).collect();
        Self::of_parts(config.to_string().into_bytes(), layers)
    }

    /// An image with the manifest for these parts.
    pub fn of_parts(config: Vec<u8>, layers: Vec<Vec<u8>>) -> Self {
        let descriptor = |media_type: &str, bytes: &Vec<u8>| {
            serde_json::json!({
                "mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len(),
            })
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": descriptor(CONFIG_TYPE, &config),
            "layers": layers.iter().map(|layer| descriptor(LAYER_TYPE, layer)).collect::<Vec<_>>(),
        });
        Self {
            manifest: manifest.to_string().into_bytes(),
            config,
            layers,
        }
    }

    /// The image's id.
    pub fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    pub fn layer_digest(&self, index: usize) -> String {
        Digest::of(&self.layers[index]).to_string()
    }

    /// The answer of a registry that has this image under any tag.
    pub fn serve(&self, request: &Request) -> Reply {
        if request.path.contains("/manifests/") {
            return Reply::new(200, self.manifest.clone()).with("Content-Type", MANIFEST_TYPE);
        }
        let mut blobs = self.layers.iter().chain([&self.config]);
        let blob = blobs.find(|blob| request.path.ends_with(Digest::of(blob).as_str()));
        match blob {
            Some(blob) => Reply::new(200, blob.clone()).ranged(request),
            None => Reply::new(404, r#"{"errors":[{"message":"blob unknown"}]}"#),
        }
    }
}

/// Bytes that cannot be compressed.
pub fn noise(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn archive(content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, "file", content).unwrap();
    archive.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}
