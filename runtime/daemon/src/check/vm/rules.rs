// SPDX-License-Identifier: Apache-2.0
//! What must hold of the processes of a VM. Each rule is one line of the answer. Pure: it looks at what was read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::descriptors::{self, Allowed};
use super::process::{Process, Thread};
use crate::check::finding::Finding;
use bulkhead_text::Problem;

/// The limit of core files for which the kernel writes none and starts no helper. For 0 it would start one.
const NO_CORE: &str = "1";
/// Where cgroup v2 is mounted.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Namespaces that every process has for itself. It has a user namespace too where the host allows it, and the file server
/// never has one, because files of the host have owners there.
const NAMESPACES: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];
const CAPABILITY_SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
/// CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID and SETUID: what it takes to serve files of many owners.
const OF_FILE_SERVER: u64 = 0xdf;
/// A mount in a file server shows files and nothing that the host would run or open as a device.
const QUIET: [&str; 3] = ["nosuid", "nodev", "noexec"];

/// What the rules compare a VM's processes with.
#[derive(Debug, Default)]
pub struct Known {
    /// The user that the pod's record says.
    pub user: u32,
    /// The VM's cgroup, `None` if it has none.
    pub cgroup: Option<PathBuf>,
    /// The values of the cgroup's files of limits.
    pub limits: BTreeMap<&'static str, String>,
    pub allowed: Allowed,
    pub daemon: BTreeMap<String, String>,
    pub others: Others,
}

/// What processes have that are not of this VM.
#[derive(Debug, Default)]
pub struct Others {
    /// For each user, one process of it.
    pub users: BTreeMap<u32, i32>,
    /// For each namespace, one process in it.
    pub namespaces: BTreeMap<String, i32>,
}

/// Which of a VM's processes it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Vmm,
    /// Serves host directories, as user 0 with a few capabilities.
    FileServer,
    /// Waits for the file server. It reads nothing that a guest sent.
    Waiting,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::FileServer => "file server",
            Self::Waiting => "its parent",
        }
    }
}

/// Judges one process.
pub fn judge(role: Role, process: &Process, known: &Known) -> Vec<Finding> {
    let mut answer = Answer {
        role,
        findings: Vec::new(),
    };
    answer.must("user", user(role, process, known));
    answer.must("groups", groups(role, process, known));
    answer.must("capabilities", capabilities(role, process));
    answer.must("no_new_privs", no_new_privs(process));
    match role {
        Role::Waiting => answer.info(
            "seccomp",
            "no filter: it only waits for the file server's end",
        ),
        _ => {
            for thread in &process.threads {
                answer.must("thread", seccomp(thread));
            }
        }
    }
    if role != Role::Waiting {
        for kind in NAMESPACES {
            answer.must("namespace", namespace(kind, process, known));
        }
        answer.must("root", root(role, process));
        answer.must("session", session(process));
    }
    if role == Role::Vmm {
        match namespace("user", process, known) {
            Err(_) => answer.info("namespace", "user: the host's, which allows no other one"),
            own => answer.must("namespace", own),
        }
        answer.must("dumpable", dumpable(process));
    } else {
        answer.info(
            "dumpable",
            "of a process of root, nobody can tell from outside",
        );
    }
    answer.must("limits", limits(role, process));
    answer.must(
        "descriptors",
        match role {
            Role::Vmm => descriptors::of_vmm(&process.descriptors, &known.allowed),
            Role::FileServer => descriptors::of_file_server(&process.descriptors, &known.allowed),
            Role::Waiting => descriptors::of_waiting(&process.descriptors, &known.allowed),
        },
    );
    answer.must("cgroup", cgroup(process, known));
    answer.must("oom", oom(process));
    answer.must("environment", environment(process));
    answer.findings
}

/// The lines about one process.
struct Answer {
    role: Role,
    findings: Vec<Finding>,
}

impl Answer {
    fn must(&mut self, rule: &str, held: Result<String, String>) {
        let name = self.name(rule);
        let held = held.map_err(|why| Problem::new(why, String::new()));
        self.findings.push(Finding::new(name, held));
    }

