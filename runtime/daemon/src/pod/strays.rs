// SPDX-License-Identifier: Apache-2.0
//! What is on the host of pods that the store does not know: its file was lost, or a record of it cannot be read.
//!
//! Their VMs are found by their run directories and ended: nobody could stop them any more, and kubelet makes such pods
//! anew. Then their directories are removed. What does not have the name of a pod's directory is not ours, and stays.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use bulkhead_host::strays::{self, Stray};
use bulkhead_text::chain;

use super::life::record::{Held, PodRecord};
use super::{Pods, owner};

impl Pods {
    /// Ends the VMs and removes the directories that belong to none of `pods`.
    pub(super) async fn sweep_strays(&self, pods: &[PodRecord]) {
        let host = &self.shared.host;
        let held = held_directories(pods);
        let mut busy = HashSet::new();
        for stray in strays::find(&host.run_pods) {
            let name = stray.directory.file_name().map(PathBuf::from);
            let directory = host.run_pods.join(name.unwrap_or_default());
            if held.contains(directory.as_path()) {
                continue;
            }
            if !self.end(&stray).await {
                busy.insert(directory);
            }
        }
        for (parent, digits) in [
            (&host.run_pods, owner::RUN_NAME_DIGITS),
            (&host.state_pods, owner::ID_DIGITS),
        ] {
            for path in entries(parent) {
                match fate(&path, digits, &held, &busy) {
                    Fate::Kept => {}
                    Fate::NotOurs => tracing::warn!(
                        "{} is not the directory of a pod; it stays. Only the daemon should use {}",
                        path.display(),
                        parent.display()
                    ),
                    Fate::Removed => {
                        if let Some(cgroup) = owner::left_cgroup(host, &path)
                            && host.cgroups.remove(&cgroup).await.is_err()
                        {
                            tracing::error!("remove {}", cgroup.display());
                        }
                        remove(&path);
                    }
                }
            }
        }
    }

    /// Ends a process of a VM. Returns whether it has ended.
    async fn end(&self, stray: &Stray) -> bool {
        let pid = stray.identity.pid;
        tracing::error!(
            pid,
            "a VM runs in {}, but no record names its pod; ending it",
            stray.directory.display()
        );
        if let Err(error) = owner::kill(stray.identity).await {
            tracing::error!(pid, "{}", chain(&error));
            return false;
        }
        if let Some(cgroup) = &stray.cgroup
            && self.shared.host.cgroups.remove(cgroup).await.is_err()
        {
            tracing::error!("remove {}", cgroup.display());
        }
        true
    }
}

/// What happens to something in a directory of pods' directories.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Kept,
    NotOurs,
    Removed,
}

/// `digits` is the length of the names here. `busy` are the run directories of VMs that could not be ended.
fn fate(path: &Path, digits: usize, held: &HashSet<&Path>, busy: &HashSet<PathBuf>) -> Fate {
    if held.contains(path) {
        return Fate::Kept;
    }
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.unwrap_or_default();
    let is_name = name.len() == digits && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_directory = path
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.is_dir());
    if !is_name || !is_directory {
        return Fate::NotOurs;
    }
    let is_busy = |one: &PathBuf| {
        let run_name = one.file_name().and_then(|name| name.to_str());
        run_name.is_some_and(|run_name| name.starts_with(run_name))
    };
    match busy.iter().any(is_busy) {
        true => Fate::Kept,
        false => Fate::Removed,
    }
}

fn held_directories(pods: &[PodRecord]) -> HashSet<&Path> {
    let held = pods.iter().flat_map(|pod| &pod.held);
    held.filter_map(|held| match held {
        Held::RunDirectory(path) | Held::StateDirectory(path) => Some(path.as_path()),
        _ => None,
    })
    .collect()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn remove(path: &Path) {
    tracing::warn!("{} belongs to no pod; removing it", path.display());
    if let Err(e) = std::fs::remove_dir_all(path) {
        tracing::warn!("remove {}: {e}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixtures;

    #[test]
    fn only_what_was_a_pods_and_belongs_to_none_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let id = |digit: &str| digit.repeat(64);
        for name in [&id("0"), &id("1"), &id("2"), &id("3")[1..], "lost+found"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::fs::write(at(&id("4")), "a file").unwrap();
        std::os::unix::fs::symlink("/", at(&id("5"))).unwrap();
        let mut pod = fixtures::pod_record();
        pod.held.push(Held::StateDirectory(at(&id("1"))));
        let held = held_directories(std::slice::from_ref(&pod));
        let busy = HashSet::from([PathBuf::from("/run/pods").join("2".repeat(16))]);
        for (name, expected) in [
            (id("0"), Fate::Removed),
            (id("1"), Fate::Kept),
            (id("2"), Fate::Kept),
            (id("3")[1..].to_owned(), Fate::NotOurs),
            ("lost+found".to_owned(), Fate::NotOurs),
            (id("4"), Fate::NotOurs),
            (id("5"), Fate::NotOurs),
        ] {
            assert_eq!(fate(&at(&name), 64, &held, &busy), expected, "{name}");
        }
    }
}
