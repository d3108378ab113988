// SPDX-License-Identifier: Apache-2.0
//! What `/proc` says of one process (proc(5)), read and taken apart, without a judgement.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A file of a process that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("read {path} (the process has ended, or you are not root)")]
pub struct ReadError {
    pub path: PathBuf,
    pub source: io::Error,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    pub threads: Vec<Thread>,
    /// Who owns its files in `/proc`: root if it is not dumpable, else its user.
    pub owner: u32,
    pub session: i32,
    /// The number of its terminal, 0 if it has none.
    pub terminal: i32,
    /// For each kind, such as `mnt`, the name of its namespace, such as `mnt:[4026531841]`.
    pub namespaces: BTreeMap<String, String>,
    /// The soft limits by their names in `/proc`, in lower case.
    pub limits: BTreeMap<String, String>,
    pub descriptors: Vec<Descriptor>,
    /// The names in its root directory.
    pub root: Vec<String>,
    pub mounts: Vec<Mount>,
    /// Its path in cgroup v2.
    pub cgroup: String,
    pub oom_score_adj: i32,
    pub environment_bytes: usize,
}

/// One thread of a process.
#[derive(Debug)]
pub struct Thread {
    pub name: String,
    pub status: Status,
}

/// The lines of a file `status`.
#[derive(Debug, Default)]
pub struct Status(BTreeMap<String, String>);

/// One open descriptor.
#[derive(Debug)]
pub struct Descriptor {
    pub number: u32,
    /// What the link in `/proc/PID/fd` says, such as `/dev/kvm`, `socket:[123]` or `anon_inode:kvm-vm`.
    pub target: String,
    pub writable: bool,
    /// The number of the device, if it is a block device.
    pub block_device: Option<u64>,
    pub is_character_device: bool,
    pub is_directory: bool,
}

/// One mount.
#[derive(Debug)]
pub struct Mount {
    pub place: String,
    pub options: Vec<String>,
}

impl Process {
    /// Reads what `proc`, normally `/proc`, says of a process.
    pub fn read(proc: &Path, pid: i32) -> Result<Self, ReadError> {
        let at = proc.join(pid.to_string());
        let stat = text(&at.join("stat"))?;
        let (session, terminal) = session_and_terminal(&stat).unwrap_or_default();
        Ok(Self {
            pid,
            threads: threads(&at)?,
            owner: metadata(&at.join("status"))?.uid(),
            session,
            terminal,
            namespaces: links(&at.join("ns"))?.into_iter().collect(),
            limits: limits(&text(&at.join("limits"))?),
            descriptors: descriptors(&at)?,
            root: names(&at.join("root"))?,
            mounts: mounts(&text(&at.join("mountinfo"))?),
            cgroup: cgroup(&text(&at.join("cgroup"))?),
            oom_score_adj: number(&text(&at.join("oom_score_adj"))?),
            environment_bytes: text(&at.join("environ"))?.len(),
        })
    }

    /// The status of its first thread.
    pub fn status(&self) -> &Status {
        static NONE: Status = Status(BTreeMap::new());
        let first = self.threads.first();
        first.map_or(&NONE, |thread| &thread.status)
    }
}

