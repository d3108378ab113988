// SPDX-License-Identifier: Apache-2.0
//! A `bulkhead serve` for one test, with its own directories.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::census::Census;
use crate::client::Client;
use crate::faults::{self, Faults};
use crate::registry::Registry;
use crate::wait::until;

/// Where `scripts/build` puts the programs.
const PROGRAMS_VARIABLE: &str = "BULKHEAD_PROGRAMS";
/// Set by `scripts/kvm-host` on a host where KVM works.
const KVM_HOST_VARIABLE: &str = "BULKHEAD_KVM_HOST";

/// The network of a daemon's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Networking {
    /// A bridge and addresses, by Debian's plugins `bridge` and `host-local`.
    Bridge,
    /// No CNI configuration: loopback only.
    Loopback,
}

/// A daemon, its directories, and its configuration for a restart.
#[derive(Debug)]
pub struct Daemon {
    directory: tempfile::TempDir,
    child: Option<Child>,
    extra_config: String,
    /// Set for the daemon with points at which it can be killed or made to fail.
    faults: Option<Faults>,
}

impl Daemon {
    /// Starts a daemon with CNI's bridge, ready to serve.
    pub async fn start() -> Self {
        Self::start_with(Networking::Bridge, "").await
    }

    /// Starts a daemon with lines added to its configuration file.
    pub async fn start_with(networking: Networking, extra_config: &str) -> Self {
        let mut daemon = Self::prepare(extra_config);
        daemon.write_config(networking);
        daemon.spawn().await;
        daemon
    }

    /// Starts the daemon with points at which it can be killed or made to fail. Its VMs boot, unless the test says otherwise:
    /// a template is made in the background, and the points of that would be taken for a call's.
    pub async fn start_faulty(networking: Networking, extra_config: &str) -> (Self, Faults) {
        let mut daemon = Self::prepare(extra_config);
        let faults = Faults::new(daemon.path("faults"));
        daemon.faults = Some(faults.clone());
        daemon.write_config(networking);
        daemon.spawn().await;
        (daemon, faults)
    }

    fn prepare(extra_config: &str) -> Self {
        assert!(
            std::env::var_os(KVM_HOST_VARIABLE).is_some(),
            "end-to-end tests need a KVM host: run scripts/test, which finds or emulates one"
        );
        // /var/lib/bulkhead is a disk on an emulated host.
        std::fs::create_dir_all("/var/lib/bulkhead").expect("make /var/lib/bulkhead");
        let directory = tempfile::Builder::new()
            .prefix("e2e-")
            .tempdir_in("/var/lib/bulkhead")
            .expect("directory for a daemon");
        Self {
            directory,
            child: None,
            extra_config: extra_config.into(),
            faults: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("run/bulkhead.sock")
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.socket(), &self.path("logs"))
            .await
            .expect("connect to the daemon")
    }

    /// Takes a census of the host, with this daemon's pod directories.
    pub fn census(&self) -> Census {
        Census::take(&[&self.path("run/pods"), &self.path("state/pods")])
    }

    /// Writes a file of the CNI configuration. The first file by name is the network.
    pub fn configure_network(&self, name: &str, text: &str) {
        std::fs::write(self.path("cni").join(name), text).expect("CNI configuration");
    }

