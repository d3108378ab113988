// SPDX-License-Identifier: Apache-2.0
//! Turns a guest, which is like every other one, into a certain pod's guest: clock, entropy, names, network, disks.

pub mod files;
mod limits;
mod sysctl;

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use bulkhead_proto::agent::ConfigureSandboxRequest;
use rustix::mount::{MountFlags, mount};
use tokio::sync::Mutex;

use crate::clock::{self, ClockError};
use crate::disk::scratch;
use crate::network::{self, NetworkError};
use crate::sys;
use crate::users::PodUsers;

pub use limits::{LimitError, limit};

const MIN_ENTROPY_BYTES: usize = 32;
const MAX_ENTROPY_BYTES: usize = 4096;
const DEFAULT_SHM_BYTES: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("this guest is already configured for another sandbox")]
    AnotherSandbox,
    #[error("this guest is not configured for a sandbox")]
    NotConfigured,
    #[error("{0} cannot be changed in a restore")]
    Fixed(&'static str),
    #[error(
        "{0} bytes of entropy are not in the range of {MIN_ENTROPY_BYTES} to {MAX_ENTROPY_BYTES}"
    )]
    Entropy(usize),
    #[error("{0:?} is not the name of a sysctl")]
    BadSysctl(String),
    #[error("set sysctl {name} to {value:?}")]
    Sysctl {
        name: String,
        value: String,
        source: io::Error,
    },
    #[error("{what}")]
    Step {
        what: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Clock(#[from] ClockError),
    #[error("configure the network")]
    Network(#[source] NetworkError),
}

/// The sandbox that this guest is configured for, if it is configured.
#[derive(Debug)]
pub struct Sandbox {
    configured: Mutex<Option<ConfigureSandboxRequest>>,
    users: PodUsers,
}

impl Sandbox {
    /// Not configured yet. [`Self::configure`] will create the pod's user namespace in `users`.
    pub fn new(users: PodUsers) -> Self {
        Self {
            configured: Mutex::default(),
            users,
        }
    }

    /// Configures the guest for its sandbox. Another call for the same sandbox only sets the clock and adds entropy.
    pub async fn configure(&self, request: ConfigureSandboxRequest) -> Result<(), SandboxError> {
        let mut configured = self.configured.lock().await;
        // A repeated call brings a new time and new entropy. Both are welcome.
        add_entropy(&request.entropy)?;
        clock::set(request.clock_unix_nanoseconds)?;
        let identity = identity(request);
        match configured.as_ref() {
            Some(known) if *known == identity => return Ok(()),
            Some(_) => return Err(SandboxError::AnotherSandbox),
            None => {}
        }
        if let Some(wanted) = &identity.user_namespace {
            self.users
                .make(wanted)
                .map_err(|source| SandboxError::Step {
                    what: "create the pod's user namespace",
                    source,
                })?;
        }
        apply(&identity, &self.users).await?;
        *configured = Some(identity);
        Ok(())
    }

    /// Checks whether a sandbox that is brought back from a checkpoint can become this one.
    pub async fn check_restore(
        &self,
        wanted: &ConfigureSandboxRequest,
    ) -> Result<(), SandboxError> {
        let configured = self.configured.lock().await;
        let known = configured.as_ref().ok_or(SandboxError::NotConfigured)?;
        if let Some(what) = fixed(known, wanted) {
            return Err(SandboxError::Fixed(what));
        }
        check_entropy(&wanted.entropy)?;
        match &wanted.interface {
            Some(interface) => network::check(interface).map_err(SandboxError::Network),
            None => Ok(()),
        }
    }

    /// Gives the guest the identity of another sandbox, after [`Self::check_restore`]. `pids` are the processes of its
    /// containers, which are frozen. Each step can be repeated.
    pub async fn restore(
        &self,
        request: ConfigureSandboxRequest,
        pids: Vec<i32>,
    ) -> Result<(), SandboxError> {
        let mut configured = self.configured.lock().await;
        // First, because what comes next may need random numbers that no other copy has.
        add_entropy(&request.entropy)?;
        clock::set(request.clock_unix_nanoseconds)?;
        let identity = identity(request);
        name(&identity, &self.users)?;
        network::replace(identity.interface.as_ref(), pids)
            .await
            .map_err(SandboxError::Network)?;
        *configured = Some(identity);
        Ok(())
    }

    pub async fn is_configured(&self) -> bool {
        self.configured.lock().await.is_some()
    }
}

/// Configures the guest. Each step can be repeated, so a call that failed half-way can be repeated, too.
async fn apply(request: &ConfigureSandboxRequest, users: &PodUsers) -> Result<(), SandboxError> {
    let step = |what| move |source| SandboxError::Step { what, source };
    // The first access to the disk takes longest, so it happens while the other steps are done.
    let scratch_sectors = request.scratch_sectors;
    let disk = tokio::task::spawn_blocking(move || {
        if PathBuf::from(scratch::CONTAINERS).exists() {
            Ok(())
        } else {
            scratch::mount_scratch(scratch_sectors)
        }
    });
    let root = name(request, users)?;
    mount_shm(request.shm_bytes, root).map_err(step("mount the pod's /dev/shm"))?;
    if request.user_namespace.is_some() {
        mount_mqueue().map_err(step("mount the pod's message queues"))?;
    }
    sysctl::set_defaults()?;
    for (name, value) in &request.sysctls {
        sysctl::set(name, value)?;
    }
    if let Some(interface) = &request.interface {
        network::configure(interface)
            .await
            .map_err(SandboxError::Network)?;
    }
    disk.await
        .map_err(io::Error::other)
        .and_then(|mounted| mounted)
        .map_err(step("mount the scratch disk"))
}

/// What of a request stays, so that a repetition is known.
fn identity(request: ConfigureSandboxRequest) -> ConfigureSandboxRequest {
    ConfigureSandboxRequest {
        clock_unix_nanoseconds: 0,
        entropy: Default::default(),
        ..request
    }
}

/// Sets the hostname and writes the pod's files. Returns the ids in the guest of the pod's root user.
fn name(request: &ConfigureSandboxRequest, users: &PodUsers) -> Result<(u32, u32), SandboxError> {
    let step = |what| move |source| SandboxError::Step { what, source };
    rustix::system::sethostname(request.hostname.as_bytes())
        .map_err(io::Error::from)
        .map_err(step("set the hostname"))?;
    let root = users.in_guest(0, 0);
    let root = root.map_err(step("map the pod's root user"))?;
    files::write(request, root).map_err(step("write the pod's files"))?;
    Ok(root)
}

/// What differs although containers that were not started anew rely on it.
fn fixed(
    known: &ConfigureSandboxRequest,
    wanted: &ConfigureSandboxRequest,
) -> Option<&'static str> {
    let table = [
        ("sysctls", known.sysctls == wanted.sysctls),
        (
            "shared_pid_namespace",
            known.shared_pid_namespace == wanted.shared_pid_namespace,
        ),
        (
            "shm_bytes",
            shm_bytes(known.shm_bytes) == shm_bytes(wanted.shm_bytes),
        ),
        (
            "user_namespace",
            known.user_namespace == wanted.user_namespace,
        ),
    ];
    let differs = table.into_iter().find(|(_, same)| !same);
    differs.map(|(name, _)| name)
}

fn shm_bytes(wanted: u64) -> u64 {
    if wanted == 0 {
        DEFAULT_SHM_BYTES
    } else {
        wanted
    }
}

fn check_entropy(entropy: &[u8]) -> Result<(), SandboxError> {
    if (MIN_ENTROPY_BYTES..=MAX_ENTROPY_BYTES).contains(&entropy.len()) {
        return Ok(());
    }
    Err(SandboxError::Entropy(entropy.len()))
}

fn add_entropy(entropy: &[u8]) -> Result<(), SandboxError> {
    check_entropy(entropy)?;
    File::options()
        .write(true)
        .open("/dev/urandom")
        .and_then(|random| sys::add_entropy(&random, entropy))
        .map_err(|source| SandboxError::Step {
            what: "add entropy",
            source,
        })
}

fn mount_mqueue() -> io::Result<()> {
    if fs::exists(files::MQUEUE)? {
        return Ok(());
    }
    fs::create_dir_all(files::MQUEUE)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount(c"mqueue", files::MQUEUE, c"mqueue", flags, None)?)
}

