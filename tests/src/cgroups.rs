// SPDX-License-Identifier: Apache-2.0
//! Host cgroups like those that kubelet makes for its pods.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use crate::wait::{try_until_blocking, whether};

const CGROUPS: &str = "/sys/fs/cgroup";
const CONTROLLERS: &str = "+cpu +memory +pids";
/// The QoS class of pods without requests and limits.
const BEST_EFFORT: &str = "besteffort";

/// The cgroups of one test. They are removed on drop; if one still contains something, the test fails.
#[derive(Debug)]
pub struct Kubepods {
    root: PathBuf,
    made: Vec<PathBuf>,
}

impl Kubepods {
    /// Makes the tree `/kubepods-NAME`.
    pub fn new(name: &str) -> Self {
        let root = Path::new(CGROUPS).join(format!("kubepods-{name}"));
        fs::create_dir(&root).expect("a root for pods");
        for directory in [Path::new(CGROUPS), &root] {
            fs::write(directory.join("cgroup.subtree_control"), CONTROLLERS).expect("controllers");
        }
        Self {
            made: vec![root.clone()],
            root,
        }
    }

    /// The cgroup of a QoS class (`burstable`, `besteffort`), created if it does not exist.
    pub fn class(&mut self, name: &str) -> PathBuf {
        let class = self.root.join(name);
        if !class.exists() {
            fs::create_dir(&class).expect("a class of pods");
            fs::write(class.join("cgroup.subtree_control"), CONTROLLERS).expect("controllers");
            self.made.push(class.clone());
        }
        class
    }

    /// Makes the cgroup of a pod in a QoS class and writes these values to its files.
    pub fn pod(&mut self, class: &str, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let pod = self.class(class).join(format!("pod{name}"));
        fs::create_dir(&pod).expect("a pod's cgroup");
        self.made.push(pod.clone());
        for (file, value) in files {
            fs::write(pod.join(file), value).expect("a limit");
        }
        pod
    }
}

impl Drop for Kubepods {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            let removed = fs::remove_dir(path);
            if !std::thread::panicking() {
                removed.unwrap_or_else(|e| panic!("{} stays: {e}", path.display()));
            }
        }
    }
}

/// The name of such a cgroup in CRI (`cgroup_parent`).
pub fn cgroup_parent(pod: &Path) -> String {
    let relative = pod.strip_prefix(CGROUPS).expect("a cgroup");
    format!("/{}", relative.display())
}

/// The cgroups of BestEffort pods with the CPU weights that kubelet sets, and with busy neighbours that take all of the
/// CPU.
#[derive(Debug)]
pub struct BestEffort {
    // Dropped first: a cgroup with processes cannot be removed.
    hogs: Hogs,
    kubepods: Kubepods,
}

#[derive(Debug, Default)]
struct Hogs(Vec<Child>);

impl BestEffort {
    /// Makes the tree `name`, which must not exist. All its pods together have the lowest weight.
    pub fn new(name: &str) -> Self {
        let mut kubepods = Kubepods::new(name);
        // kubelet sets 1024 shares for a node with one CPU and 2 for a class without requests; these are the weights of
        // both.
        let class = kubepods.class(BEST_EFFORT);
        write(&class, "cpu.weight", "1");
        write(class.parent().expect("the tree"), "cpu.weight", "39");
        Self {
            hogs: Hogs::default(),
            kubepods,
        }
    }

    /// Makes the cgroup of one pod with this weight. Returns its name as CRI has it (`cgroup_parent`).
    pub fn pod(&mut self, name: &str, weight: u32) -> String {
        let weight = weight.to_string();
        let files = [("cpu.weight", weight.as_str())];
        cgroup_parent(&self.kubepods.pod(BEST_EFFORT, name, &files))
    }

    /// Starts a busy loop for each CPU in a cgroup beside the pods'.
    pub fn hog(&mut self) {
        let path = self
            .kubepods
            .pod(BEST_EFFORT, "hog", &[("cpu.weight", "100")]);
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        for _ in 0..cpus {
            let hog = Command::new("sh")
                .args(["-c", "while :; do :; done"])
                .spawn();
            let hog = hog.expect("start a hog");
            write(&path, "cgroup.procs", &hog.id().to_string());
            self.hogs.0.push(hog);
        }
    }

    /// Ends the busy loops.
    pub fn calm(&mut self) {
        self.hogs.end();
    }
}

impl Hogs {
    fn end(&mut self) {
        for mut hog in self.0.drain(..) {
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.end();
    }
}

/// Removes a cgroup and those below it, once they contain no process. What stays is not reported, because a test that
/// leaves something has failed already.
pub fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = try_until_blocking("a cgroup can be removed", Duration::from_secs(5), || {
        whether(fs::remove_dir(path).is_ok() || !path.exists(), path)
    });
}

fn write(directory: &Path, file: &str, value: &str) {
    let path = directory.join(file);
    fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// The cgroup (v2) of a process.
pub fn of_process(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    PathBuf::from("/sys/fs/cgroup").join(path.expect("cgroup v2"))
}
