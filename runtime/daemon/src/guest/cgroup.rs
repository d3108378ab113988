// SPDX-License-Identifier: Apache-2.0
//! The host cgroup of a VMM, where the host has cgroup v2: it groups and accounts, best effort.
//!
//! A host without it, or where we may not make one, runs pods all the same: the isolation is the VM's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Where cgroups of pods are made; `None` if the host has no cgroup v2 or none is wanted.
#[derive(Clone, Debug)]
pub struct Cgroups {
    parent: Option<PathBuf>,
}

impl Cgroups {
    /// `parent` is relative to the root of cgroup v2.
    pub fn new(parent: Option<&Path>) -> Self {
        let usable = Path::new(ROOT).join("cgroup.controllers").exists();
        let parent = parent.filter(|_| usable).map(|parent| {
            let relative = parent.strip_prefix("/").unwrap_or(parent);
            Path::new(ROOT).join(relative)
        });
        Self { parent }
    }

    /// The cgroup of one pod.
    pub fn path(&self, pod: &str) -> Option<PathBuf> {
        Some(self.parent.as_ref()?.join(format!("pod-{pod}")))
    }

    /// Moves a process into the pod's cgroup.
    pub fn enter(&self, pod: &str, pid: i32) -> io::Result<()> {
        let Some(path) = self.path(pod) else {
            return Ok(());
        };
        fs::create_dir_all(&path)?;
        fs::write(path.join("cgroup.procs"), pid.to_string())
    }
}

/// Removes a cgroup, and kills what is left in it. One that is gone is fine.
pub fn remove(path: &Path) {
    if !path.exists() {
        return;
    }
    let _ = fs::write(path.join("cgroup.kill"), "1");
    for _ in 0..50 {
        match fs::remove_dir(path) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Ok(()) => return,
            Err(e) => {
                tracing::warn!("remove cgroup {}: {e}", path.display());
                return;
            }
        }
    }
    tracing::warn!("cgroup {} stays busy", path.display());
}
