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
        let identity = ConfigureSandboxRequest {
            clock_unix_nanoseconds: 0,
            entropy: Default::default(),
            ..request
        };
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
    rustix::system::sethostname(request.hostname.as_bytes()).map_err(|e| SandboxError::Step {
        what: "set the hostname",
        source: e.into(),
    })?;
    let root = users.in_guest(0, 0);
    let root = root.map_err(step("map the pod's root user"))?;
    files::write(request, root).map_err(step("write the pod's files"))?;
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

fn add_entropy(entropy: &[u8]) -> Result<(), SandboxError> {
    if !(MIN_ENTROPY_BYTES..=MAX_ENTROPY_BYTES).contains(&entropy.len()) {
        return Err(SandboxError::Entropy(entropy.len()));
    }
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
    let bytes = if bytes == 0 { DEFAULT_SHM_BYTES } else { bytes };
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
