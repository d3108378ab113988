// SPDX-License-Identifier: Apache-2.0
//! A containerd with runc and its own directories, as the delegate of a daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::client::Client;
use crate::daemon::BRIDGE_CONFLIST;
use crate::registry::Registry;
use crate::wait::Wait;

/// Set by `scripts/test`: directories with containerd, its shim and runc, the oldest first, separated by colons.
const PROGRAMS_VARIABLE: &str = "BULKHEAD_CONTAINERDS";

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// 1.6, Debian 12's. It has no events, no metrics of pods and no streamed lists.
    Old,
    /// 2.x, of the newest Debian.
    New,
}

/// A containerd. Its pods outlive it, as with systemd, until this value is dropped.
#[derive(Debug)]
pub struct Containerd {
    pub release: Release,
    directory: tempfile::TempDir,
    child: Option<Child>,
}

impl Release {
    pub const ALL: [Self; 2] = [Self::Old, Self::New];

    fn programs(self) -> PathBuf {
        let directories = std::env::var(PROGRAMS_VARIABLE)
            .unwrap_or_else(|_| panic!("{PROGRAMS_VARIABLE} is not set: run scripts/test"));
        let place = match self {
            Self::Old => 0,
            Self::New => 1,
        };
        let directory = directories.split(':').nth(place);
        directory.expect("two directories").into()
    }
}

impl Containerd {
    /// Starts a containerd, ready to serve. It has two handlers that do the same, `runc` and `second`.
    pub async fn start(release: Release) -> Self {
        fs::create_dir_all("/var/lib/bulkhead").expect("make /var/lib/bulkhead");
        let directory = tempfile::Builder::new()
            .prefix("containerd-")
            .tempdir_in("/var/lib/bulkhead")
            .expect("directory for containerd");
        let mut containerd = Self {
            release,
            directory,
            child: None,
        };
        containerd.write_config();
        containerd.spawn();
        containerd.serves().await;
        containerd
    }

    pub fn socket(&self) -> PathBuf {
        self.path("run/containerd.sock")
    }

    /// The lines of a daemon's configuration that make this containerd the delegate `runc`. `first` are keys that stand
    /// before all tables.
    pub fn config(&self, first: &str) -> String {
        let socket = self.socket();
        format!(
            "{first}\n[runtimes.runc]\ncri = \"unix://{}\"\n",
            socket.display()
        )
    }

    /// A client that does not go through the daemon. Pods log below `log_root`.
    pub async fn client(&self, log_root: &Path) -> Client {
        Client::connect(&self.socket(), log_root)
            .await
            .expect("connect to containerd")
    }

    /// Kills containerd with SIGKILL. Its pods live on.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill containerd");
            child.wait().expect("wait for containerd");
        }
    }

    /// Starts containerd again after [`Self::kill`], ready to serve.
    pub async fn start_again(&mut self) {
        self.spawn();
        self.serves().await;
    }

    /// Stops containerd with SIGSTOP: connections to it stay open and nothing answers.
    pub fn pause(&self) {
        self.signal("-STOP");
    }

    pub fn resume(&self) {
        self.signal("-CONT");
    }

    /// Returns what containerd has printed.
    pub fn output(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().expect("a containerd that runs").id();
        let sent = Command::new("kill")
            .args([signal, &pid.to_string()])
            .status();
        assert!(sent.expect("run kill").success(), "kill {signal}");
    }

    fn write_config(&self) {
        for name in ["cni", "run"] {
            fs::create_dir_all(self.path(name)).expect("containerd's directories");
        }
        fs::write(self.path("cni/10-bridge.conflist"), BRIDGE_CONFLIST).expect("CNI configuration");
        let runc = self.release.programs().join("runc");
        let pause = Registry::shared().image("test/pause:latest");
        let (version, runtime, cni_directories, sandbox) = match self.release {
            Release::Old => (
                2,
                "io.containerd.grpc.v1.cri",
                "bin_dir = \"/usr/lib/cni\"",
                format!("[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{pause}\""),
            ),
            Release::New => (
                3,
                "io.containerd.cri.v1.runtime",
                "bin_dirs = [\"/usr/lib/cni\"]",
                format!(
                    "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{pause}\"\n\
                     [plugins.\"io.containerd.grpc.v1.cri\"]"
                ),
            ),
        };
        let handler = |name: &str| {
            format!(
                "[plugins.\"{runtime}\".containerd.runtimes.{name}]\nruntime_type = \"io.containerd.runc.v2\"\n\
                 [plugins.\"{runtime}\".containerd.runtimes.{name}.options]\nBinaryName = \"{runc}\"\n",
                runc = runc.display()
            )
        };
        let text = format!(
            "version = {version}\nroot = \"{root}\"\nstate = \"{state}\"\n[grpc]\naddress = \"{socket}\"\n{sandbox}\n\
             stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
             [plugins.\"{runtime}\".cni]\n{cni_directories}\nconf_dir = \"{cni}\"\n{}{}",
            handler("runc"),
            handler("second"),
            root = self.path("root").display(),
            state = self.path("state").display(),
            socket = self.socket().display(),
            cni = self.path("cni").display(),
        );
        fs::write(self.path("config.toml"), text).expect("containerd's configuration");
    }

    fn spawn(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .expect("open containerd's log");
        let programs = self.release.programs();
        // containerd looks for its shim in PATH first, and this machine may have another one.
        let path = format!(
            "{}:{}",
            programs.display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let child = Command::new(programs.join("containerd"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second descriptor"))
            .stderr(log)
            .spawn()
            .expect("start containerd");
        self.child = Some(child);
    }

    /// Waits until CRI answers.
    async fn serves(&mut self) {
        let mut wait = Wait::until("containerd serves CRI");
        while !self.answers().await {
            let output = self.output();
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                panic!("containerd ended with {status}; it said:\n{output}");
            }
            wait.again(format!("it said:\n{output}")).await;
        }
    }

    async fn answers(&self) -> bool {
        let Ok(mut client) = Client::connect(&self.socket(), Path::new("/nowhere")).await else {
            return false;
        };
        let request = bulkhead_proto::cri::StatusRequest { verbose: false };
        client.runtime.status(request).await.is_ok()
    }

    /// Ends what a failed test left: shims, their containers, and mounts.
    fn clean_up(&self) {
        let directory = self.directory.path().display().to_string();
        let shims = processes(|process| {
            let line = fs::read(process.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&directory)
        });
        let containers = processes(|process| {
            let status = fs::read_to_string(process.join("status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            parent.is_some_and(|pid| shims.iter().any(|shim| shim == pid.trim()))
        });
        for pid in containers.iter().chain(&shims) {
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let mut points: Vec<_> = points
            .filter(|point| point.starts_with(&directory))
            .collect();
        points.reverse();
        for point in points {
            let _ = Command::new("umount").args(["-l", point]).status();
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<_> = output.lines().collect();
            let last = lines.len().saturating_sub(40);
            eprintln!("---- containerd said:\n{}", lines[last..].join("\n"));
        }
        self.kill();
        self.clean_up();
    }
}

/// The ids of processes that are chosen by their directory in /proc.
fn processes(chosen: impl Fn(&Path) -> bool) -> Vec<String> {
    let entries = fs::read_dir("/proc").expect("list /proc").flatten();
    let ids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    ids.filter(|id| id.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|id| chosen(&Path::new("/proc").join(id)))
        .collect()
}