    fn info(&mut self, rule: &str, text: &str) {
        let name = self.name(rule);
        self.findings.push(Finding::info(name, text));
    }

    fn name(&self, rule: &str) -> String {
        format!("{}: {rule}", self.role.name())
    }
}

fn user(role: Role, process: &Process, known: &Known) -> Result<String, String> {
    let users = process.status().numbers("Uid");
    let expected = own_user(role, known);
    if users != [expected; 4] {
        return Err(format!("is {users:?}, must be {expected} four times"));
    }
    if role != Role::Vmm {
        return Ok("0: files of the host have many owners".to_owned());
    }
    if expected == 0 {
        return Err("is root".to_owned());
    }
    match known.others.users.get(&expected) {
        Some(other) => Err(format!("{expected}, and so is process {other}")),
        None => Ok(format!("{expected}, and no other process is")),
    }
}

fn groups(role: Role, process: &Process, known: &Known) -> Result<String, String> {
    let more = process.status().get("Groups");
    if !more.is_empty() {
        return Err(format!("has supplementary groups: {more}"));
    }
    // A VM's group has the number of its user.
    let expected = own_user(role, known);
    let groups = process.status().numbers("Gid");
    if groups != [expected; 4] {
        return Err(format!("are {groups:?}, must be {expected} four times"));
    }
    Ok(format!("{expected}, no supplementary ones"))
}

/// The user that a process must have.
fn own_user(role: Role, known: &Known) -> u32 {
    match role {
        Role::Vmm => known.user,
        Role::FileServer | Role::Waiting => 0,
    }
}

fn capabilities(role: Role, process: &Process) -> Result<String, String> {
    let most = |set: &str| match (role, set) {
        (Role::FileServer, "CapPrm" | "CapEff" | "CapBnd") => OF_FILE_SERVER,
        _ => 0,
    };
    let mut wrong = BTreeSet::new();
    for thread in &process.threads {
        for set in CAPABILITY_SETS {
            let text = thread.status.get(set);
            let is_within = u64::from_str_radix(text, 16).is_ok_and(|has| has & !most(set) == 0);
            if !is_within {
                wrong.insert(format!("{set} of {} is {text}", thread.name));
            }
        }
    }
    if !wrong.is_empty() {
        return Err(Vec::from_iter(wrong).join(", "));
    }
    Ok(match role {
        Role::FileServer => "at most the seven that files of many owners need".to_owned(),
        _ => "none, in all five sets of each thread".to_owned(),
    })
}

fn no_new_privs(process: &Process) -> Result<String, String> {
    let without = |thread: &&Thread| thread.status.get("NoNewPrivs") != "1";
    match process.threads.iter().find(without) {
        Some(thread) => Err(format!("not set for the thread {}", thread.name)),
        None => Ok("set".to_owned()),
    }
}

fn seccomp(thread: &Thread) -> Result<String, String> {
    let name = &thread.name;
    match (
        thread.status.get("Seccomp"),
        thread.status.get("Seccomp_filters"),
    ) {
        ("2", "") => Ok(format!("{name}: filtered")),
        ("2", filters) => Ok(format!("{name}: {filters} filters")),
        (mode, _) => Err(format!("{name}: seccomp mode is {mode:?}, must be 2")),
    }
}

fn namespace(kind: &str, process: &Process, known: &Known) -> Result<String, String> {
    let Some(own) = process.namespaces.get(kind) else {
        return Err(format!("{kind}: /proc does not tell"));
    };
    if known.daemon.get(kind) == Some(own) {
        return Err(format!("{kind}: the daemon's"));
    }
    match known.others.namespaces.get(own) {
        Some(other) => Err(format!("{kind}: process {other} is in it, too")),
        None => Ok(format!("{own}, its own")),
    }
}

