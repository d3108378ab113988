// SPDX-License-Identifier: Apache-2.0
//! The cgroup of a pod's VM on the host, if the host has cgroup v2. It limits, counts and kills the processes in it.
//!
//! The VM's cgroup is normally inside the one that kubelet made for the pod. But if the RuntimeClass has no overhead,
//! kubelet's cgroup allows only what the containers may use, which is too little for a VM. Then the VM's cgroup is
//! beside kubelet's, with its own limit. Without kubelet it is below the daemon's own cgroup parent.
//!
//! A host without cgroup v2 runs pods all the same, because the VM isolates them. On a host that has it, a VM whose
//! cgroup or limit cannot be made is refused ([`Unbounded`]): it could take what belongs to others.
//!
//! If systemd makes the host's cgroups, only systemd may make cgroups in its slices:
//!
//! ```text
//! kubepods-burstable-podUID.slice    belongs to kubelet
//!     bulkhead-ID.scope              belongs to systemd, which makes it and sets its CPU weight
//!         vm                         belongs to the daemon: processes and limits; systemd's reload does not reset them
//! ```

mod limits;
mod names;
pub mod pids;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_text::chain;

use crate::systemd::{Scope, Systemd, SystemdError};
pub use limits::HostLimits;
use limits::{LimitError, weight};
pub use names::around;
use names::{SCOPE, name_of, relative, scope_of};

const ROOT: &str = "/sys/fs/cgroup";
/// The controllers for pods. Each is enabled on its own, because a host may lack some.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"];

/// Why a VM has no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cgroup {path}")]
    Files { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error("scope of the VM")]
    Scope(#[from] SystemdError),
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// What to do with a VM that cannot be bounded, on a host with cgroup v2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unbounded {
    Refuse,
    /// Run it and log what was not possible.
    Allow,
}

/// Makes the cgroups of VMs. Without a `parent`, because the host has no cgroup v2 or it is not wanted, it makes none.
#[derive(Clone, Debug)]
pub struct Cgroups {
    root: PathBuf,
    parent: Option<PathBuf>,
    unbounded: Unbounded,
    /// Makes the cgroups in slices, if systemd manages the host's cgroups.
    systemd: Option<Systemd>,
}

/// A cgroup that kubelet made for a pod, and what it allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodCgroup {
    pub path: PathBuf,
    /// Its own memory limit; `None` if it has none.
    pub memory_bytes: Option<u64>,
    pub is_cpu_limited: bool,
    /// The limits of huge pages, all sizes together.
    pub hugepage_bytes: u64,
}

impl Cgroups {
    /// `parent` is relative to the root of cgroup v2. With systemd it is the name of a slice, with or without `.slice`.
    pub fn new(parent: Option<&Path>, systemd: Option<Systemd>, unbounded: Unbounded) -> Self {
        let root = Path::new(ROOT);
        let usable = root.join("cgroup.controllers").exists();
        Self {
            unbounded,
            ..Self::below(root, parent.filter(|_| usable), systemd)
        }
    }

    pub(crate) fn below(root: &Path, parent: Option<&Path>, systemd: Option<Systemd>) -> Self {
        let parent = parent.map(|parent| {
            let slice = parent.to_str().filter(|_| systemd.is_some());
            let slice = slice.and_then(names::slice);
            let parent = slice.unwrap_or_else(|| parent.to_owned());
            root.join(parent.strip_prefix("/").unwrap_or(&parent))
        });
        Self {
            parent,
            root: root.to_owned(),
            unbounded: Unbounded::Refuse,
            systemd,
        }
    }

    /// The cgroup that kubelet made for a pod, if it exists. `wanted` is the pod's cgroup parent in CRI.
    pub fn of_pod(&self, wanted: &str) -> Option<PodCgroup> {
        self.parent.as_ref()?;
        if wanted.is_empty() {
            return None;
        }
        let path = relative(wanted).map(|path| self.root.join(path));
        let Some(path) = path.filter(|path| path.join("cgroup.procs").exists()) else {
            tracing::warn!("the cgroup parent {wanted:?} of a pod does not exist");
            return None;
        };
        let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        Some(PodCgroup {
            memory_bytes: read("memory.max").trim().parse().ok(),
            hugepage_bytes: hugepage_bytes(&path),
            is_cpu_limited: !matches!(
                read("cpu.max").split_whitespace().next(),
                None | Some("max")
            ),
            path,
        })
    }