/// Mounts the pod's /dev/shm. It belongs to the pod's root user, whose ids in the guest are given.
fn mount_shm(bytes: u64, (uid, gid): (u32, u32)) -> io::Result<()> {
    let bytes = shm_bytes(bytes);
    if fs::exists(files::SHM)? {
        return Ok(());
    }
    fs::create_dir_all(files::SHM)?;
    let options = format!("mode=1777,size={bytes},uid={uid},gid={gid}");
    let options = std::ffi::CString::new(options)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount(
        c"shm",
        files::SHM,
        c"tmpfs",
        flags,
        Some(options.as_c_str()),
    )
    .inspect_err(|_| {
        let _ = fs::remove_dir(files::SHM);
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::agent::UserNamespace;

    type Change = fn(&mut ConfigureSandboxRequest);

    const CHANGES: [(Option<&str>, Change); 6] = [
        (None, |one| one.hostname = "other".into()),
        (None, |one| one.shm_bytes = DEFAULT_SHM_BYTES),
        (Some("shm_bytes"), |one| one.shm_bytes = 1 << 20),
        (Some("shared_pid_namespace"), |one| {
            one.shared_pid_namespace = true;
        }),
        (Some("user_namespace"), |one| {
            one.user_namespace = Some(UserNamespace::default());
        }),
        (Some("sysctls"), |one| {
            one.sysctls.insert("kernel.shmmax".into(), "1".into());
        }),
    ];

    #[tokio::test]
    async fn a_restore_may_not_change_what_running_containers_rely_on() {
        let known = ConfigureSandboxRequest {
            entropy: vec![7; MIN_ENTROPY_BYTES].into(),
            ..Default::default()
        };
        let sandbox = Sandbox::new(PodUsers::default());
        let early = sandbox.check_restore(&known).await;
        assert!(matches!(early, Err(SandboxError::NotConfigured)));
        *sandbox.configured.lock().await = Some(identity(known.clone()));
        for (expected, change) in CHANGES {
            let mut wanted = known.clone();
            change(&mut wanted);
            let refused = match sandbox.check_restore(&wanted).await {
                Ok(()) => None,
                Err(SandboxError::Fixed(what)) => Some(what),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(refused, expected);
        }
        let without = ConfigureSandboxRequest::default();
        let refused = sandbox.check_restore(&without).await;
        assert!(matches!(refused, Err(SandboxError::Entropy(0))));
    }
}
