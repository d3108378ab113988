// SPDX-License-Identifier: Apache-2.0
//! Host cgroups for BestEffort pods, with the CPU weights that kubelet sets, and with busy neighbours that take all of
//! the CPU.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use crate::kubepods::{Kubepods, cgroup_parent};

const CLASS: &str = "besteffort";

/// A tree of cgroups like kubelet's, with the class for BestEffort pods.
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
        let class = kubepods.class(CLASS);
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
        cgroup_parent(&self.kubepods.pod(CLASS, name, &files))
    }

    /// Starts a busy loop for each CPU in a cgroup beside the pods'.
    pub fn hog(&mut self) {
        let path = self.kubepods.pod(CLASS, "hog", &[("cpu.weight", "100")]);
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

fn write(directory: &Path, file: &str, value: &str) {
    let path = directory.join(file);
    fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