    /// The path of the cgroup for a pod's VM, which needs up to `needed` bytes of memory. `None` if it gets no cgroup.
    pub fn place(
        &self,
        pod: &str,
        given: Option<&PodCgroup>,
        needed: Option<u64>,
    ) -> Option<PathBuf> {
        let name = format!("bulkhead-{pod}");
        let parent = self.parent.as_ref()?;
        let own = match self.is_systemds(parent) {
            true => self.within(parent, &name),
            false => parent.join(format!("pod-{pod}")),
        };
        let Some(given) = given else {
            return Some(own);
        };
        match (given.memory_bytes, needed) {
            (Some(allowed), Some(needed)) if allowed < needed => {
                warn_of_no_overhead(&given.path, allowed, needed);
                let parent = given.path.parent();
                let parent = parent.filter(|parent| *parent != self.root);
                Some(parent.map_or(own, |parent| self.within(parent, &name)))
            }
            _ => Some(self.within(&given.path, &name)),
        }
    }

    fn is_systemds(&self, directory: &Path) -> bool {
        self.systemd.is_some() && names::is_slice(directory)
    }

    fn within(&self, directory: &Path, name: &str) -> PathBuf {
        match self.is_systemds(directory) {
            true => names::in_scope(directory, name),
            false => directory.join(name),
        }
    }

    /// Makes the cgroup `path` with its limits, and moves the process into it. If the VM may be unbounded, only a scope
    /// that systemd does not make is an error.
    pub async fn make(
        &self,
        path: &Path,
        limits: &HostLimits,
        pid: i32,
    ) -> Result<(), CgroupError> {
        let made = faults::around(Step::MakeCgroup, self.make_bounded(path, limits, pid));
        match (made.await, self.unbounded) {
            (
                Err(error @ (CgroupError::Files { .. } | CgroupError::Limit(_))),
                Unbounded::Allow,
            ) => {
                tracing::warn!("a VM is not bounded: {}", chain(&error));
                Ok(())
            }
            (made, _) => made,
        }
    }

    async fn make_bounded(
        &self,
        path: &Path,
        limits: &HostLimits,
        pid: i32,
    ) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::Files {
            path: path.to_owned(),
            source,
        };
        match (&self.systemd, scope_of(path)) {
            (Some(systemd), Some(scope)) => {
                start_scope(systemd, scope, limits, pid).await?;
                // Not `create_dir_all`: if systemd's scope does not exist, this must fail.
                fs::create_dir(path).map_err(failed)?;
                // The scope must have no processes of its own before controllers can be enabled for the cgroup in it.
                enter(path, pid).map_err(failed)?;
                enable_controllers(scope);
            }
            _ => {
                fs::create_dir_all(path).map_err(failed)?;
                self.enable_controllers(path);
                enter(path, pid).map_err(failed)?;
            }
        }
        Ok(limits::write(path, limits)?)
    }

    /// Sets limits of a VM that runs. One that the host cannot set is only logged.
    pub fn limit(&self, path: &Path, limits: &HostLimits) {
        if let Err(error) = limits::write(path, limits) {
            tracing::warn!("a VM is not bounded as it should be: {}", chain(&error));
        }
        let (Some(systemd), Some(scope)) = (&self.systemd, scope_of(path)) else {
            return;
        };
        let weight = weight(limits.cpu_shares);
        let now = fs::read_to_string(scope.join("cpu.weight")).ok();
        if now.is_none_or(|now| now.trim() == weight.to_string()) {
            return;
        }
        let (systemd, unit) = (systemd.clone(), name_of(scope).to_owned());
        tokio::spawn(async move {
            if let Err(error) = systemd.set_cpu_weight(&unit, weight).await {
                tracing::warn!("{}", chain(&error));
            }
        });
    }

    /// Kills all processes in a cgroup and removes it. A cgroup that does not exist is no error.
    pub async fn remove(&self, path: &Path) -> Result<(), tokio::task::JoinError> {
        let owned = path.to_owned();
        tokio::task::spawn_blocking(move || remove(&owned)).await?;
        // systemd removes an empty scope by itself, but perhaps not soon enough: kubelet removes the slice next.
        if let (Some(systemd), Some(scope)) = (&self.systemd, scope_of(path))
            && scope.exists()
            && let Err(error) = systemd.stop(name_of(scope)).await
        {
            tracing::warn!("{}", chain(&error));
        }
        Ok(())
    }

    /// Moves whatever is still in the cgroup `from` into `to`, and removes `from`: KVM has threads of the kernel for a VM,
    /// which stay where the VM was made. Returns whether it is gone.
    pub async fn empty(&self, from: &Path, to: &Path) -> Result<bool, tokio::task::JoinError> {
        let (from, to) = (from.to_owned(), to.to_owned());
        tokio::task::spawn_blocking(move || {
            let left = fs::read_to_string(from.join("cgroup.procs")).unwrap_or_default();
            for pid in left.lines().filter_map(|line| line.parse().ok()) {
                if let Err(error) = enter(&to, pid) {
                    tracing::debug!(pid, "move it into {}: {error}", to.display());
                }
            }
            fs::remove_dir(&from).is_ok() || !from.exists()
        })
        .await
    }

    /// Enables the controllers in every cgroup above `path`, from the top. Errors are expected for a cgroup that has
    /// processes of its own or lacks a controller.
    fn enable_controllers(&self, path: &Path) {
        let mut above: Vec<_> = path.ancestors().skip(1).collect();
        above.reverse();
        for directory in above {
            if directory.starts_with(&self.root) {
                enable_controllers(directory);
            }
        }
    }

    /// The tightest memory limit of the cgroups above `path`.
    pub fn memory_limit(&self, path: &Path) -> Option<u64> {
        let above = path.ancestors().skip(1);
        above
            .take_while(|directory| directory.starts_with(&self.root))
            .filter_map(|directory| {
                let text = fs::read_to_string(directory.join("memory.max")).ok()?;
                text.trim().parse().ok()
            })
            .min()
    }
}

