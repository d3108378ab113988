// SPDX-License-Identifier: Apache-2.0
//! Starts VMs and waits for their agents, or adopts running ones.
//!
//! A VMM is started in two steps. [`Launcher::spawn`] makes the process, which waits for its configuration. Then the
//! caller stores its identity, and [`Starting::boot`] sends the configuration and waits for the agent. If the daemon
//! dies in between, the VMM reads an end of file instead of the configuration and ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_guest::connect;
use bulkhead_guest::text::bounded;
use bulkhead_proto::agent::{READY_PORT, Ready};
use bulkhead_vmm::config::{ImageDiskConfig, MacAddress, NetConfig, RunAs, VmConfig, VsockConfig};
use command_fds::{CommandFdExt, FdMapping};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

use crate::files::{Files, open_regular};
use crate::guest::Guest;
use crate::patience::{Clock, Limits, STARVED, Spent, Verdict, judge};
use crate::process::{Identity, VmmProcess};

/// The number of the TAP's file descriptor in the VMM.
const TAP_FD: i32 = 3;
/// The vsock address of every guest. It need not be unique, because each VMM has its own vsock device.
const GUEST_CID: u32 = 3;
/// The longest `Ready` message.
const READY_BYTES: u32 = 4096;

/// An error while a VM starts. A boot that failed names the stage and shows the end of the guest's console.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("prepare the VM's files in {path}")]
    Files { path: PathBuf, source: io::Error },
    #[error("start {program}")]
    Spawn { program: PathBuf, source: io::Error },
    #[error("pass file descriptors to the VMM: {0}")]
    Descriptors(String),
    #[error("send the VMM its configuration")]
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
    #[error("the agent's first message is not valid")]
    Ready(#[source] io::Error),
    #[error("look for the VMM process {pid} of an earlier daemon")]
    Adopt { pid: i32, source: io::Error },
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// What all VMs have in common.
#[derive(Clone, Debug)]
pub struct Launcher {
    pub program: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub extra_cmdline: String,
    pub ready_timeout: Duration,
    /// The user and group to which the VMM switches.
    pub run_as: Option<(u32, u32)>,
}

/// What is different for each VM.
#[derive(Debug)]
pub struct Machine {
    /// The most CPUs that it can have, and how many it boots with.
    pub vcpus: u8,
    pub boot_vcpus: u8,
    /// Memory at the boot, and the most that it can have.
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

/// A VMM that waits for its configuration. If this is dropped without a boot, the VMM ends.
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
    /// Starts the VMM process of a VM. The directory `files` must exist.
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
            // In its own process group, so that Ctrl-C, which goes to the daemon's group, does not end it.
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

    /// How long a boot may take if its caller has no time limit. This includes time in which others used the CPU.
    pub fn longest(&self) -> Duration {
        self.ready_timeout.saturating_mul(STARVED)
    }

    /// Finds the VM that an earlier daemon started. `None` if it has ended.
    pub fn adopt(&self, files: Files, identity: Identity) -> Result<Option<Guest>, LaunchError> {
        let found = VmmProcess::adopt(identity).map_err(|source| LaunchError::Adopt {
            pid: identity.pid,
            source,
        })?;
        Ok(found.map(|process| Guest::new(process.into(), files)))
    }

    /// The VMM's configuration.
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

    /// Listens on the socket to which the agent connects when it is ready, and opens the file for the VMM's output.
    fn prepare(&self, files: &Files) -> io::Result<(UnixListener, File)> {
        let socket = files.vsock_port(READY_PORT);
        let ready = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
        if let Some((uid, gid)) = self.run_as {
            // The VMM connects to this socket, and makes its own ones, after it has switched to that user.
            std::os::unix::fs::chown(&socket, Some(uid), Some(gid))?;
            std::os::unix::fs::chown(files.directory(), Some(uid), Some(gid))?;
        }
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        Ok((ready, open_regular(&files.vmm_log(), &mut options)?))
    }
}

impl Starting {
    pub fn process(&self) -> &Arc<VmmProcess> {
        &self.process
    }

    /// Boots the VM and waits for its agent, but not longer than `until`. After an error, the process has been killed.
    /// If the future is dropped, the caller must kill it.
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
            clock: Clock::of_new(self.process.identity().pid),
            limits: Limits {
                own: self.timeout,
                until,
            },
        };
        faults::within(Step::ConfigureVmm, || configure(self.input, &self.config))?;
        faults::before(Step::HearAgent)?;
        let accepted = watch.step("booting", self.ready.accept()).await?;
        let (mut stream, _) = accepted.map_err(LaunchError::Ready)?;
        let words = connect::read_message::<Ready>(&mut stream, READY_BYTES);
        let words = watch
            .step("waiting for the agent's first message", words)
            .await?
            .map_err(LaunchError::Ready)?;
        faults::after(Step::HearAgent)?;
        tracing::info!(
            elapsed = ?watch.clock.since.elapsed(),
            kernel = bounded(&words.kernel_release),
            agent = bounded(&words.agent_version),
            "guest ready"
        );
        // The connection is kept but not watched. Only the end of the VMM counts, because an adopted guest has no such
        // connection.
        tokio::spawn(hold(stream, Arc::clone(&self.process)));
        Ok(Guest::new(self.process, self.files))
    }
}

/// Watches a boot: whether its VM still runs, and whether it is within its time limits.
struct Watch<'a> {
    process: &'a VmmProcess,
    files: &'a Files,
    clock: Clock,
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
                // `biased`, because the VMM's exit report tells more than the connection that broke with it.
                biased;
                () = self.process.ended() => return Err(ended(self.files, stage)),
                done = &mut step => return Ok(done),
                () = tokio::time::sleep_until(again) => {}
            }
        }
    }

    /// Checks the time limits. Returns when to check again.
    fn look(&self, stage: &'static str) -> Result<Instant, LaunchError> {
        let spent = self.clock.spent();
        let Limits { own, until } = self.limits;
        let all = until.saturating_duration_since(self.clock.since);
        let limit = match judge(&spent, own, all) {
            Verdict::GoOn(passed) => return Ok(self.clock.since + passed),
            Verdict::Slow => format!("its limit is {own:?} without waiting for a CPU"),
            Verdict::Late => "its caller does not wait any longer".to_owned(),
        };
        Err(LaunchError::Timeout {
            stage,
            spent,
            limit,
            console: console(self.files),
        })
    }
}

/// Keeps the ready connection open until the VMM or the agent ends. An agent that goes on talking is not listened to.
async fn hold(mut stream: UnixStream, process: Arc<VmmProcess>) {
    tokio::select! {
        () = process.ended() => return,
        more = stream.read_u8() => if more.is_err() { return },
    }
    process.ended().await;
}

fn configure(mut input: ChildStdin, config: &VmConfig) -> Result<(), LaunchError> {
    use std::io::Write;
    let text =
        serde_json::to_vec(config).map_err(|e| LaunchError::Configure(io::Error::other(e)))?;
    // The text is far shorter than a pipe's capacity, so this does not block. If the VMM has died, the next step
    // notices it.
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

/// Makes the directory for a VM's files. It is an error if it exists already.
pub fn make_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::DirBuilder::new().mode(0o700).create(path)
}