    /// Makes a CNI plugin from a shell script. A file that the script writes as "$0.name" is at `plugins/TYPE.name`.
    pub fn plugin(&self, name: &str, script: &str) {
        let path = self.path("plugins").join(name);
        std::fs::create_dir_all(self.path("plugins")).expect("directory of plugins");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write a plugin");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    }

    /// Kills the daemon with SIGKILL. Its pods live on.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill the daemon");
            child.wait().expect("wait for the daemon");
        }
    }

    /// Starts the daemon again on the same directories.
    pub async fn restart(&mut self) {
        self.kill();
        self.spawn().await;
    }

    /// Starts the daemon again. The error says why it has ended before it served.
    pub async fn try_restart(&mut self) -> Result<(), String> {
        self.kill();
        self.try_spawn().await
    }

    /// Whether the daemon has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// Starts the daemon again with other lines in its configuration file than [`Self::start_with`] has added.
    pub async fn restart_with(&mut self, networking: Networking, extra_config: &str) {
        self.kill();
        self.extra_config = extra_config.into();
        self.write_config(networking);
        self.spawn().await;
    }

    /// Returns what the daemon has printed.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    /// The daemon's process, as it can be seen from outside.
    pub fn process(&self) -> DaemonProcess {
        DaemonProcess(self.child.as_ref().expect("a daemon that runs").id())
    }

    /// Returns the daemon's process id, if it was started.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Returns how many descriptors the daemon holds.
    pub fn descriptors(&self) -> usize {
        self.process().descriptors()
    }

    /// Lowers the daemon's limit of descriptors.
    pub fn limit_descriptors(&self, most: usize) {
        let DaemonProcess(pid) = self.process();
        let set = Command::new("prlimit")
            .args([
                "--pid",
                &pid.to_string(),
                &format!("--nofile={most}:{most}"),
            ])
            .status();
        assert!(set.expect("run prlimit").success(), "prlimit");
    }

    /// Process ids of the VMMs of this daemon's pods.
    pub fn vmm_pids(&self) -> Vec<i32> {
        self.pids_of_role("run")
    }

    /// Process ids of the file servers of this daemon's pods.
    pub fn file_server_pids(&self) -> Vec<i32> {
        self.pids_of_role("share")
    }

    /// Processes of `bulkhead-vmm` with the subcommand `role`. Of a file server's two processes, the outer one; of a VMM's, of
    /// which the first one ends at once, the inner one.
    fn pids_of_role(&self, role: &str) -> Vec<i32> {
        let run = self.path("run").display().to_string();
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let directory = PathBuf::from(format!("/proc/{pid}"));
                let line = std::fs::read(directory.join("cmdline")).unwrap_or_default();
                let mut words = line.split(|&byte| byte == 0);
                words
                    .next()
                    .is_some_and(|program| program.ends_with(b"/bulkhead-vmm"))
                    && words.next() == Some(role.as_bytes())
                    && is_in_a_pid_namespace(&directory) == (role == "run")
                    && holds_file_below(&directory, &run)
            })
            .collect()
    }

    fn write_config(&self, networking: Networking) {
        let cni = self.path("cni");
        std::fs::create_dir_all(&cni).expect("CNI directory");
        if networking == Networking::Bridge {
            std::fs::write(cni.join("10-bridge.conflist"), BRIDGE_CONFLIST)
                .expect("CNI configuration");
        }
        let registry = Registry::shared().address;
        let mut text = String::new();
        write!(
            text,
            "socket = \"{run}/bulkhead.sock\"\nstate_dir = \"{state}\"\nrun_dir = \"{run}\"\n\
             cni.conf_dir = \"{cni}\"\ncni.bin_dirs = [\"{plugins}\", \"/usr/lib/cni\"]\ncni.cache_dir = \"{state}/cni\"\n\
             cni.plugin_timeout_seconds = 15\n\
             {timeout}{templates}{extra}\n\
             [registries.\"{registry}\"]\nplain_http = true\n",
            timeout = self.boot_timeout(),
            templates = self.templates(),
            run = self.path("run").display(),
            state = self.path("state").display(),
            cni = cni.display(),
            plugins = self.path("plugins").display(),
            extra = self.extra_config,
        )
        .expect("format the configuration");
        std::fs::write(self.path("config.toml"), text).expect("write the configuration");
    }

    /// A boot timeout above the default, for slow hosts, unless the test sets one.
    fn boot_timeout(&self) -> &'static str {
        if self.extra_config.contains("boot_timeout_seconds") {
            return "";
        }
        "sandbox.boot_timeout_seconds = 120\n"
    }

    /// No templates for a daemon with points, unless the test sets how much they may take.
    fn templates(&self) -> &'static str {
        if self.faults.is_none() || self.extra_config.contains("templates_mib") {
            return "";
        }
        "sandbox.templates_mib = 0\n"
    }

    async fn spawn(&mut self) {
        let spawned = self.try_spawn().await;
        spawned.unwrap_or_else(|why| panic!("{why}"));
    }

    async fn try_spawn(&mut self) -> Result<(), String> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("daemon.log"))
            .expect("open the daemon's log");
        let (name, variable) = match &self.faults {
            None => ("bulkhead", None),
            Some(faults) => (
                faults::PROGRAM,
                Some((faults::VARIABLE, faults.directory())),
            ),
        };
        let child = Command::new(program(name))
            .envs(variable)
            .args(["serve", "--config"])
            .arg(self.path("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start bulkhead serve");
        self.child = Some(child);
        until("the daemon answers", async || {
            let Err(error) = tokio::net::UnixStream::connect(self.socket()).await else {
                return Ok(Ok(()));
            };
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                let said = self.output();
                return Ok(Err(format!(
                    "the daemon ended with {status}; it said:\n{said}"
                )));
            }
            Err(format!("{error}; it said:\n{}", self.output()))
        })
        .await
    }
}

/// The process of a daemon.
#[derive(Clone, Copy, Debug)]
pub struct DaemonProcess(u32);

impl DaemonProcess {
    /// How many descriptors it holds.
    pub fn descriptors(self) -> usize {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.0));
        descriptors.expect("the daemon's descriptors").count()
    }

    /// How much memory it has in use.
    pub fn memory_bytes(self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0));
        let status = status.expect("the daemon's status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.parse::<u64>().ok()).expect("VmRSS") << 10
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- the daemon said:\n{}", self.output());
        }
        for pid in self.vmm_pids().into_iter().chain(self.file_server_pids()) {
            // Only a failed test leaves processes behind. The next test must not see them.
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        self.kill();
    }
}

/// The path of one of our programs in the directory that `scripts/build` made.
pub fn program(name: &str) -> PathBuf {
    let directory = std::env::var_os(PROGRAMS_VARIABLE)
        .unwrap_or_else(|| panic!("{PROGRAMS_VARIABLE} is not set: run scripts/test"));
    Path::new(&directory).join(name)
}

/// Whether a process is in a PID namespace below ours: then `NSpid` lists more than one number.
fn is_in_a_pid_namespace(process: &Path) -> bool {
    let status = std::fs::read_to_string(process.join("status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.is_some_and(|numbers| numbers.split_whitespace().count() > 1)
}

fn holds_file_below(process: &Path, prefix: &str) -> bool {
    let Ok(descriptors) = std::fs::read_dir(process.join("fd")) else {
        return false;
    };
    descriptors
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|target| target.to_string_lossy().starts_with(prefix))
}

/// A bridge whose addresses are given out for all daemons and delegates of this machine.
pub const BRIDGE_CONFLIST: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "bulkhead-tests",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "bulkhead0",
      "isGateway": true,
      "ipMasq": false,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/bulkhead-tests-ipam",
        "ranges": [[{ "subnet": "10.88.0.0/16" }]],
        "routes": [{ "dst": "0.0.0.0/0" }]
      }
    }
  ]
}
"#;
