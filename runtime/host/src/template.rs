// SPDX-License-Identifier: Apache-2.0
//! Templates: VMs that have booted once and were saved when their agent was ready, before they were any pod's. Others are
//! forked from them.
//!
//! A template is two anonymous files, its memory and its state. Nobody can write to either any more: the files are sealed
//! when the VMM that wrote them has ended. A fork maps the memory privately, so the host has each page once, until a fork
//! writes to it. The pages belong to the cgroup of the template's VMM.
//!
//! The first fork shows which pages a fork uses until its guest is a pod's ([`Template::learn`]). Later ones have them from the
//! start.

mod used;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use bulkhead_text::chain;
use bulkhead_vmm::config::{KernelSum, VmConfig};
use bulkhead_vmm::control::ClientError;
use bulkhead_vmm::foreseen::{Foreseen, ForeseenError, PAGE_BYTES, count};
use rustix::fs::{MemfdFlags, SealFlags};
use tokio::time::Instant;

use crate::control::{self, ControlError};
use crate::guest::Guest;
use crate::process;
use crate::saved::kernel_sum;

/// How long the guest may take to forget its connection and to fall silent.
const QUIET_LIMIT: Duration = Duration::from_secs(20);
const QUIET_PAUSE: Duration = Duration::from_millis(50);
/// How long a saved VMM may take to end.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Blocks of a file, as `stat` counts them.
const BLOCK_BYTES: u64 = 512;

