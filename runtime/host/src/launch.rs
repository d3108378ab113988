// SPDX-License-Identifier: Apache-2.0
//! Starts VMs and waits for their agents, or adopts running ones.
//!
//! A VMM is started in two steps. [`Launcher::spawn`] makes the process, which waits for its configuration. Then the
//! caller stores its identity, and [`Starting::boot`] sends the configuration and waits for the agent. If the daemon
//! dies in between, the VMM reads an end of file instead of the configuration and ends.
//!
//! A VMM is in a jail before it reads anything, so everything that it needs is opened here ([`Inherited`]). The program
//! forks into its namespaces, tells the number of that process, and ends; so a VMM is never a child of the daemon.

mod watch;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_guest::connect;
use bulkhead_guest::text::bounded;
use bulkhead_proto::agent::{READY_PORT, Ready, disk};
use bulkhead_vmm::config::{MacAddress, NetConfig, Start, User, VmConfig, VsockConfig};
use bulkhead_vmm::extent::SECTOR_BYTES;
use bulkhead_vmm::inherited::Inherited;
use command_fds::{CommandFdExt, FdMapping};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::control::Extent;
use crate::cores::{self, Cores};
use crate::files::{Files, last_lines, open_regular};
use crate::guest::Guest;
use crate::patience::{STARVED, Spent};
use crate::process::{Identity, VmmProcess};
use crate::saved::{self, Saved, SavedError};
use crate::template::{Template, TemplateError, Unsaved};
use watch::Watch;
pub use watch::lost;

const KVM: &str = "/dev/kvm";
/// The vsock address of every guest. It need not be unique, because each VMM has its own vsock device.
const GUEST_CID: u32 = 3;
/// How many lines of its log an error shows if a VMM did not start.
const SAID_LINES: usize = 3;
/// A process number and its newline, and some space.
const NUMBER_BYTES: u64 = 32;
/// The longest `Ready` message.
const READY_BYTES: u32 = 4096;

/// The stage in which a VM ends that cannot go on from its checkpoint.
pub const TAKING_OVER: &str = "taking over the checkpoint";