fn root(role: Role, process: &Process) -> Result<String, String> {
    let may: &[&str] = match role {
        Role::Vmm => &[],
        _ => &["proc", "shares"],
    };
    if let Some(name) = process
        .root
        .iter()
        .find(|name| !may.contains(&name.as_str()))
    {
        return Err(format!("/{name} is in it"));
    }
    let mut mounts = process.mounts.iter();
    let has = |options: &[String], wanted: &str| options.iter().any(|option| option == wanted);
    match mounts.next() {
        Some(first) if first.place == "/" && has(&first.options, "ro") => {}
        first => return Err(format!("is not a read-only mount of its own: {first:?}")),
    }
    for mount in mounts {
        let is_known = may
            .iter()
            .any(|name| Path::new(&mount.place).starts_with(format!("/{name}")));
        if !is_known {
            return Err(format!("{} is mounted in it", mount.place));
        }
        // What the host mounts later below a share comes with the host's options.
        if mount.place.matches('/').count() > 2 {
            continue;
        }
        if let Some(missing) = QUIET.iter().find(|option| !has(&mount.options, option)) {
            return Err(format!("{} is mounted without {missing}", mount.place));
        }
    }
    Ok(match role {
        Role::Vmm => "empty and read-only".to_owned(),
        _ => format!("read-only, with {} only", may.join(" and ")),
    })
}

fn dumpable(process: &Process) -> Result<String, String> {
    match process.status().numbers("Uid").first() {
        Some(user) if *user == process.owner => {
            Err("yes: its user may trace it, and it can leave a core dump".to_owned())
        }
        _ => Ok("no: no core dump, and nobody of its user may trace it".to_owned()),
    }
}

fn limits(role: Role, process: &Process) -> Result<String, String> {
    let bounded: &[&str] = match role {
        Role::Vmm => &["processes", "open files", "address space", "file size"],
        Role::FileServer => &["data size", "open files"],
        Role::Waiting => &[],
    };
    let get = |name: &str| process.limits.get(name).map_or("not told", String::as_str);
    if role != Role::Waiting && get("core file size") != NO_CORE {
        return Err(format!(
            "core file size is {}, must be {NO_CORE}",
            get("core file size")
        ));
    }
    let mut shown = vec![format!("core file size {}", get("core file size"))];
    for name in bounded {
        let value = get(name);
        if value.parse::<u64>().is_err() {
            return Err(format!("{name} is {value}, must be bounded"));
        }
        shown.push(format!("{name} {value}"));
    }
    Ok(shown.join(", "))
}

fn cgroup(process: &Process, known: &Known) -> Result<String, String> {
    let Some(cgroup) = &known.cgroup else {
        return Err(format!("{}: the pod has none of its own", process.cgroup));
    };
    let place = cgroup.strip_prefix(CGROUPS).unwrap_or(cgroup);
    if Path::new(process.cgroup.trim_start_matches('/')) != place {
        return Err(format!(
            "is {}, must be /{}",
            process.cgroup,
            place.display()
        ));
    }
    let limit = |file: &str| known.limits.get(file).map_or("not told", String::as_str);
    if limit("pids.max").parse::<u64>().is_err() {
        return Err(format!(
            "pids.max is {}, must be bounded",
            limit("pids.max")
        ));
    }
    let shown = known
        .limits
        .iter()
        .map(|(file, value)| format!("{file} {value}"));
    Ok(format!(
        "{}; {}",
        process.cgroup,
        shown.collect::<Vec<_>>().join(", ")
    ))
}

fn oom(process: &Process) -> Result<String, String> {
    match process.oom_score_adj {
        score @ 0.. => Ok(format!("oom_score_adj {score}")),
        score => Err(format!(
            "oom_score_adj {score}: others are killed before it"
        )),
    }
}

fn session(process: &Process) -> Result<String, String> {
    if process.terminal != 0 {
        return Err(format!("has a terminal ({})", process.terminal));
    }
    if process.session != process.pid {
        return Err(format!("is in the session of process {}", process.session));
    }
    Ok("leads its own, without a terminal".to_owned())
}

fn environment(process: &Process) -> Result<String, String> {
    match process.environment_bytes {
        0 => Ok("empty".to_owned()),
        bytes => Err(format!("{bytes} bytes of the daemon's")),
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