/// Why there is no template, or no descriptor of one.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("read the guest's kernel for a template")]
    Kernel(#[source] io::Error),
    #[error("make the files of a template")]
    Files(#[source] io::Error),
    #[error("save the template")]
    Save(#[from] ControlError),
    #[error("the VMM of the template went on for {END_LIMIT:?} after it was saved")]
    Alive,
    #[error("seal the template")]
    Seal(#[source] io::Error),
    #[error("this VM is no template")]
    None,
}

/// The files of a template that is yet to boot.
#[derive(Debug)]
pub struct Unsaved {
    memory: OwnedFd,
    state: OwnedFd,
    kernel_sum: KernelSum,
}

/// A template. It is gone when the last owner has dropped it, and the last fork has ended.
#[derive(Debug)]
pub struct Template {
    memory: OwnedFd,
    state: OwnedFd,
    kernel_sum: KernelSum,
    pub memory_mib: u32,
    /// The most that a fork can have.
    pub vcpus: u8,
    /// What its memory takes on the host.
    pub bytes: u64,
    /// Set when a fork has shown it.
    foreseen: OnceLock<Foreseen>,
}

/// Why nothing is learned from a fork.
#[derive(Debug, thiserror::Error)]
enum LearnError {
    #[error("look at the memory of its VMM")]
    Look(#[source] io::Error),
    #[error("its VMM has ended")]
    Ended,
    #[error("what it used")]
    Used(#[from] ForeseenError),
}

impl Unsaved {
    /// Files for a template with so much memory, whose kernel is in this file. Blocks while it reads that.
    pub fn new(kernel: &Path, memory_mib: u32) -> Result<Self, TemplateError> {
        let kernel_sum = kernel_sum(kernel).map_err(TemplateError::Kernel)?;
        let memory = anonymous("template-memory").map_err(TemplateError::Files)?;
        rustix::fs::ftruncate(&memory, u64::from(memory_mib) << 20)
            .map_err(|e| TemplateError::Files(e.into()))?;
        Ok(Self {
            memory,
            state: anonymous("template-state").map_err(TemplateError::Files)?,
            kernel_sum,
        })
    }

    pub(crate) fn kernel_sum(&self) -> KernelSum {
        self.kernel_sum
    }

    /// Memory and state, for the VMM that will write them.
    pub(crate) fn for_vmm(&self) -> Result<(OwnedFd, OwnedFd), TemplateError> {
        let both = || Ok((self.memory.try_clone()?, self.state.try_clone()?));
        both().map_err(TemplateError::Files)
    }

    /// Saves the VM of this guest, which has just become ready and to which nobody is connected.
    pub(crate) async fn save(
        self,
        config: &VmConfig,
        guest: &Guest,
    ) -> Result<Template, TemplateError> {
        let deadline = Instant::now() + QUIET_LIMIT;
        loop {
            tokio::time::sleep(QUIET_PAUSE).await;
            match control::save(&guest.files.control()).await {
                Ok(()) => break,
                Err(ControlError::Request {
                    source: ClientError::Refused(_),
                    ..
                }) if Instant::now() < deadline && guest.process.identity().is_alive() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let ended = tokio::time::timeout(END_LIMIT, guest.process.ended()).await;
        ended.map_err(|_| TemplateError::Alive)?;
        for file in [&self.memory, &self.state] {
            let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            let sealed = rustix::fs::fcntl_add_seals(file, all);
            sealed.map_err(|e| TemplateError::Seal(e.into()))?;
        }
        let taken = File::from(self.memory.try_clone().map_err(TemplateError::Files)?);
        let taken = taken.metadata().map_err(TemplateError::Files)?.blocks();
        Ok(Template {
            memory: self.memory,
            state: self.state,
            kernel_sum: self.kernel_sum,
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            bytes: taken.saturating_mul(BLOCK_BYTES),
            foreseen: OnceLock::new(),
        })
    }
}

impl Template {
    pub(crate) fn kernel_sum(&self) -> KernelSum {
        self.kernel_sum
    }

    /// Memory and state, for the VMM of a fork: each with a position of its own, and only for reading.
    pub(crate) fn for_vmm(&self) -> Result<(OwnedFd, OwnedFd), TemplateError> {
        let both = || Ok((reopened(&self.memory)?, reopened(&self.state)?));
        both().map_err(TemplateError::Files)
    }

    /// Which pages a fork is going to use. `None` if no fork has shown it yet.
    pub fn foreseen(&self) -> Option<&Foreseen> {
        self.foreseen.get()
    }

    /// Learns which pages a fork uses until its guest is a pod's, from one with this VMM that was started when nothing was
    /// foreseen yet. Call it before that guest has a container, so that nothing of a tenant is learned. Blocks. If it fails,
    /// forks go without, and their pages are mapped one by one.
    pub fn learn(&self, vmm: process::Identity) {
        let foreseen = match self.learned(vmm) {
            Ok(foreseen) => foreseen,
            // The next fork shows it.
            Err(LearnError::Ended) => return,
            Err(error) => {
                let error = chain(&error);
                tracing::warn!("forks start slower, nothing is learned from the first: {error}");
                Foreseen::default()
            }
        };
        let [written, read] = [&foreseen.written, &foreseen.read].map(|runs| count(runs));
        let [written_runs, read_runs] = [foreseen.written.len(), foreseen.read.len()];
        // Forks that start at once may all be the first.
        if self.foreseen.set(foreseen).is_ok() {
            tracing::info!(
                memory_mib = self.memory_mib,
                written,
                written_runs,
                read,
                read_runs,
                "pages that a fork uses"
            );
        }
    }

    fn learned(&self, vmm: process::Identity) -> Result<Foreseen, LearnError> {
        let pages = (u64::from(self.memory_mib) << 20) / PAGE_BYTES;
        let file = identity(&self.memory).map_err(LearnError::Look)?;
        let foreseen = match used::used(vmm.pid, file, pages) {
            Err(_) if !vmm.is_alive() => return Err(LearnError::Ended),
            looked => looked.map_err(LearnError::Look)?,
        };
        foreseen.check(pages)?;
        match vmm.is_alive() {
            true => Ok(foreseen),
            false => Err(LearnError::Ended),
        }
    }
}

fn anonymous(name: &str) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(rustix::fs::memfd_create(name, flags)?)
}

fn identity(file: &OwnedFd) -> io::Result<used::Identity> {
    let stat = rustix::fs::fstat(file)?;
    Ok(used::Identity {
        major: rustix::fs::major(stat.st_dev),
        minor: rustix::fs::minor(stat.st_dev),
        inode: stat.st_ino,
    })
}

fn reopened(file: &OwnedFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(File::open(path)?.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_fork_that_has_ended_shows_nothing_and_the_next_one_does() {
        let template = Template {
            memory: anonymous("memory").unwrap(),
            state: anonymous("state").unwrap(),
            kernel_sum: [0; 32],
            memory_mib: 1,
            vcpus: 1,
            bytes: 0,
            foreseen: OnceLock::new(),
        };
        assert_eq!(template.foreseen(), None);
        let mut vmm = process::Identity::of(std::process::id().cast_signed()).unwrap();
        template.learn(process::Identity {
            start_ticks: vmm.start_ticks + 1,
            ..vmm
        });
        assert_eq!(template.foreseen(), None, "another process with its id");
        template.learn(vmm);
        // This process has no memory of the template, so it shows nothing, once.
        assert_eq!(template.foreseen(), Some(&Foreseen::default()));
        vmm.pid = 0;
        template.learn(vmm);
        assert_eq!(template.foreseen(), Some(&Foreseen::default()));
    }

    #[test]
    fn a_forks_descriptors_are_for_reading() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        assert!(matches!(
            Unsaved::new(&kernel, 1),
            Err(TemplateError::Kernel(_))
        ));
        fs::write(&kernel, "kernel").unwrap();
        let unsaved = Unsaved::new(&kernel, 1).unwrap();
        let (memory, state) = unsaved.for_vmm().unwrap();
        File::from(memory).write_all(b"memory").unwrap();
        File::from(state).write_all(b"state").unwrap();
        let template = Template {
            memory: unsaved.memory,
            state: unsaved.state,
            kernel_sum: unsaved.kernel_sum,
            memory_mib: 1,
            vcpus: 1,
            bytes: 4096,
            foreseen: OnceLock::new(),
        };
        for _ in 0..2 {
            let (_, state) = template.for_vmm().unwrap();
            let mut state = File::from(state);
            assert_eq!(
                io::read_to_string(&state).unwrap(),
                "state",
                "from its start"
            );
            assert!(state.write_all(b"x").is_err());
        }
    }
}