/// The sum of a cgroup's huge page limits. kubelet sets one for each page size of the host.
fn hugepage_bytes(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let limits = entries.filter_map(|entry| {
        let name = entry.file_name();
        let size = name
            .to_str()?
            .strip_prefix("hugetlb.")?
            .strip_suffix(".max")?;
        // Leave out the limits of reservations, which have similar names: hugetlb.2MB.rsvd.max.
        let text = (!size.contains('.')).then(|| fs::read_to_string(entry.path()).ok())??;
        text.trim().parse::<u64>().ok()
    });
    limits.fold(0, u64::saturating_add)
}

/// Warns only once, because it applies to every pod of a RuntimeClass without overhead.
fn warn_of_no_overhead(given: &Path, allowed: u64, needed: u64) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::warn!(
            "{} allows {} MiB of memory, but the pod's VM can use {} MiB. So the VM gets a cgroup beside it, with its own \
             limit, and kubelet's statistics of that cgroup do not count the VM. Give the RuntimeClass an overhead \
             (docs/operating.md). This is logged only once",
            given.display(),
            allowed >> 20,
            needed >> 20
        );
    });
}

fn enable_controllers(directory: &Path) {
    for controller in CONTROLLERS {
        let file = directory.join("cgroup.subtree_control");
        if let Err(e) = fs::write(&file, format!("+{controller}")) {
            tracing::debug!("{}: +{controller}: {e}", file.display());
        }
    }
}

async fn start_scope(
    systemd: &Systemd,
    scope: &Path,
    limits: &HostLimits,
    pid: i32,
) -> Result<(), SystemdError> {
    let unit = name_of(scope);
    let pod = unit.trim_start_matches("bulkhead-").trim_end_matches(SCOPE);
    systemd
        .start(&Scope {
            unit,
            slice: scope.parent().map_or("", name_of),
            description: &format!("Bulkhead: VM of pod {pod}"),
            cpu_weight: weight(limits.cpu_shares),
            pid: pid.unsigned_abs(),
        })
        .await
}

/// How much memory a cgroup uses, with all cgroups below it.
pub fn held_bytes(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path.join("memory.current")).ok()?;
    text.trim().parse().ok()
}

/// The cgroup of a process from its `/proc/PID/cgroup`, if it was made for a VM whose pod's id begins with `digits`.
pub fn of_vm(text: &str, digits: &str) -> Option<PathBuf> {
    // The line of cgroup v2. A host may also have others.
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let path = Path::new(ROOT).join(path);
    names::is_of_pod(&path, digits).then_some(path)
}

/// Moves a process into the cgroup `path`.
pub fn enter(path: &Path, pid: i32) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), pid.to_string())
}

