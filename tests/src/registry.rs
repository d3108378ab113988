// SPDX-License-Identifier: Apache-2.0
//! Debian's `docker-registry` on loopback with the test images: one for the whole test run.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::wait::try_until_blocking;

/// A running registry. Its process ends with the test process that started it.
#[derive(Debug)]
pub struct Registry {
    pub address: SocketAddr,
    pub storage: PathBuf,
    _directory: tempfile::TempDir,
}

static REGISTRY: OnceLock<Registry> = OnceLock::new();

impl Registry {
    /// Returns the registry of this test run. The first call starts and fills it.
    pub fn shared() -> &'static Self {
        REGISTRY.get_or_init(Self::start)
    }

    /// Returns the reference of an image in this registry: `image("test/busybox")`.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Builds and pushes an image that only a few tests need.
    pub fn push(&self, name: &str) {
        push_images(self.address, &["--only", name]);
    }

    fn start() -> Self {
        let directory = tempfile::tempdir().expect("directory for the registry");
        let storage = directory.path().join("storage");
        let address = free_address();
        let config = directory.path().join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: \
                 {{rootdirectory: {}}}\n  cache: {{}}\nhttp: {{addr: '{address}'}}\n",
                storage.display()
            ),
        )
        .expect("write the registry's configuration");
        spawn(config);
        until_it_answers(address);
        push_images(address, &[]);
        Self {
            address,
            storage,
            _directory: directory,
        }
    }
}

/// Starts a registry that ends with this process, even if that is killed. `--pdeathsig` means the death of the thread
/// that started the process, so this thread waits for the registry.
fn spawn(config: PathBuf) {
    std::thread::spawn(move || {
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "docker-registry", "serve"])
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("run docker-registry (apt-get install docker-registry)")
    });
}

/// Returns a loopback address on which nothing listens at this moment.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address")
}

fn until_it_answers(address: SocketAddr) {
    let what = format!("docker-registry answers on {address}");
    let answers = try_until_blocking(&what, Duration::from_secs(60), || {
        TcpStream::connect(address).map_err(|error| error.to_string())
    });
    answers.unwrap_or_else(|late| panic!("{late}"));
}

fn push_images(address: SocketAddr, arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/make_images.py");
    let output = Command::new("python3")
        .arg(script)
        .arg("--registry")
        .arg(format!("http://{address}"))
        .args(arguments)
        .output()
        .expect("run make_images.py");
    assert!(
        output.status.success(),
        "make_images.py: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
