// SPDX-License-Identifier: Apache-2.0
//! For unit tests: containers without processes, whose cgroups are directories with the files that a freeze uses.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use bulkhead_proto::agent::{CreateContainerRequest, Identity};
use tempfile::TempDir;
use tokio::sync::watch;

use super::state::State;
use super::{Container, Containers, Process, Versioned};
use crate::cgroup::Cgroup;
use crate::reaper::Reaper;
use crate::seccomp::Program;
use crate::statistics::writable::Counted;
use crate::streams::pump::Log;
use crate::users::PodUsers;
use crate::volumes::Volumes;

#[derive(Debug)]
pub struct Fakes {
    pub containers: Containers,
    cgroups: TempDir,
}

impl Fakes {
    /// A pod of containers that run, with the process ids 1, 2, ...
    pub fn running(ids: &[&str]) -> Self {
        let users = PodUsers::default();
        let volumes = Volumes::new(users.clone());
        let pod = Self {
            containers: Containers::new(Reaper::default(), volumes, users),
            cgroups: tempfile::tempdir().unwrap(),
        };
        for (id, pid) in ids.iter().zip(1..) {
            let cgroup = pod.cgroup(id);
            fs::create_dir(&cgroup).unwrap();
            fs::write(cgroup.join("cgroup.freeze"), "0").unwrap();
            pod.stands_still(id);
            let started_at = Instant::now();
            pod.add(id, State::Running { pid, started_at });
        }
        pod
    }

    /// Its cgroup does not exist, so that it can be removed.
    pub fn add_created(&self, id: &str) {
        self.add(id, State::Created);
    }

    /// Whether what was created as container `id` is frozen.
    pub fn frozen(&self, id: &str) -> bool {
        fs::read_to_string(self.cgroup(id).join("cgroup.freeze")).unwrap() == "1"
    }

    pub fn stands_still(&self, id: &str) {
        self.say(id, "populated 1\nfrozen 1\n");
    }

    pub fn never_stands_still(&self, id: &str) {
        self.say(id, "populated 1\nfrozen 0\n");
    }

    fn say(&self, id: &str, events: &str) {
        fs::write(self.cgroup(id).join("cgroup.events"), events).unwrap();
    }

    fn cgroup(&self, id: &str) -> PathBuf {
        self.cgroups.path().join(id)
    }

    fn add(&self, id: &str, state: State) {
        let container = Arc::new(Container {
            id: Mutex::new(id.to_owned()),
            log: Arc::new(Log::default()),
            spec: CreateContainerRequest {
                id: id.to_owned(),
                ..Default::default()
            },
            process: Process::default(),
            seccomp: Program::default(),
            cgroup: Cgroup::at(self.cgroup(id)),
            rootfs: PathBuf::new(),
            mounts: Vec::new(),
            devices: Vec::new(),
            blocks: Mutex::default(),
            views: Mutex::default(),
            overlay: Mutex::default(),
            state: Mutex::new(Versioned { state, version: 1 }),
            pidfd: Mutex::new(Some(Arc::new(fs::File::open("/dev/null").unwrap().into()))),
            identity: OnceLock::from(Identity {
                uid: 1000,
                ..Default::default()
            }),
            stdin: Mutex::default(),
            terminal: Mutex::default(),
            ended: watch::Sender::new(false),
            written: Counted::default(),
            operation: tokio::sync::Mutex::default(),
        });
        let mut known = self.containers.known();
        known.containers.insert(id.to_owned(), container);
    }
}