/// Whether the kernel killed a process in a cgroup because memory ran out.
pub fn was_oom_killed(path: &Path) -> bool {
    let events = fs::read_to_string(path.join("memory.events")).unwrap_or_default();
    let kills = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    kills.is_some_and(|kills| kills.trim() != "0")
}

/// Kills all processes in a cgroup and removes it, which may fail for a moment because killed processes are still
/// ending.
fn remove(path: &Path) {
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
    tracing::warn!(
        "cgroup {} still has processes after they were killed; it stays",
        path.display()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_in_its_pods_cgroup_if_that_is_there_and_has_room_and_else_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::below(root.path(), Some(Path::new("bulkhead")), None);
        let own = root.path().join("bulkhead/pod-x");
        assert_eq!(cgroups.of_pod(""), None);
        assert_eq!(cgroups.of_pod("/kubepods/p"), None);
        assert_eq!(cgroups.place("x", None, Some(1)), Some(own.clone()));
        let parent = root.path().join("kubepods/p");
        fs::create_dir_all(&parent).unwrap();
        fs::write(parent.join("cgroup.procs"), "").unwrap();
        for (size, limit) in [("2MB", "4096"), ("1GB", "max"), ("2MB.rsvd", "9")] {
            fs::write(parent.join(format!("hugetlb.{size}.max")), limit).unwrap();
        }
        let given = cgroups.of_pod("/kubepods/p").unwrap();
        assert_eq!((given.memory_bytes, given.is_cpu_limited), (None, false));
        assert_eq!(given.hugepage_bytes, 4096);
        let below = cgroups.place("x", Some(&given), None).unwrap();
        assert_eq!(below, parent.join("bulkhead-x"));
        assert_eq!(cgroups.memory_limit(&below), None);
        fs::write(parent.join("memory.max"), "5000\n").unwrap();
        fs::write(parent.join("cpu.max"), "50000 100000\n").unwrap();
        let given = cgroups.of_pod("/kubepods/p").unwrap();
        assert_eq!(
            (given.memory_bytes, given.is_cpu_limited),
            (Some(5000), true)
        );
        for (needed, expected) in [
            (Some(5000), &below),
            (None, &below),
            (Some(5001), &root.path().join("kubepods/bulkhead-x")),
        ] {
            let found = cgroups.place("x", Some(&given), needed);
            assert_eq!(found.as_ref(), Some(expected), "{needed:?}");
        }
        let top = PodCgroup {
            path: root.path().join("p"),
            ..given
        };
        assert_eq!(cgroups.place("x", Some(&top), Some(5001)), Some(own));
        fs::write(parent.join("memory.max"), "max\n").unwrap();
        fs::write(root.path().join("kubepods/memory.max"), "4096\n").unwrap();
        assert_eq!(cgroups.memory_limit(&below), Some(4096));
        let none = Cgroups::below(root.path(), None, None);
        assert_eq!(none.of_pod("/kubepods/p"), None);
        assert_eq!(none.place("x", None, None), None);
    }
    #[tokio::test]
    async fn a_vm_that_cannot_be_bounded_is_refused_unless_that_is_allowed() {
        let root = tempfile::tempdir().unwrap();
        let refusing = Cgroups::below(root.path(), Some(Path::new("bulkhead")), None);
        let allowing = Cgroups {
            unbounded: Unbounded::Allow,
            ..refusing.clone()
        };
        let limits = HostLimits {
            memory_bytes: Some(5),
            ..Default::default()
        };
        let path = root.path().join("bulkhead/pod-x");
        refusing.make(&path, &limits, 7).await.unwrap();
        // As where the memory controller is not enabled.
        fs::remove_file(path.join("memory.max")).unwrap();
        fs::create_dir(path.join("memory.max")).unwrap();
        let error = chain(&refusing.make(&path, &limits, 7).await.unwrap_err());
        assert!(error.contains("memory.max to \"5\""), "{error}");
        allowing.make(&path, &limits, 7).await.unwrap();
        // As where the daemon may not make cgroups.
        let no_directory = path.join("cpu.max/pod-y");
        let error = refusing.make(&no_directory, &limits, 7).await.unwrap_err();
        assert!(matches!(error, CgroupError::Files { .. }), "{error}");
        allowing.make(&no_directory, &limits, 7).await.unwrap();
    }
}