impl Status {
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.trim().to_owned());
        Self(lines.map(owned).collect())
    }

    /// The value of a line, empty if this kernel has no such line.
    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    /// The numbers of a line such as `Uid`, which has the real, effective, saved and file system user.
    pub fn numbers(&self, key: &str) -> Vec<u32> {
        let words = self.get(key).split_whitespace();
        words.filter_map(|word| word.parse().ok()).collect()
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ReadError {
    let path = path.to_owned();
    move |source| ReadError { path, source }
}

fn text(path: &Path) -> Result<String, ReadError> {
    let bytes = fs::read(path).map_err(failed(path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn metadata(path: &Path) -> Result<fs::Metadata, ReadError> {
    fs::metadata(path).map_err(failed(path))
}

fn names(directory: &Path) -> Result<Vec<String>, ReadError> {
    let entries = fs::read_dir(directory).map_err(failed(directory))?;
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = entries.flatten().map(name).collect();
    names.sort();
    Ok(names)
}

/// The links in a directory, by their names.
fn links(directory: &Path) -> Result<Vec<(String, String)>, ReadError> {
    let read = |name: String| {
        // One that is closed meanwhile is left out.
        let target = fs::read_link(directory.join(&name)).ok()?;
        Some((name, target.to_string_lossy().into_owned()))
    };
    Ok(names(directory)?.into_iter().filter_map(read).collect())
}

fn threads(at: &Path) -> Result<Vec<Thread>, ReadError> {
    let tasks = at.join("task");
    let mut ids: Vec<u32> = names(&tasks)?
        .iter()
        .filter_map(|id| id.parse().ok())
        .collect();
    ids.sort_unstable();
    // One that ends meanwhile is left out.
    let read = |id: u32| {
        let task = tasks.join(id.to_string());
        let (name, status) = (
            text(&task.join("comm")).ok()?,
            text(&task.join("status")).ok()?,
        );
        Some(Thread {
            name: name.trim().to_owned(),
            status: Status::parse(&status),
        })
    };
    Ok(ids.into_iter().filter_map(read).collect())
}

/// Fields 6 and 7 of `stat`. The name in parentheses may contain anything, so fields are counted after the last `)`.
fn session_and_terminal(stat: &str) -> Option<(i32, i32)> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(3);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// Lines such as `Max core file size   0   0   bytes`: columns are two spaces or more apart.
fn limits(text: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        let mut columns = line
            .split("  ")
            .map(str::trim)
            .filter(|column| !column.is_empty());
        let name = columns.next()?.strip_prefix("Max ")?.to_lowercase();
        Some((name, columns.next()?.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

fn descriptors(at: &Path) -> Result<Vec<Descriptor>, ReadError> {
    let all = links(&at.join("fd"))?
        .into_iter()
        .filter_map(|(name, target)| {
            let number = name.parse().ok()?;
            let info = text(&at.join("fdinfo").join(&name)).unwrap_or_default();
            let found = fs::metadata(at.join("fd").join(&name)).ok();
            let mode = found.as_ref().map_or(0, MetadataExt::mode) & libc::S_IFMT;
            Some(Descriptor {
                number,
                target,
                writable: flags(&info) & libc::O_ACCMODE != libc::O_RDONLY,
                block_device: found
                    .filter(|_| mode == libc::S_IFBLK)
                    .map(|found| found.rdev()),
                is_character_device: mode == libc::S_IFCHR,
                is_directory: mode == libc::S_IFDIR,
            })
        });
    Ok(all.collect())
}

/// The flags of open(2) in a file of `fdinfo`, which has them in octal.
fn flags(info: &str) -> i32 {
    let mut lines = info.lines();
    let flags = lines.find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|text| i64::from_str_radix(text.trim(), 8).ok());
    flags
        .and_then(|flags| i32::try_from(flags).ok())
        .unwrap_or_default()
}

/// Lines of mountinfo. The fifth field is the place, the sixth the options of this mount.
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(4);
        Some(Mount {
            place: fields.next()?.to_owned(),
            options: fields.next()?.split(',').map(str::to_owned).collect(),
        })
    };
    text.lines().filter_map(mount).collect()
}

fn cgroup(text: &str) -> String {
    let mut lines = text.lines();
    let path = lines.find_map(|line| line.strip_prefix("0::"));
    path.unwrap_or_default().to_owned()
}

fn number(text: &str) -> i32 {
    text.trim().parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_are_taken_apart() {
        let status = Status::parse("Name:\tmain\nUid:\t7\t8\t9\t10\nGroups:\t\nSeccomp:\t2\n");
        assert_eq!(status.numbers("Uid"), [7, 8, 9, 10]);
        assert_eq!((status.get("Groups"), status.get("Seccomp")), ("", "2"));
        assert_eq!(status.get("no such line"), "");
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max core file size        0                    unlimited            bytes     \n\
                    Max processes             65                   65                   processes \n";
        let limits = limits(text);
        assert_eq!(limits["core file size"], "0");
        assert_eq!(limits["processes"], "65");
        assert_eq!(
            session_and_terminal("4 (a) b) S 1 4 4 34816 -1"),
            Some((4, 34816))
        );
        assert_eq!(
            flags("pos:\t0\nflags:\t02100002\nmnt_id:\t3\n"),
            0o2_100_002
        );
        let mounts = mounts("90 80 0:50 / / ro,nosuid,nodev - tmpfs none rw,size=256k\n");
        assert_eq!(mounts[0].place, "/");
        assert_eq!(mounts[0].options, ["ro", "nosuid", "nodev"]);
        assert_eq!(
            cgroup("1:name=systemd:/x\n0::/bulkhead/pod-1\n"),
            "/bulkhead/pod-1"
        );
    }

    #[test]
    fn this_process_can_be_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let process = Process::read(Path::new("/proc"), pid).unwrap();
        assert_eq!(process.status().numbers("Uid").len(), 4);
        assert!(process.namespaces["mnt"].starts_with("mnt:["));
        assert!(process.limits.contains_key("open files"));
        assert!(process.descriptors.iter().any(|one| one.number == 2));
        assert!(!process.root.is_empty() && !process.mounts.is_empty());
    }
}
