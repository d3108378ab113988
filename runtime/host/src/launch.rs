// SPDX-License-Identifier: Apache-2.0
//! From a directory to a VM whose agent answers, or back to one that lives already.
//!
//! A VMM is started in two steps. [`Launcher::spawn`] makes the process, which waits for its configuration; the
//! caller writes down its identity; [`Starting::boot`] gives it the configuration and waits for the agent. A
//! daemon that dies in between leaves a VMM that reads an end of file and ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_guest::connect;
use bulkhead_guest::text::bounded;
use bulkhead_proto::agent::{READY_PORT, Ready};
use bulkhead_vmm::config::{ImageDiskConfig, MacAddress, NetConfig, RunAs, VmConfig, VsockConfig};
use command_fds::{CommandFdExt, FdMapping};
use tokio::net::UnixListener;
use tokio::time::Instant;

use crate::files::Files;
use crate::guest::Guest;
use crate::patience::{Limits, Scheduled, Spent, Verdict, judge};
use crate::process::{Identity, VmmProcess};

/// Where the TAP's descriptor is in the VMM.
const TAP_FD: i32 = 3;
/// Every guest has the same address: the vsock device is in the VMM, and no two guests share one.
const GUEST_CID: u32 = 3;
/// How many times longer than on a CPU of its own a boot may take: 60 s become kubelet's four minutes.
const STARVED: u32 = 4;
/// The longest `Ready` message.
const READY_BYTES: u32 = 4096;

/// An error on the way to a running guest. A failed boot says at which stage, and shows the console.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("prepare the VM's files in {path}")]
    Files { path: PathBuf, source: io::Error },
    #[error("start {program}")]
    Spawn { program: PathBuf, source: io::Error },
    #[error("hand the VM's descriptors over: {0}")]
    Descriptors(String),
    #[error("give the VMM its configuration")]
    Configure(#[source] io::Error),
    #[error("the VM ended while {stage}: {obituary}{console}")]
    Ended {
        stage: &'static str,
        obituary: String,
        console: String,
    },
    #[error("the guest was not ready {spent}, while {stage}; {limit}{console}")]
    Timeout {
        stage: &'static str,
        spent: Spent,
        limit: String,
        console: String,
    },
    #[error("the agent's first words make no sense")]
    Ready(#[source] io::Error),
    #[error("look for the VMM process {pid} of an earlier daemon")]
    Adopt { pid: i32, source: io::Error },
}

/// What all VMs have in common.
#[derive(Clone, Debug)]
pub struct Launcher {
    pub program: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub extra_cmdline: String,
    pub ready_timeout: Duration,
    /// Who the VMM becomes: user and group.
    pub run_as: Option<(u32, u32)>,
}

/// What is particular about one VM.
#[derive(Debug)]
pub struct Machine {
    /// All that it can have, and those that start.
    pub vcpus: u8,
    pub boot_vcpus: u8,
    /// At the boot, and at most.
    pub memory_mib: u32,
    pub memory_max_mib: u32,
    pub scratch: PathBuf,
    pub net: Option<Net>,
}

#[derive(Debug)]
pub struct Net {
    pub tap: OwnedFd,
    pub mac: [u8; 6],
    pub mtu: u16,
}

/// A VMM that waits for its configuration. Dropped without a boot, it ends.
#[derive(Debug)]
pub struct Starting {
    process: Arc<VmmProcess>,
    config: VmConfig,
    input: ChildStdin,
    ready: UnixListener,
    files: Files,
    timeout: Duration,
}

impl Launcher {
    /// Starts the process of a VM with its files in `files`, a directory that exists.
    pub fn spawn(&self, files: Files, machine: Machine) -> Result<Starting, LaunchError> {
        let config = self.config(&files, &machine);
        let prepared = self.prepare(&files);
        let (ready, log) = prepared.map_err(|source| LaunchError::Files {
            path: files.directory().to_owned(),
            source,
        })?;
        let failed = |source| LaunchError::Spawn {
            program: self.program.clone(),
            source,
        };
        let errors = log.try_clone().map_err(failed)?;
        let mut command = Command::new(&self.program);
        command
            .arg("run")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(errors)
            // A signal to the daemon's group, as Ctrl-C is, does not reach it.
            .process_group(0);
        let taps = machine.net.map(|net| FdMapping {
            parent_fd: net.tap,
            child_fd: TAP_FD,
        });
        command
            .fd_mappings(taps.into_iter().collect())
            .map_err(|e| LaunchError::Descriptors(e.to_string()))?;
        let mut child = command.spawn().map_err(failed)?;
        let input = child
            .stdin
            .take()
            .ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let process = VmmProcess::of_child(child).map_err(failed)?;
        if let Err(e) = process.set_oom_score_adj(0) {
            tracing::debug!("oom_score_adj of the VMM: {e}");
        }
        Ok(Starting {
            process: Arc::new(process),
            config,
            input,
            ready,
            files,
            timeout: self.ready_timeout,
        })
    }

    /// How long a boot may take in all, if who waits for it has no limit: others may have most of the CPU.
    pub fn longest(&self) -> Duration {
        self.ready_timeout.saturating_mul(STARVED)
    }

    /// Finds the VM that an earlier daemon started; `None` if it is gone.
    pub fn adopt(&self, files: Files, identity: Identity) -> Result<Option<Guest>, LaunchError> {
        let found = VmmProcess::adopt(identity).map_err(|source| LaunchError::Adopt {
            pid: identity.pid,
            source,
        })?;
        Ok(found.map(|process| Guest::new(process.into(), files)))
    }

    fn config(&self, files: &Files, machine: &Machine) -> VmConfig {
        VmConfig {
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            extra_cmdline: self.extra_cmdline.clone(),
            vcpus: machine.vcpus,
            boot_vcpus: machine.boot_vcpus,
            memory_mib: machine.memory_mib,
            memory_max_mib: machine.memory_max_mib,
            memory_file: None,
            console_log: files.console(),
            control_socket: files.control(),
            exit_report: files.exit_report(),
            vsock: VsockConfig {
                guest_cid: GUEST_CID,
                socket: files.vsock(),
            },
            net: machine.net.as_ref().map(|net| NetConfig {
                tap_fd: TAP_FD,
                mac: MacAddress(net.mac),
                mtu: net.mtu,
            }),
            image_disk: ImageDiskConfig::default(),
            scratch_disk: Some(machine.scratch.clone()),
            run_as: self.run_as.map(|(uid, gid)| RunAs { uid, gid }),
        }
    }

    /// Listens where the agent will report, and opens the file for what the VMM prints.
    fn prepare(&self, files: &Files) -> io::Result<(UnixListener, File)> {
        let socket = files.vsock_port(READY_PORT);
        let ready = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
        if let Some((uid, gid)) = self.run_as {
            // It connects, and makes its sockets, as who it has become.
            std::os::unix::fs::chown(&socket, Some(uid), Some(gid))?;
            std::os::unix::fs::chown(files.directory(), Some(uid), Some(gid))?;
        }
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        Ok((ready, options.open(files.vmm_log())?))
    }
}

impl Starting {
    pub fn process(&self) -> &Arc<VmmProcess> {
        &self.process
    }

    /// Lets the VM run and waits for its agent, until `until` at most. On an error the process has been killed; after a
    /// drop it is the caller who kills it.
    pub async fn boot(self, until: Instant) -> Result<Guest, LaunchError> {
        let process = Arc::clone(&self.process);
        let booted = self.boot_steps(until).await;
        if booted.is_err() {
            process.kill();
            process.ended().await;
        }
        booted
    }

    async fn boot_steps(self, until: Instant) -> Result<Guest, LaunchError> {
        let watch = Watch {
            process: &self.process,
            files: &self.files,
            started: Instant::now(),
            limits: Limits {
                own: self.timeout,
                until,
            },
        };
        configure(self.input, &self.config)?;
        let accepted = watch.step("booting", self.ready.accept()).await?;
        let (mut stream, _) = accepted.map_err(LaunchError::Ready)?;
        let words = connect::read_message::<Ready>(&mut stream, READY_BYTES);
        let words = watch
            .step("waiting for the agent's first words", words)
            .await?
            .map_err(LaunchError::Ready)?;
        tracing::info!(
            elapsed = ?watch.started.elapsed(),
            kernel = bounded(&words.kernel_release),
            agent = bounded(&words.agent_version),
            "guest ready"
        );
        // Only the VMM's end counts as the end: an adopted guest has no such connection.
        tokio::spawn(hold(stream, Arc::clone(&self.process)));
        Ok(Guest::new(self.process, self.files))
    }
}

/// Looks after a boot: whether its VM lives, and has not had its time.
struct Watch<'a> {
    process: &'a VmmProcess,
    files: &'a Files,
    started: Instant,
    limits: Limits,
}