/// An error while a VM starts. A boot that failed names the stage and shows the end of the guest's console.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("open {path} for the VM")]
    Open { path: PathBuf, source: io::Error },
    #[error("start {program}{said}")]
    Spawn {
        program: PathBuf,
        source: io::Error,
        /// What it said, after a colon.
        said: String,
    },
    #[error("pass file descriptors to the VMM: {0}")]
    Descriptors(String),
    #[error("keep other VMs off the CPU cores of this one (sandbox.core_scheduling)")]
    Cores(#[source] io::Error),
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
    Template(#[from] TemplateError),
    #[error(transparent)]
    Saved(#[from] SavedError),
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// What all VMs have in common.
#[derive(Clone, Debug)]
pub struct Launcher {
    pub program: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// The kernel's modules, as an EROFS file.
    pub modules: PathBuf,
    pub extra_cmdline: String,
    pub ready_timeout: Duration,
    pub cores: Cores,
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
    /// A template has none.
    pub scratch: Option<PathBuf>,
    pub net: Option<Net>,
    /// The user and group that this VM has for itself.
    pub user: u32,
    pub beginning: Beginning,
}

/// What a VM begins with.
#[derive(Debug)]
pub enum Beginning {
    Boot,
    /// It boots, and others will be forked from it: [`Starting::save`].
    Template(Unsaved),
    /// It goes on where the template was saved, with the template's memory.
    Fork(Arc<Template>),
    /// It goes on where a checkpoint was made: [`Starting::restore`].
    Restore(Saved),
}

impl Beginning {
    /// Whether a kernel boots.
    fn is_boot(&self) -> bool {
        matches!(self, Self::Boot | Self::Template(_))
    }
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
    ready: UnixStream,
    files: Files,
    timeout: Duration,
    beginning: Beginning,
}

impl Launcher {
    /// Starts the VMM process of a VM. The directory `files` must exist. If the future is dropped, the process ends.
    pub async fn spawn(&self, files: Files, machine: Machine) -> Result<Starting, LaunchError> {
        let modules = File::open(&self.modules).map_err(not_opened(&self.modules))?;
        let modules_bytes = modules.metadata().map_err(not_opened(&self.modules))?.len();
        let config = self.config(&machine, modules_bytes);
        let (ready, theirs) =
            UnixStream::pair().map_err(|source| self.not_started(&files, source))?;
        let theirs = theirs
            .into_std()
            .map_err(|source| self.not_started(&files, source))?;
        let (passed, beginning) = self.open_all(&files, theirs.into(), modules.into(), machine)?;
        let mut append = OpenOptions::new();
        append.create(true).append(true).mode(0o600);
        let log = files.vmm_log();
        let log = open_regular(&log, &mut append).map_err(not_opened(&log))?;
        let mut command = Command::new(&self.program);
        command
            .arg("run")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // In its own process group, so that Ctrl-C, which goes to the daemon's group, does not end it.
            .process_group(0);
        command
            .fd_mappings(passed)
            .map_err(|e| LaunchError::Descriptors(e.to_string()))?;
        let mut child = command
            .spawn()
            .map_err(|source| self.not_started(&files, source))?;
        // The descriptors of the command are the VMM's now.
        drop(command);
        let input = child.stdin.take();
        let input =
            input.ok_or_else(|| self.not_started(&files, io::ErrorKind::BrokenPipe.into()))?;
        let born = tokio::task::spawn_blocking(move || number_told(child)).await;
        let born = born.map_err(io::Error::other).flatten();
        let process = born.and_then(|pid| VmmProcess::adopt(Identity::of(pid)?));
        let process = process.and_then(|found| found.ok_or(io::ErrorKind::NotFound.into()));
        let process = process.map_err(|source| self.not_started(&files, source))?;
        if let Err(e) = process.set_oom_score_adj(0) {
            tracing::debug!("oom_score_adj of the VMM: {e}");
        }
        cores::separate(self.cores, process.identity()).map_err(LaunchError::Cores)?;
        Ok(Starting {
            process: Arc::new(process),
            config,
            input,
            ready,
            files,
            timeout: self.ready_timeout,
            beginning,
        })
    }

    fn not_started(&self, files: &Files, source: io::Error) -> LaunchError {
        let said = last_lines(&files.vmm_log(), SAID_LINES);
        LaunchError::Spawn {
            program: self.program.clone(),
            source,
            said: if said.is_empty() {
                said
            } else {
                format!(": it said: {said}")
            },
        }
    }

    /// Opens what the VMM gets.
    fn open_all(
        &self,
        files: &Files,
        ready: OwnedFd,
        modules: OwnedFd,
        machine: Machine,
    ) -> Result<(Vec<FdMapping>, Beginning), LaunchError> {
        let (mut read, mut both) = (OpenOptions::new(), OpenOptions::new());
        read.read(true);
        both.read(true).write(true);
        let open = |path: &Path, options: &OpenOptions| {
            let file = options.open(path).map_err(not_opened(path))?;
            Ok::<_, LaunchError>(OwnedFd::from(file))
        };
        let mut all = vec![
            (Inherited::ExitReport, created(&files.exit_report())?),
            (Inherited::Kvm, open(Path::new(KVM), &both)?),
            (Inherited::Console, created(&files.console())?),
            (Inherited::Control, listening(&files.control())?),
            (Inherited::Vsock, listening(&files.vsock())?),
            (Inherited::Modules, modules),
        ];
        let saved = match &machine.beginning {
            Beginning::Boot => None,
            Beginning::Template(unsaved) => Some(unsaved.for_vmm()?),
            Beginning::Fork(template) => Some(template.for_vmm()?),
            Beginning::Restore(saved) => Some(saved.for_vmm()?),
        };
        if let Some((memory, state)) = saved {
            all.extend([(Inherited::Memory, memory), (Inherited::State, state)]);
        }
        if machine.beginning.is_boot() {
            all.push((Inherited::Kernel, open(&self.kernel, &read)?));
            all.push((Inherited::Initramfs, open(&self.initramfs, &read)?));
            all.push((Inherited::Ready, ready));
        }
        if let Some(scratch) = &machine.scratch {
            all.push((Inherited::Scratch, open(scratch, &both)?));
        }
        all.extend(machine.net.map(|net| (Inherited::Tap, net.tap)));
        let mapping = |(what, parent_fd): (Inherited, OwnedFd)| FdMapping {
            parent_fd,
            child_fd: what.number(),
        };
        Ok((all.into_iter().map(mapping).collect(), machine.beginning))
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
    fn config(&self, machine: &Machine, modules_bytes: u64) -> VmConfig {
        VmConfig {
            extra_cmdline: format!(
                "{}={} {}",
                disk::MODULES_PARAMETER,
                modules_bytes.div_ceil(SECTOR_BYTES),
                self.extra_cmdline
            ),
            vcpus: machine.vcpus,
            boot_vcpus: machine.boot_vcpus,
            memory_mib: machine.memory_mib,
            memory_max_mib: machine.memory_max_mib,
            vsock: VsockConfig {
                guest_cid: GUEST_CID,
                ready_port: READY_PORT,
            },
            net: machine.net.as_ref().map(|net| NetConfig {
                mac: MacAddress(net.mac),
                mtu: net.mtu,
            }),
            scratch_disk: machine.scratch.is_some(),
            modules: true,
            user: User {
                uid: machine.user,
                gid: machine.user,
            },
            start: match &machine.beginning {
                Beginning::Boot => Start::Boot,
                Beginning::Template(unsaved) => Start::Template {
                    kernel_sum: unsaved.kernel_sum(),
                },
                Beginning::Fork(template) => Start::Fork {
                    kernel_sum: template.kernel_sum(),
                    foreseen: template.foreseen().cloned(),
                },
                Beginning::Restore(saved) => Start::Restore {
                    kernel_sum: saved.kernel_sum,
                    maps_memory: saved.maps_memory,
                },
            },
        }
    }
}

fn not_opened(path: &Path) -> impl FnOnce(io::Error) -> LaunchError {
    let path = path.to_owned();
    move |source| LaunchError::Open { path, source }
}

/// An empty file that only root may open.
fn created(path: &Path) -> Result<OwnedFd, LaunchError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let file = open_regular(path, &mut options).map_err(not_opened(path))?;
    Ok(file.into())
}

/// A listening socket to which only root may connect. Replaces one that a dead VMM left behind.
fn listening(path: &Path) -> Result<OwnedFd, LaunchError> {
    let listen = || {
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(listener.into())
    };
    listen().map_err(not_opened(path))
}

/// Waits for the end of the process that was started, which tells the number of the VMM before.
fn number_told(mut child: Child) -> io::Result<i32> {
    let mut text = String::new();
    if let Some(output) = child.stdout.take() {
        output.take(NUMBER_BYTES).read_to_string(&mut text)?;
    }
    child.wait()?;
    text.trim().parse().map_err(io::Error::other)
}

impl Starting {
    pub fn process(&self) -> &Arc<VmmProcess> {
        &self.process
    }

    /// Boots the VM, or lets it go on where its template was, and waits for its agent, but not longer than `until`. After an
    /// error, the process has been killed. If the future is dropped, the caller must kill it.
    pub async fn boot(self, until: Instant) -> Result<Guest, LaunchError> {
        let process = Arc::clone(&self.process);
        let booted = match self.beginning {
            Beginning::Fork(_) => self.go_on(until).await,
            Beginning::Restore(_) => Err(SavedError::Layers.into()),
            Beginning::Boot | Beginning::Template(_) => {
                self.hear_agent(until).await.map(Booted::keep)
            }
        };
        killed_unless_ok(&process, booted).await
    }

    /// Lets the VM go on where its checkpoint was made, and waits for its agent, but not longer than `until`, which is the only
    /// limit: memory may take long to copy. `layers` are the files that were on the image disk behind the kernel's modules, in
    /// order, and where the guest knows them. After an error, the process has been killed. If the future is dropped, the
    /// caller must kill it.
    pub async fn restore(
        self,
        layers: Vec<(File, Extent)>,
        until: Instant,
    ) -> Result<Guest, LaunchError> {
        let process = Arc::clone(&self.process);
        let restored = match self.beginning {
            Beginning::Restore(_) => self.go_on_with(layers, until).await,
            _ => Err(SavedError::None.into()),
        };
        killed_unless_ok(&process, restored).await
    }

    /// Boots a template, and saves it as soon as its agent is ready. Its process has ended then, and after an error, too.
    pub async fn save(mut self, until: Instant) -> Result<Template, LaunchError> {
        let process = Arc::clone(&self.process);
        let beginning = std::mem::replace(&mut self.beginning, Beginning::Boot);
        let Beginning::Template(unsaved) = beginning else {
            process.kill();
            return Err(TemplateError::None.into());
        };
        let config = self.config.clone();
        let saved = async {
            let Booted { guest, ready } = self.hear_agent(until).await?;
            // The guest keeps no connection: its forks would find nobody at the other end.
            drop(ready);
            Ok(unsaved.save(&config, &guest).await?)
        };
        killed_unless_ok(&process, saved.await).await
    }

    /// Configures the VMM of a fork, and waits until its agent answers. It listens since before the fork.
    async fn go_on(self, until: Instant) -> Result<Guest, LaunchError> {
        let guest = Guest::new(Arc::clone(&self.process), self.files.clone());
        let watch = Watch::new(&self.process, &self.files, self.timeout, until);
        faults::within(Step::ConfigureVmm, || configure(self.input, &self.config))?;
        watch.answered(guest, "going on from its template").await
    }

    /// Configures the VMM of a restored VM, gives it its layers when it has its memory, and waits until the agent
    /// answers.
    async fn go_on_with(
        self,
        layers: Vec<(File, Extent)>,
        until: Instant,
    ) -> Result<Guest, LaunchError> {
        let guest = Guest::new(Arc::clone(&self.process), self.files.clone());
        let limit = until.saturating_duration_since(Instant::now());
        let watch = Watch::new(&self.process, &self.files, limit, until);
        faults::within(Step::ConfigureVmm, || configure(self.input, &self.config))?;
        let control = guest.files.control();
        let attached = saved::attach(&control, layers, limit);
        if let Err(error) = watch.step(TAKING_OVER, attached).await? {
            return Err(watch.ended_or(error.into(), TAKING_OVER).await);
        }
        watch.answered(guest, "going on from its checkpoint").await
    }

    async fn hear_agent(self, until: Instant) -> Result<Booted, LaunchError> {
        let watch = Watch::new(&self.process, &self.files, self.timeout, until);
        faults::within(Step::ConfigureVmm, || configure(self.input, &self.config))?;
        faults::before(Step::HearAgent)?;
        let mut stream = self.ready;
        let words = connect::read_message::<Ready>(&mut stream, READY_BYTES);
        let words = watch.step("booting", words).await?;
        let words = match words {
            Ok(words) => words,
            Err(error) => return Err(watch.ended_or(LaunchError::Ready(error), "booting").await),
        };
        faults::after(Step::HearAgent)?;
        tracing::info!(
            elapsed = ?watch.clock.since.elapsed(),
            kernel = bounded(&words.kernel_release),
            agent = bounded(&words.agent_version),
            "guest ready"
        );
        Ok(Booted {
            guest: Guest::new(Arc::clone(&self.process), self.files.clone()),
            ready: stream,
        })
    }
}

/// A guest that has booted, with the connection on which its agent said so.
struct Booted {
    guest: Guest,
    ready: UnixStream,
}

impl Booted {
    /// The connection is kept but not watched. Only the end of the VMM counts, because an adopted guest has no such
    /// connection.
    fn keep(self) -> Guest {
        tokio::spawn(hold(self.ready, Arc::clone(&self.guest.process)));
        self.guest
    }
}

/// After an error, nothing of the VM is left.
async fn killed_unless_ok<T, E>(process: &VmmProcess, done: Result<T, E>) -> Result<T, E> {
    if done.is_err() {
        process.kill();
        process.ended().await;
    }
    done
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

/// Makes the directory for a VM's files. It is an error if it exists already.
pub fn make_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::DirBuilder::new().mode(0o700).create(path)
}
