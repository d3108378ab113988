// SPDX-License-Identifier: Apache-2.0
//! A census: a list of what the host holds for pods. Processes, mounts, namespaces, interfaces, cgroups, files.
//!
//! A test takes one census before and one after. A line that only the second one has is a leak.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

/// One census, as lines that can be compared and read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

impl Census {
    /// Takes a census of the host and of all files below `directories`.
    pub fn take(directories: &[&Path]) -> Self {
        let mut lines = BTreeSet::new();
        processes(&mut lines);
        mounts(&mut lines);
        for (kind, directory) in [("interface", "/sys/class/net"), ("netns", "/run/netns")] {
            for name in names(Path::new(directory)) {
                lines.insert(format!("{kind} {name}"));
            }
        }
        tree("cgroup", Path::new("/sys/fs/cgroup"), true, &mut lines);
        for directory in directories {
            tree("file", directory, false, &mut lines);
        }
        Self(lines)
    }

    /// Asserts that this census has the same lines as `before`.
    pub fn assert_equals(&self, before: &Self) {
        let difference = self.difference(before);
        assert!(difference.is_none(), "{}", difference.unwrap_or_default());
    }

    /// What has changed since `before`, if anything has.
    pub fn difference(&self, before: &Self) -> Option<String> {
        let leaked: Vec<_> = self.0.difference(&before.0).collect();
        let lost: Vec<_> = before.0.difference(&self.0).collect();
        let is_same = leaked.is_empty() && lost.is_empty();
        (!is_same).then(|| format!("leaked: {leaked:#?}\nlost: {lost:#?}"))
    }

    /// The same without processes, for a daemon that was restarted in between and has a new process id.
    pub fn assert_equals_but_for_processes(&self, before: &Self) {
        self.without("process")
            .assert_equals(&before.without("process"));
    }

    /// The census without the lines that begin with `word`.
    pub fn without(&self, word: &str) -> Self {
        let lines = self.0.iter();
        Self(
            lines
                .filter(|line| !line.starts_with(word))
                .cloned()
                .collect(),
        )
    }
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// Lists each process of ours with its id and name, and its network namespace.
fn processes(lines: &mut BTreeSet<String>) {
    for pid in names(Path::new("/proc")) {
        let directory = Path::new("/proc").join(&pid);
        let Ok(name) = fs::read_to_string(directory.join("comm")) else {
            continue;
        };
        let name = name.trim();
        if name.starts_with("bulkhead") || ["containerd", "bridge", "host-local"].contains(&name) {
            lines.insert(format!("process {pid} {name}"));
            if let Ok(namespace) = fs::read_link(directory.join("ns/net")) {
                lines.insert(format!("network namespace {}", namespace.display()));
            }
        }
    }
}

fn mounts(lines: &mut BTreeSet<String>) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for mount in mounts.lines() {
        if let Some(target) = mount.split(' ').nth(4) {
            lines.insert(format!("mount {target}"));
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Lists what is below `directory`; for cgroups only the directories, because each of these is one cgroup.
fn tree(kind: &str, directory: &Path, only_directories: bool, lines: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory || !only_directories {
            lines.insert(format!("{kind} {}", path.display()));
        }
        if is_directory {
            tree(kind, &path, only_directories, lines);
        }
    }
}