impl Watch<'_> {
    async fn step<T>(
        &self,
        stage: &'static str,
        step: impl Future<Output = T>,
    ) -> Result<T, LaunchError> {
        tokio::pin!(step);
        loop {
            let again = self.look(stage)?;
            tokio::select! {
                // A VMM that died says more than a connection that broke with it.
                biased;
                () = self.process.ended() => return Err(ended(self.files, stage)),
                done = &mut step => return Ok(done),
                () = tokio::time::sleep_until(again) => {}
            }
        }
    }

    /// When to look again, if it may go on.
    fn look(&self, stage: &'static str) -> Result<Instant, LaunchError> {
        let spent = Spent {
            passed: self.started.elapsed(),
            scheduled: Scheduled::of(self.process.identity().pid),
        };
        let Limits { own, until } = self.limits;
        let all = until.saturating_duration_since(self.started);
        let limit = match judge(&spent, own, all) {
            Verdict::GoOn(passed) => return Ok(self.started + passed),
            Verdict::Slow => format!("it may take {own:?}, waiting for a CPU not counted"),
            Verdict::Late => "who asked for it does not wait longer".to_owned(),
        };
        Err(LaunchError::Timeout {
            stage,
            spent,
            limit,
            console: console(self.files),
        })
    }
}

/// Keeps the ready connection open as long as both ends want it.
async fn hold(mut stream: tokio::net::UnixStream, process: Arc<VmmProcess>) {
    let mut sink = tokio::io::sink();
    tokio::select! {
        () = process.ended() => {}
        _ = tokio::io::copy(&mut stream, &mut sink) => {}
    }
}

fn configure(mut input: ChildStdin, config: &VmConfig) -> Result<(), LaunchError> {
    use std::io::Write;
    let text =
        serde_json::to_vec(config).map_err(|e| LaunchError::Configure(io::Error::other(e)))?;
    // Far below the capacity of a pipe, so it does not block. A VMM that died is found by who waits for it.
    match input.write_all(&text) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(LaunchError::Configure(e)),
        _ => Ok(()),
    }
}

fn ended(files: &Files, stage: &'static str) -> LaunchError {
    LaunchError::Ended {
        stage,
        obituary: files.obituary(),
        console: console(files),
    }
}

fn console(files: &Files) -> String {
    match files.console_tail() {
        tail if tail.is_empty() => "; the guest's console is empty".to_owned(),
        tail => format!("; the guest's console ends with:\n{tail}"),
    }
}

/// Makes the directory of a VM's files, which must be new.
pub fn make_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::DirBuilder::new().mode(0o700).create(path)
}
