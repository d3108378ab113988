//! Debian's `docker-registry`: a registry that is not ours, with images that the test pushes.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use tempfile::TempDir;

use crate::digest::Digest;
use crate::registry::fake::{FakeImage, MANIFEST_TYPE};

const START_TRIES: usize = 5;
const START_TIMEOUT: Duration = Duration::from_secs(20);
pub const USER: &str = "user";
pub const PASSWORD: &str = "open-sesame";
/// [`PASSWORD`], hashed by bcrypt.
const HTPASSWD: &str = "user:$2y$05$abcdefghijklmnopqrstuutXu9KzOt.1yBoZUeFWoT/914/JfszCO\n";

/// Who may use the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    All,
    Password,
}

/// A registry process. It ends when this is dropped, also when a test panics.
pub struct DebianRegistry {
    child: Child,
    host: String,
    _directory: TempDir,
}

impl DebianRegistry {
    pub fn start(access: Access) -> Self {
        for _ in 0..START_TRIES {
            if let Some(registry) = Self::try_start(access) {
                return registry;
            }
        }
        panic!("docker-registry ended {START_TRIES} times right after its start");
    }

    /// `None` if the process ended at once, because another process may have taken the port.
    fn try_start(access: Access) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let htpasswd = directory.path().join("htpasswd");
        std::fs::write(&htpasswd, HTPASSWD).unwrap();
        let mut config = format!(
            "version: 0.1\nlog: {{ level: error }}\n\
             storage: {{ filesystem: {{ rootdirectory: {}/data }} }}\nhttp: {{ addr: {host} }}\n",
            directory.path().display()
        );
        if access == Access::Password {
            config += &format!(
                "auth: {{ htpasswd: {{ realm: test, path: {} }} }}\n",
                htpasswd.display()
            );
        }
        let path = directory.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        drop(listener);
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("docker-registry (apt-get install docker-registry): {e}"));
        let registry = Self {
            child,
            host,
            _directory: directory,
        };
        registry.wait_until_it_listens()
    }

    fn wait_until_it_listens(mut self) -> Option<Self> {
        let start = Instant::now();
        while start.elapsed() < START_TIMEOUT {
            if self.child.try_wait().unwrap().is_some() {
                return None;
            }
            if TcpStream::connect(&self.host).is_ok() {
                return Some(self);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("docker-registry does not listen after {START_TIMEOUT:?}");
    }

    /// The registry's host as it appears in a reference.
    pub fn host(&self) -> String {
        self.host.clone()
    }

    /// Pushes the image as `app:tag`.
    pub async fn push(&self, image: &FakeImage, tag: &str) {
        for blob in image.layers.iter().chain([&image.config]) {
            let url = format!("http://{}/v2/app/blobs/uploads/", self.host);
            let begun = self.request(Method::POST, &url).send().await.unwrap();
            assert_eq!(begun.status(), StatusCode::ACCEPTED);
            // The URL has a query already.
            let location = begun.headers()["location"].to_str().unwrap();
            let url = format!("{location}&digest={}", Digest::of(blob));
            let upload = self.request(Method::PUT, &url);
            let done = upload.body(blob.clone()).send().await.unwrap();
            assert_eq!(done.status(), StatusCode::CREATED);
        }
        let url = format!("http://{}/v2/app/manifests/{tag}", self.host);
        let manifest = self.request(Method::PUT, &url);
        let manifest = manifest.header("content-type", MANIFEST_TYPE);
        let done = manifest.body(image.manifest.clone()).send().await.unwrap();
        assert_eq!(done.status(), StatusCode::CREATED);
    }

    fn request(&self, method: Method, url: &str) -> RequestBuilder {
        Client::new()
            .request(method, url)
            .basic_auth(USER, Some(PASSWORD))
    }
}

impl Drop for DebianRegistry {
    fn drop(&mut self) {
        // The process may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
