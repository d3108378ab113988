// SPDX-License-Identifier: Apache-2.0
//! `bulkhead check --vm POD`: reads in `/proc` what keeps the processes of a running VM in, and says line by line whether
//! it is as it must be. docs/audit-a-vm.md tells how to do the same by hand.
//!
//! The daemon tells which processes they are, what user the VM has, and what it may hold; the kernel tells the rest. So the
//! answer is not what the daemon thinks that it did. [`process`] reads, [`rules`] and [`descriptors`] judge.

mod descriptors;
mod process;
mod rules;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bulkhead_host::cores;
use bulkhead_proto::cri;
use serde::Deserialize;

use super::finding::{self, Finding};
use crate::cli::{CliError, Client};
use descriptors::Allowed;
use process::{Process, ReadError, Status};
use rules::{Known, Others, Role};

const PROC: &str = "/proc";
const LIMITS: [&str; 4] = ["cpu.max", "memory.max", "memory.swap.max", "pids.max"];

/// Why a VM could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error(transparent)]
    Daemon(#[from] CliError),
    #[error("pod {pod}: {message}")]
    Call { pod: String, message: String },
    #[error("pod {0} is not one of Bulkhead's own, or the daemon is older than this program")]
    Foreign(String),
    #[error("the answer of the daemon about pod {pod}")]
    Answer {
        pod: String,
        source: serde_json::Error,
    },
    #[error("pod {0} has no running VM")]
    NotRunning(String),
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// What the daemon tells of a VM, in the status of its pod.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    pid: Option<i32>,
    file_server: Option<i32>,
    daemon: i32,
    user: Option<u32>,
    run_directory: Option<PathBuf>,
    state_directory: Option<PathBuf>,
    /// The modules of guests' kernels.
    modules: PathBuf,
    cgroup: Option<PathBuf>,
    block_devices: BTreeSet<u64>,
}

/// Checks the VM of a pod and prints the results. The exit code is success only if all is as it must be.
pub async fn run(socket: &Path, pod: &str, json: bool) -> Result<ExitCode, AuditError> {
    let (id, told) = ask(socket, pod).await?;
    let findings = look(Path::new(PROC), &id, &told)?;
    Ok(finding::print(&findings, json, "This VM is kept in."))
}

/// Asks the daemon which processes the VM has.
async fn ask(socket: &Path, pod: &str) -> Result<(String, Told), AuditError> {
    let mut client = Client::connect(socket).await?;
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.to_owned(),
        verbose: true,
    };
    let answer = client.runtime.pod_sandbox_status(request).await;
    let answer = answer.map_err(|status| AuditError::Call {
        pod: pod.to_owned(),
        message: status.message().to_owned(),
    })?;
    let answer = answer.into_inner();
    let status = answer.status.unwrap_or_default();
    if status.state() != cri::PodSandboxState::SandboxReady {
        return Err(AuditError::NotRunning(pod.to_owned()));
    }
    let info = answer.info.get("info");
    let info = info.ok_or_else(|| AuditError::Foreign(pod.to_owned()))?;
    let told = serde_json::from_str(info).map_err(|source| AuditError::Answer {
        pod: pod.to_owned(),
        source,
    })?;
    Ok((status.id, told))
}

/// Reads all of the VM's processes and judges them.
fn look(proc: &Path, pod: &str, told: &Told) -> Result<Vec<Finding>, AuditError> {
    let Some(vmm) = told.pid else {
        return Err(AuditError::NotRunning(pod.to_owned()));
    };
    let everybody = everybody(proc);
    let mut ours = vec![(Role::Vmm, vmm)];
    if let Some(outer) = told.file_server {
        let inner = everybody.iter().filter(|one| one.parent == outer);
        ours.extend(inner.map(|one| (Role::FileServer, one.pid)));
        ours.push((Role::Waiting, outer));
    }
    let mut known = known(proc, told)?;
    for one in &everybody {
        if !ours.iter().any(|(_, pid)| *pid == one.pid) {
            known.others.add(one);
        }
    }
    let mut findings = Vec::new();
    for (role, pid) in ours {
        let process = Process::read(proc, pid)?;
        known.allowed.unix_sockets.extend(unix_sockets(proc, pid));
        findings.extend(rules::judge(role, &process, &known));
    }
    findings.push(cores_of(vmm));
    findings.push(Finding::info(
        "not visible",
        "Landlock, and the session keyring: /proc shows neither. A VMM that cannot make its keyring does not start",
    ));
    Ok(findings)
}

