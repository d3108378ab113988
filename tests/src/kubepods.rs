// SPDX-License-Identifier: Apache-2.0
//! Cgroups of the host like those that kubelet makes for its pods. Dropping them removes them, which fails the test if
//! something is left in one.

use std::fs;
use std::path::{Path, PathBuf};

const CGROUPS: &str = "/sys/fs/cgroup";
const CONTROLLERS: &str = "+cpu +memory +pids";

/// A tree of its own for one test.
#[derive(Debug)]
pub struct Kubepods {
    root: PathBuf,
    made: Vec<PathBuf>,
}

impl Kubepods {
    /// The tree `/kubepods-NAME`.
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

    /// The cgroup of a class of pods (`burstable`, `besteffort`), made if it is not there.
    pub fn class(&mut self, name: &str) -> PathBuf {
        let class = self.root.join(name);
        if !class.exists() {
            fs::create_dir(&class).expect("a class of pods");
            fs::write(class.join("cgroup.subtree_control"), CONTROLLERS).expect("controllers");
            self.made.push(class.clone());
        }
        class
    }

    /// Makes the cgroup of a pod in a class, with values in its files.
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

/// What kubelet says of such a cgroup in CRI.
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
