// SPDX-License-Identifier: Apache-2.0
//! Debian's `docker-registry` on loopback with the test images: one for the whole test run.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::wait::{PATIENCE, try_until_blocking};

/// A directory that keeps the filled registry for later runs on this host. To build and push the images takes half a
/// minute on an emulated host. Without it, each run fills its own registry.
const KEPT_VARIABLE: &str = "BULKHEAD_KEPT_REGISTRY";

/// The storage of a registry that `scripts/workloads` has filled. It is served as it is, read-only, in place of one with
/// the usual images.
const FILLED_VARIABLE: &str = "BULKHEAD_FILLED_REGISTRY";
/// What a registry's configuration has beside its storage if it must not write there.
const READ_ONLY: &str = "\n  maintenance: {readonly: {enabled: true}}";

/// A running registry. Its process ends with the test process that started it.
#[derive(Debug)]
pub struct Registry {
    pub address: SocketAddr,
    pub storage: PathBuf,
    _directory: tempfile::TempDir,
}

/// The user of a private registry.
pub const USERNAME: &str = "someone";
pub const PASSWORD: &str = "registry-password";
/// bcrypt's hash of [`PASSWORD`].
const PASSWORD_HASH: &str = "$2b$04$ZplMVg3bI/0uM480wrdCSebztF0CfrdNU05Vyg0c.UwWgtNaQpYVa";

static REGISTRY: OnceLock<Registry> = OnceLock::new();

impl Registry {
    /// Returns the registry of this test run. The first call starts and fills it.
    pub fn shared() -> &'static Self {
        REGISTRY.get_or_init(|| {
            let directory = tempfile::tempdir().expect("directory for the registry");
            if let Some(filled) = std::env::var_os(FILLED_VARIABLE) {
                return Self::start(directory, filled.into(), READ_ONLY, "");
            }
            let storage = directory.path().join("storage");
            let kept = std::env::var_os(KEPT_VARIABLE).map(|kept| Path::new(&kept).join("storage"));
            let kept_before = kept.as_ref().filter(|kept| kept.exists());
            if let Some(kept) = kept_before {
                copy(kept, &storage);
            }
            let registry = Self::start(directory, storage, "", "");
            if kept_before.is_none() {
                push_images(registry.address, &[]);
                if let Some(kept) = &kept {
                    keep(&registry.storage, kept);
                }
            }
            registry
        })
    }

    /// Returns the reference of an image in this registry: `image("test/busybox")`.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Builds and pushes an image that only a few tests need.
    pub fn push(&self, name: &str) {
        push_images(self.address, &["--only", name]);
    }

    /// Starts a registry with the same images that serves only [`USERNAME`] with [`PASSWORD`].
    pub fn private(&self) -> Self {
        let directory = tempfile::tempdir().expect("directory for the registry");
        let users = directory.path().join("users");
        std::fs::write(&users, format!("{USERNAME}:{PASSWORD_HASH}\n")).expect("write the users");
        let auth = format!(
            "auth: {{htpasswd: {{realm: tests, path: {}}}}}\n",
            users.display()
        );
        Self::start(directory, self.storage.clone(), "", &auth)
    }

    /// Starts a registry; `of_storage` and `more` are added to its configuration.
    fn start(directory: tempfile::TempDir, storage: PathBuf, of_storage: &str, more: &str) -> Self {
        let address = free_address();
        let config = directory.path().join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: \
                 {{rootdirectory: {}}}\n  cache: {{}}{of_storage}\nhttp: {{addr: '{address}'}}\n{more}",
                storage.display()
            ),
        )
        .expect("write the registry's configuration");
        spawn(config);
        until_it_answers(address);
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
    let answers = try_until_blocking(&what, PATIENCE, || {
        TcpStream::connect(address).map_err(|error| error.to_string())
    });
    answers.unwrap_or_else(|late| panic!("{late}"));
}

/// A run that is killed meanwhile keeps nothing.
fn keep(storage: &Path, kept: &Path) {
    let unfinished = kept.with_extension(std::process::id().to_string());
    copy(storage, &unfinished);
    std::fs::rename(&unfinished, kept).expect("keep the registry");
}

/// A copy, because tests may change what is in their registry.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(
        status.expect("run cp").success(),
        "copy the registry from {} to {}",
        from.display(),
        to.display()
    );
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
