// SPDX-License-Identifier: Apache-2.0
//! Pods that ask for nothing, among the host's cgroups: with the weights that kubelet gives them, and with neighbours that
//! leave them no CPU.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use crate::kubepods::{Kubepods, cgroup_parent};

const CLASS: &str = "besteffort";

/// A tree of cgroups as kubelet's, for pods that ask for nothing.
#[derive(Debug)]
pub struct BestEffort {
    // Dropped first: a cgroup with processes cannot be removed.
    hogs: Hogs,
    kubepods: Kubepods,
}

#[derive(Debug, Default)]
struct Hogs(Vec<Child>);

impl BestEffort {
    /// `name`: of the tree, which must be new. The least weight for all its pods together.
    pub fn new(name: &str) -> Self {
        let mut kubepods = Kubepods::new(name);
        // What kubelet gives a node of one CPU: 1024 shares; and a class that has no requests: 2.
        let class = kubepods.class(CLASS);
        write(&class, "cpu.weight", "1");
        write(class.parent().expect("the tree"), "cpu.weight", "39");
        Self {
            hogs: Hogs::default(),
            kubepods,
        }
    }

    /// Makes the cgroup of one pod with this weight; returns what CRI calls it.
    pub fn pod(&mut self, name: &str, weight: u32) -> String {
        let weight = weight.to_string();
        let files = [("cpu.weight", weight.as_str())];
        cgroup_parent(&self.kubepods.pod(CLASS, name, &files))
    }

    /// Keeps every CPU busy from a neighbour's cgroup.
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

    /// Ends the hogs.
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
