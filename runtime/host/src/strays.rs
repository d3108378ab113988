// SPDX-License-Identifier: Apache-2.0
//! Finds the VMMs and file servers that run on this host, also those that no record names.
//!
//! A process belongs to the VM into whose log it writes its errors: that is its standard error from start to end, and a
//! guest cannot change it. A process whose log was deleted is found too.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cgroup;
use crate::files::Files;
use crate::process::Identity;

/// What the kernel adds to the path of a deleted file.
const DELETED: &str = " (deleted)";

/// A process of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stray {
    pub identity: Identity,
    /// The directory of the VM's files.
    pub directory: PathBuf,
    /// The process's cgroup, if it is one that was made for the VM.
    pub cgroup: Option<PathBuf>,
}

/// All VMMs and file servers whose files are in a directory below `parent`.
pub fn find(parent: &Path) -> Vec<Stray> {
    // The kernel tells paths without links.
    let parent = fs::canonicalize(parent).unwrap_or_else(|_| parent.to_owned());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| stray(pid, &parent)).collect()
}

fn stray(pid: i32, parent: &Path) -> Option<Stray> {
    // Before anything is read of the process, so that all of it is about this one.
    let identity = Identity::of(pid).ok()?;
    let errors = fs::read_link(format!("/proc/{pid}/fd/2")).ok()?;
    let directory = of_log(&errors, parent)?;
    let name = directory.file_name()?.to_str()?;
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok();
    let cgroup = cgroup.and_then(|text| cgroup::of_vm(&text, name));
    identity.is_alive().then_some(Stray {
        identity,
        directory,
        cgroup,
    })
}

/// The directory of the VM whose log this is.
fn of_log(log: &Path, parent: &Path) -> Option<PathBuf> {
    let text = log.to_str()?;
    let log = Path::new(text.strip_suffix(DELETED).unwrap_or(text));
    let directory = log.parent()?;
    let files = Files::new(directory.to_owned());
    let is_log = log == files.vmm_log() || log == files.share_log();
    (is_log && directory.parent() == Some(parent)).then(|| directory.to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_belongs_to_the_vm_into_whose_log_it_writes_its_errors() {
        let parent = Path::new("/run/pods");
        let table = [
            ("/run/pods/a/vmm.log", Some("/run/pods/a")),
            ("/run/pods/a/share.log (deleted)", Some("/run/pods/a")),
            ("/run/pods/a/b/vmm.log", None),
            ("/run/pods/vmm.log", None),
            ("/run/other/a/vmm.log", None),
            ("/run/pods/a/console.log", None),
            ("/dev/null", None),
        ];
        for (log, expected) in table {
            let found = of_log(Path::new(log), parent);
            assert_eq!(found.as_deref(), expected.map(Path::new), "{log}");
        }
    }

    #[test]
    fn processes_are_found_by_their_logs_also_when_these_are_deleted() {
        let parent = tempfile::tempdir().unwrap();
        let files = Files::new(parent.path().join("pod"));
        fs::create_dir(files.directory()).unwrap();
        let start = |log: &Path| {
            let mut command = Command::new("sleep");
            command.arg("1000").stdin(Stdio::null());
            command.stderr(fs::File::create(log).unwrap());
            command.spawn().unwrap()
        };
        let mut vmm = start(&files.vmm_log());
        let mut other = start(&files.console());
        let pid = |child: &std::process::Child| i32::try_from(child.id()).unwrap();
        let found = || {
            let found = find(parent.path()).into_iter();
            let names = found.map(|one| (one.identity.pid, one.directory));
            names.collect::<Vec<_>>()
        };
        let canonical = fs::canonicalize(files.directory()).unwrap();
        let expected = [(pid(&vmm), canonical)];
        let before = found();
        fs::remove_dir_all(files.directory()).unwrap();
        let after = found();
        for child in [&mut vmm, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(before, expected);
        assert_eq!(after, expected);
        assert!(found().is_empty());
    }
}
