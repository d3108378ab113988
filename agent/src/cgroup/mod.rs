// SPDX-License-Identifier: Apache-2.0
//! A container's cgroup: limits, killing, and memory events.
//!
//! All containers are below one cgroup for the pod, `/sys/fs/cgroup/pod/c-<id>`. This is also the root of the
//! container's cgroup namespace, and execs are in it too, so that every process finds its limits there. The agent
//! itself stays in the root cgroup, where no limit applies.

mod absent;
pub mod devices;
mod freezer;
pub mod limits;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_proto::agent::Resources;
use rustix::process::{Pid, getsid};

use self::devices::Rule;
use crate::sys;

/// The cgroup of the whole guest.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The cgroup of all containers together.
pub const POD: &str = "/sys/fs/cgroup/pod";
const REMOVE_ATTEMPTS: u32 = 100;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);
const MAX_DEPTH: usize = 32;
/// How often the processes of a session are listed while they fork.
const KILL_ROUNDS: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("create cgroup {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error("set {file} to {value:?}")]
    Set {
        file: String,
        value: String,
        source: io::Error,
    },
    #[error("set {file} to {value:?}: the guest's kernel has no such file; {advice}")]
    NotThere {
        file: String,
        value: String,
        advice: &'static str,
    },
    #[error("{0:?} is not a cgroup file that may be set")]
    BadName(String),
    #[error("restrict devices")]
    Devices(#[source] io::Error),
    #[error("freeze or thaw cgroup {path}")]
    Freeze { path: PathBuf, source: io::Error },
    #[error("remove cgroup {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error(
        "a memory limit of {wanted} bytes is below the {used} bytes in use, which cannot be given back: stop what \
         uses them first"
    )]
    InUse { wanted: u64, used: u64 },
}

/// A cgroup, by its directory. Dropping it removes nothing.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

/// Creates the pod's cgroup and enables every controller for containers. Called once, at boot.
pub fn enable_controllers() -> io::Result<()> {
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"))?;
    let wanted: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    fs::create_dir(POD)?;
    for parent in [ROOT, POD] {
        let file = Path::new(parent).join("cgroup.subtree_control");
        fs::write(file, wanted.join(" "))?;
    }
    Ok(())
}

impl Cgroup {
    /// The cgroup of a container. Creates it if it does not exist.
    pub fn create(container_id: &str) -> Result<Self, CgroupError> {
        Self::make(Path::new(POD).join(format!("c-{container_id}")))
    }

    /// The cgroup above all containers.
    pub fn pod() -> Self {
        Self { path: POD.into() }
    }

    #[cfg(test)]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every process in this cgroup and below.
    pub fn pids(&self) -> Vec<i32> {
        pids(&self.path, MAX_DEPTH)
    }

    /// The cgroup that one more process of this container joins. It is the container's own, unless the container has
    /// divided that among children: then the kernel lets no process into it, and the new one joins the `first` process.
    pub fn for_exec(&self, first: i32) -> Self {
        let controllers = fs::read_to_string(self.path.join("cgroup.subtree_control"));
        if controllers.is_ok_and(|controllers| controllers.trim().is_empty()) {
            return self.clone();
        }
        let text = fs::read_to_string(format!("/proc/{first}/cgroup")).unwrap_or_default();
        let path = cgroup_of(&text).filter(|path| path.starts_with(&self.path));
        path.map_or_else(|| self.clone(), |path| Self { path })
    }

    /// Kills the session that the process `leader` has begun, as far as it is in this cgroup. Without `leader` itself,
    /// which must be killed before.
    pub fn kill_session(&self, leader: i32) {
        let mut killed = HashSet::new();
        for _ in 0..KILL_ROUNDS {
            let in_session = |pid: &i32| *pid != leader && session_of(*pid) == Some(leader);
            let found: Vec<i32> = self.pids().into_iter().filter(in_session).collect();
            // A process may have forked before it was killed, so look until there is none that is new.
            if found.iter().all(|pid| killed.contains(pid)) {
                return;
            }
            for pid in found {
                let _ = sys::kill(pid, libc::SIGKILL);
                killed.insert(pid);
            }
        }
    }

