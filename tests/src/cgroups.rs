// SPDX-License-Identifier: Apache-2.0
//! The host cgroups that kubelet makes for pods, with the weights that it gives them. Dropping them takes them away.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

const CGROUPS: &str = "/sys/fs/cgroup";

/// A tree of cgroups as kubelet's below `/kubepods`, for pods that ask for nothing.
#[derive(Debug)]
pub struct BestEffort {
    root: PathBuf,
    hogs: Vec<Child>,
}

impl BestEffort {
    /// `name`: of the tree, which must be new. The least weight for all its pods together.
    pub fn new(name: &str) -> Self {
        let root = Path::new(CGROUPS).join(name);
        let class = root.join("besteffort");
        fs::create_dir_all(&class).expect("cgroups for pods");
        for directory in [Path::new(CGROUPS), &root, &class] {
            let file = directory.join("cgroup.subtree_control");
            fs::write(file, "+cpu").expect("the cpu controller");
        }
        // What kubelet gives a node of one CPU: 1024 shares; and a class that has no requests: 2.
        write(&root, "cpu.weight", "39");
        write(&class, "cpu.weight", "1");
        Self {
            root,
            hogs: Vec::new(),
        }
    }

    /// Makes the cgroup of one pod with this weight; returns what CRI calls it.
    pub fn pod(&self, name: &str, weight: u32) -> String {
        let path = self.root.join("besteffort").join(format!("pod{name}"));
        fs::create_dir_all(&path).expect("the pod's cgroup");
        write(&path, "cpu.weight", &weight.to_string());
        let below = path.strip_prefix(CGROUPS).expect("below the root");
        format!("/{}", below.display())
    }

    /// Keeps every CPU busy from a neighbour's cgroup.
    pub fn hog(&mut self) {
        let path = self.root.join("besteffort/hog");
        fs::create_dir_all(&path).expect("the hog's cgroup");
        write(&path, "cpu.weight", "100");
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        for _ in 0..cpus {
            let hog = Command::new("sh")
                .args(["-c", "while :; do :; done"])
                .spawn();
            let hog = hog.expect("start a hog");
            write(&path, "cgroup.procs", &hog.id().to_string());
            self.hogs.push(hog);
        }
    }

    /// Ends the hogs.
    pub fn calm(&mut self) {
        for mut hog in self.hogs.drain(..) {
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}

impl Drop for BestEffort {
    fn drop(&mut self) {
        self.calm();
        let class = self.root.join("besteffort");
        for entry in fs::read_dir(&class).into_iter().flatten().flatten() {
            // A failed test may have left a VM in it.
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&class);
        let _ = fs::remove_dir(&self.root);
    }
}

fn write(directory: &Path, file: &str, value: &str) {
    let path = directory.join(file);
    fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
