// SPDX-License-Identifier: Apache-2.0
//! Host cgroups like those that kubelet makes for its pods. They are removed on drop; if one still contains something,
//! the test fails.

use std::fs;
use std::path::{Path, PathBuf};

const CGROUPS: &str = "/sys/fs/cgroup";
const CONTROLLERS: &str = "+cpu +memory +pids";

/// The cgroups of one test.
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

/// The name of such a cgroup in CRI (`cgroup_parent`).
pub fn cgroup_parent(pod: &Path) -> String {
    let relative = pod.strip_prefix(CGROUPS).expect("a cgroup");
    format!("/{}", relative.display())
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