/// What the rules compare with, without other processes.
fn known(proc: &Path, told: &Told) -> Result<Known, AuditError> {
    let directories = [&told.run_directory, &told.state_directory];
    let cgroup = told.cgroup.clone();
    let limits = cgroup.iter().flat_map(|path| {
        let read = |file| {
            Some((
                file,
                fs::read_to_string(path.join(file)).ok()?.trim().to_owned(),
            ))
        };
        LIMITS.into_iter().filter_map(read)
    });
    Ok(Known {
        user: told.user.unwrap_or_default(),
        limits: limits.collect(),
        allowed: Allowed {
            directories: directories.into_iter().flatten().cloned().collect(),
            modules: told.modules.clone(),
            devices: told.block_devices.clone(),
            unix_sockets: unix_sockets(proc, told.daemon).collect(),
        },
        daemon: Process::read(proc, told.daemon)?.namespaces,
        others: Others::default(),
        cgroup,
    })
}

/// The unix sockets that were made in the network namespace of a process.
fn unix_sockets(proc: &Path, pid: i32) -> impl Iterator<Item = u64> {
    let table = fs::read_to_string(proc.join(format!("{pid}/net/unix"))).unwrap_or_default();
    descriptors::unix_sockets(&table)
        .collect::<Vec<_>>()
        .into_iter()
}

/// What of a process matters to others.
#[derive(Debug)]
struct Stranger {
    pid: i32,
    parent: i32,
    users: Vec<u32>,
    namespaces: Vec<String>,
}

/// All processes of the host. Those that end meanwhile are left out.
fn everybody(proc: &Path) -> Vec<Stranger> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| stranger(proc, pid)).collect()
}

fn stranger(proc: &Path, pid: i32) -> Option<Stranger> {
    let at = proc.join(pid.to_string());
    let status = Status::parse(&fs::read_to_string(at.join("status")).ok()?);
    let namespaces = fs::read_dir(at.join("ns")).ok()?.flatten();
    let link = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
    let namespaces = namespaces.filter_map(link);
    Some(Stranger {
        pid,
        parent: status.get("PPid").parse().unwrap_or_default(),
        users: status.numbers("Uid"),
        namespaces: namespaces
            .map(|name| name.to_string_lossy().into_owned())
            .collect(),
    })
}

impl Others {
    fn add(&mut self, one: &Stranger) {
        let users = one.users.iter().map(|user| (*user, one.pid));
        self.users.extend(users);
        let namespaces = one.namespaces.iter().map(|name| (name.clone(), one.pid));
        self.namespaces.extend(namespaces);
    }
}

fn cores_of(vmm: i32) -> Finding {
    let name = "cores";
    match cores::cookie(vmm) {
        Some(_) => Finding::fine(name, "no other VM runs on its CPU cores at the same time"),
        None => Finding::info(
            name,
            "no core scheduling: where SMT is active, other processes run beside it on a core (`bulkhead check`)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn who_else_has_a_user_or_a_namespace_is_found() {
        let all = everybody(Path::new(PROC));
        let own = i32::try_from(std::process::id()).unwrap();
        let own = all.iter().find(|one| one.pid == own).unwrap();
        assert!(own.parent > 0);
        let mut others = Others::default();
        others.add(own);
        let user = own.users.first().unwrap();
        assert_eq!(others.users.get(user), Some(&own.pid));
        let mount = own.namespaces.iter().find(|name| name.starts_with("mnt:"));
        assert!(others.namespaces.contains_key(mount.unwrap()));
    }

    #[test]
    fn the_daemons_answer_is_understood() {
        let map: BTreeMap<&str, serde_json::Value> = BTreeMap::from([
            ("pid", 7.into()),
            ("fileServer", serde_json::Value::Null),
            ("daemon", 1.into()),
            ("user", 1_879_048_192_u64.into()),
            ("runDirectory", "/run/bulkhead/pods/1".into()),
            ("stateDirectory", "/var/lib/bulkhead/pods/1".into()),
            ("modules", "/usr/lib/bulkhead/modules.erofs".into()),
            ("cgroup", serde_json::Value::Null),
            ("blockDevices", serde_json::json!([2064])),
            ("cause", serde_json::Value::Null),
        ]);
        let told: Told = serde_json::from_value(serde_json::json!(map)).unwrap();
        assert_eq!((told.pid, told.user), (Some(7), Some(1_879_048_192)));
        assert!(told.block_devices.contains(&2064));
    }
}