    fn make(path: PathBuf) -> Result<Self, CgroupError> {
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(CgroupError::Make { path, source }),
        }
        Ok(Self { path })
    }

    /// The file to which a process writes to join this cgroup.
    pub fn procs(&self) -> String {
        self.path
            .join("cgroup.procs")
            .to_string_lossy()
            .into_owned()
    }

    /// Writes limits. A file that the kernel does not have is an error only if its value is not fulfilled anyway.
    pub fn apply(&self, resources: &Resources, when: limits::When) -> Result<(), CgroupError> {
        for limits::Setting { file, value } in limits::settings(resources, when)? {
            match write_existing(&self.path.join(&file), &value) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    if !absent::is_kept_without(&file, &value) {
                        let advice = absent::advice(&file);
                        return Err(CgroupError::NotThere {
                            file,
                            value,
                            advice,
                        });
                    }
                }
                Err(source) => {
                    return Err(CgroupError::Set {
                        file,
                        value,
                        source,
                    });
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Changes limits. Refuses a memory limit that would make the kernel kill processes at once.
    pub fn update(&self, resources: &Resources) -> Result<(), CgroupError> {
        if let Ok(wanted) = u64::try_from(resources.memory_limit_bytes)
            && wanted > 0
        {
            self.make_room(wanted)?;
        }
        self.apply(resources, limits::When::Update)
    }

    /// Makes the kernel reclaim memory, such as caches, until at most `wanted` bytes are in use.
    fn make_room(&self, wanted: u64) -> Result<(), CgroupError> {
        let used = || {
            let text = fs::read_to_string(self.path.join("memory.current")).unwrap_or_default();
            text.trim().parse::<u64>().unwrap_or(0)
        };
        let before = used();
        if before <= wanted {
            return Ok(());
        }
        // The kernel reclaims as much as it can. The check below shows whether that was enough.
        let _ = write_existing(
            &self.path.join("memory.reclaim"),
            &(before - wanted).to_string(),
        );
        match used() {
            used if used > wanted => Err(CgroupError::InUse { wanted, used }),
            _ => Ok(()),
        }
    }

    /// Sets how likely the OOM killer chooses the processes. A process that ends meanwhile is no error.
    pub fn set_oom_score_adj(&self, score: i32) -> Result<(), CgroupError> {
        for pid in self.pids() {
            let file = format!("/proc/{pid}/oom_score_adj");
            match write_existing(Path::new(&file), &score.to_string()) {
                Err(source)
                    if source.kind() != io::ErrorKind::NotFound
                        && source.raw_os_error() != Some(libc::ESRCH) =>
                {
                    return Err(CgroupError::Set {
                        file,
                        value: score.to_string(),
                        source,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Allows only the default devices and those in `given`.
    pub fn restrict_devices(&self, given: &[Rule]) -> Result<(), CgroupError> {
        let directory = File::open(&self.path).map_err(CgroupError::Devices)?;
        sys::bpf::attach_device_program(directory.as_fd(), &devices::program(given))
            .map_err(CgroupError::Devices)
    }

    /// Kills every process in this cgroup and below, without waiting for their end.
    pub fn kill(&self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
    }

    /// Sends a signal to every process in this cgroup and below.
    pub fn signal(&self, signal: i32) {
        for pid in self.pids() {
            let _ = sys::kill(pid, signal);
        }
    }

    /// Whether the OOM killer has killed a process of this cgroup.
    pub fn was_oom_killed(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        oom_kills(&events) > 0
    }

    /// Kills the remaining processes and removes the cgroup with everything below. Blocks for up to a second.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let mut last = Ok(());
        for _ in 0..REMOVE_ATTEMPTS {
            self.kill();
            last = remove_tree(&self.path, MAX_DEPTH);
            match &last {
                Ok(()) => return Ok(()),
                Err(_) => std::thread::sleep(REMOVE_PAUSE),
            }
        }
        last.map_err(|source| CgroupError::Remove {
            path: self.path.clone(),
            source,
        })
    }

    /// Removes the cgroup if it is empty.
    pub fn remove_if_empty(&self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// Writes to an existing file. A missing file is a `NotFound` error; it is not created.
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    File::options()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

fn session_of(pid: i32) -> Option<i32> {
    let session = getsid(Some(Pid::from_raw(pid)?)).ok()?;
    Some(session.as_raw_nonzero().get())
}

/// The directory of the cgroup in a process's `/proc/<pid>/cgroup`.
fn cgroup_of(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(ROOT).join(path))
}

fn oom_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or(0)
}

fn pids(directory: &Path, depth: usize) -> Vec<i32> {
    let own = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = own
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 0)
        .collect();
    if depth > 0 {
        for child in children(directory) {
            pids.extend(self::pids(&child, depth - 1));
        }
    }
    pids
}

fn remove_tree(directory: &Path, depth: usize) -> io::Result<()> {
    if depth > 0 {
        for child in children(directory) {
            remove_tree(&child, depth - 1)?;
        }
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{cgroup_of, oom_kills};
    use std::path::Path;

    #[test]
    fn the_cgroup_of_a_process_is_found() {
        let of = |text| cgroup_of(text);
        assert_eq!(
            of("0::/pod/c-1/init.scope\n").as_deref(),
            Some(Path::new("/sys/fs/cgroup/pod/c-1/init.scope"))
        );
        assert_eq!(of("0::/\n").as_deref(), Some(Path::new("/sys/fs/cgroup/")));
        assert_eq!(of("1:cpu:/x\n"), None);
        assert_eq!(of(""), None);
    }

    #[test]
    fn oom_kills_are_counted_by_the_kernel() {
        assert_eq!(
            oom_kills("low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n"),
            1
        );
        assert_eq!(oom_kills("oom_kill 0\n"), 0);
        assert_eq!(oom_kills(""), 0);
        assert_eq!(oom_kills("oom_kill nonsense"), 0);
    }
}
