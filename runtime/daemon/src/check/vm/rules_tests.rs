// SPDX-License-Identifier: Apache-2.0
//! Rules on a VMM and a file server as texts of `/proc`, and each rule on one that was changed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;
use crate::check::finding::Verdict;

const PID: i32 = 42;
const USER: u32 = 1_879_048_192;

/// The directory of a healthy VMM in `/proc`. Tests change files before they read it.
struct Fixture(tempfile::TempDir);

impl Fixture {
    fn vmm() -> Self {
        let fixture = Self(tempfile::tempdir().unwrap());
        for (id, name) in [(42, "main"), (43, "vcpu0"), (44, "io")] {
            fixture.write(&format!("task/{id}/comm"), name);
            fixture.write(&format!("task/{id}/status"), &status(USER, 0));
        }
        fixture.write("status", &status(USER, 0));
        fixture.write("stat", "42 (main) S 1 42 42 0 -1");
        fixture.write(
            "limits",
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max core file size        1                    1                    bytes     \n\
             Max file size             10737418240          10737418240          bytes     \n\
             Max data size             unlimited            unlimited            bytes     \n\
             Max processes             65                   65                   processes \n\
             Max open files            5120                 5120                 files     \n\
             Max address space         1610612736           1610612736           bytes     \n",
        );
        fixture.write(
            "mountinfo",
            "90 80 0:50 / / ro,nosuid,nodev,noexec - tmpfs none rw",
        );
        fixture.write("cgroup", "0::/bulkhead/pod-1");
        fixture.write("oom_score_adj", "0");
        fs::write(fixture.path("environ"), "").unwrap();
        for directory in ["root", "fd", "fdinfo", "ns"] {
            fs::create_dir(fixture.path(directory)).unwrap();
        }
        for (number, kind) in (1..).zip(["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]) {
            fixture.link(&format!("ns/{kind}"), &format!("{kind}:[{number}]"));
        }
        fixture.open(0, "pipe:[5]", "0");
        fixture.open(4, "/dev/kvm", "02100002");
        fixture.open(12, "/var/lib/bulkhead/pods/1/scratch.ext4", "02100002");
        fixture
    }

    /// A file server is user 0, has a few capabilities and a root with shares.
    fn server() -> Self {
        let fixture = Self::vmm();
        for id in [42, 43, 44] {
            fixture.write(&format!("task/{id}/status"), &status(0, OF_FILE_SERVER));
        }
        fs::create_dir_all(fixture.path("root/shares")).unwrap();
        fs::create_dir_all(fixture.path("root/proc")).unwrap();
        fixture.write(
            "mountinfo",
            "90 80 0:50 / / ro,nosuid,nodev,noexec - tmpfs none rw\n\
             91 90 0:51 / /proc rw,nosuid,nodev,noexec - proc proc rw\n\
             92 90 8:1 /data /shares/p1 rw,nosuid,nodev,noexec - ext4 /dev/sda1 rw",
        );
        let limits = fs::read_to_string(fixture.path("limits")).unwrap();
        let limits = limits.replace(
            "Max data size             unlimited ",
            "Max data size             536870912 ",
        );
        fixture.write("limits", limits.trim_end());
        fs::remove_file(fixture.path("fd/4")).unwrap();
        fixture.open(7, "/shares/p1/file", "02100002");
        fixture
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(PID.to_string()).join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    fn replace(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from:?}");
        fs::write(self.path(name), text.replace(from, to)).unwrap();
    }

    fn link(&self, name: &str, target: &str) {
        let _ = fs::remove_file(self.path(name));
        symlink(target, self.path(name)).unwrap();
    }

    fn open(&self, number: u32, target: &str, flags: &str) {
        self.link(&format!("fd/{number}"), target);
        self.write(
            &format!("fdinfo/{number}"),
            &format!("pos:\t0\nflags:\t{flags}"),
        );
    }

    fn judge(&self, role: Role, known: &Known) -> Vec<Finding> {
        let process = Process::read(self.0.path(), PID).unwrap();
        judge(role, &process, known)
    }
}

fn status(user: u32, capabilities: u64) -> String {
    format!(
        "Name:\tmain\nPPid:\t1\nUid:\t{user}\t{user}\t{user}\t{user}\nGid:\t{user}\t{user}\t{user}\t{user}\n\
         Groups:\t \nCapInh:\t0000000000000000\nCapPrm:\t{capabilities:016x}\nCapEff:\t{capabilities:016x}\n\
         CapBnd:\t{capabilities:016x}\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2"
    )
}

fn known() -> Known {
    Known {
        user: USER,
        cgroup: Some("/sys/fs/cgroup/bulkhead/pod-1".into()),
        limits: BTreeMap::from([
            ("memory.max", "671088640".into()),
            ("pids.max", "1024".into()),
        ]),
        allowed: Allowed {
            directories: vec!["/var/lib/bulkhead/pods/1".into()],
            ..Allowed::default()
        },
        daemon: BTreeMap::from([("mnt".to_owned(), "mnt:[100]".to_owned())]),
        others: Others {
            users: BTreeMap::from([(0, 1), (USER + 1, 99)]),
            namespaces: BTreeMap::from([("mnt:[100]".to_owned(), 1)]),
        },
    }
}

fn failures(findings: &[Finding]) -> Vec<String> {
    let failed = findings
        .iter()
        .filter(|finding| finding.verdict == Verdict::Fail);
    failed
        .map(|finding| format!("{}: {}", finding.name, finding.found))
        .collect()
}

#[test]
fn a_healthy_vmm_and_file_server_pass_every_rule() {
    let findings = Fixture::vmm().judge(Role::Vmm, &known());
    assert_eq!(failures(&findings), [""; 0]);
    let threads = findings
        .iter()
        .filter(|finding| finding.name == "vmm: thread");
    let threads: Vec<&str> = threads.map(|finding| finding.found.as_str()).collect();
    assert_eq!(
        threads,
        ["main: 2 filters", "vcpu0: 2 filters", "io: 2 filters"]
    );
    let findings = Fixture::server().judge(Role::FileServer, &known());
    assert_eq!(failures(&findings), [""; 0]);
}

/// The rule that fails, what is changed of a good process, and what the failure says.
type Tampered = (&'static str, fn(&Fixture), &'static str);

#[test]
fn each_thing_that_is_not_as_it_must_be_fails_by_name() {
    let table: [Tampered; 19] = [
        (
            "user",
            |f| {
                f.replace(
                    "task/42/status",
                    "Uid:\t1879048192\t1879048192",
                    "Uid:\t1879048192\t0",
                )
            },
            "must be 1879048192",
        ),
        (
            "groups",
            |f| f.replace("task/42/status", "Groups:\t ", "Groups:\t0 27"),
            "0 27",
        ),
        (
            "groups",
            |f| f.replace("task/42/status", "Gid:\t1879048192", "Gid:\t6"),
            "must be 1879048192 four times",
        ),
        (
            "capabilities",
            |f| f.replace("task/43/status", "CapBnd:\t0000", "CapBnd:\t0001"),
            "CapBnd of vcpu0",
        ),
        (
            "no_new_privs",
            |f| f.replace("task/44/status", "NoNewPrivs:\t1", "NoNewPrivs:\t0"),
            "thread io",
        ),
        (
            "thread",
            |f| f.replace("task/43/status", "Seccomp:\t2", "Seccomp:\t0"),
            "vcpu0: seccomp mode is \"0\"",
        ),
        (
            "namespace",
            |f| f.link("ns/mnt", "mnt:[100]"),
            "mnt: the daemon's",
        ),
        (
            "namespace",
            |f| fs::remove_file(f.path("ns/net")).unwrap(),
            "net: /proc does not tell",
        ),
        (
            "root",
            |f| fs::create_dir(f.path("root/etc")).unwrap(),
            "/etc is in it",
        ),
        (
            "root",
            |f| f.replace("mountinfo", " ro,", " rw,"),
            "not a read-only mount",
        ),
        (
            "root",
            |f| {
                f.write(
                    "mountinfo",
                    "1 0 0:5 / / ro,nosuid - tmpfs t rw\n2 1 0:6 / /dev rw - tmpfs t rw",
                )
            },
            "/dev is mounted",
        ),
        (
            "limits",
            |f| f.replace("limits", "size        1         ", "size        unlimited "),
            "core file size is unlimited",
        ),
        (
            "limits",
            |f| f.replace("limits", "1610612736  ", "unlimited  "),
            "address space is unlimited",
        ),
        (
            "descriptors",
            |f| f.open(30, "/etc/shadow", "0"),
            "30 is /etc/shadow",
        ),
        (
            "cgroup",
            |f| f.write("cgroup", "0::/system.slice/bulkhead.service"),
            "must be /bulkhead/pod-1",
        ),
        ("oom", |f| f.write("oom_score_adj", "-999"), "-999"),
        (
            "session",
            |f| f.write("stat", "42 (main) S 1 42 7 0 -1"),
            "session of process 7",
        ),
        (
            "session",
            |f| f.write("stat", "42 (main) S 1 42 42 34816 -1"),
            "terminal",
        ),
        (
            "environment",
            |f| f.write("environ", "PATH=/bin"),
            "10 bytes",
        ),
    ];
    for (rule, change, word) in table {
        let fixture = Fixture::vmm();
        change(&fixture);
        let failures = failures(&fixture.judge(Role::Vmm, &known()));
        assert_eq!(failures.len(), 1, "{rule}: {failures:?}");
        let start = format!("vmm: {rule}: ");
        assert!(
            failures[0].starts_with(&start) && failures[0].contains(word),
            "{failures:?}"
        );
    }
}

#[test]
fn what_another_process_has_too_is_not_the_vms_own() {
    let mut known = known();
    known.others.users.insert(USER, 77);
    known.others.namespaces.insert("uts:[7]".to_owned(), 78);
    known.limits.insert("pids.max", "max".to_owned());
    let failures = failures(&Fixture::vmm().judge(Role::Vmm, &known));
    assert_eq!(failures.len(), 3, "{failures:?}");
    for (failure, word) in
        failures
            .iter()
            .zip(["so is process 77", "uts: process 78", "pids.max is max"])
    {
        assert!(failure.contains(word), "{failure}");
    }
    known.cgroup = None;
    let failures = self::failures(&Fixture::vmm().judge(Role::Vmm, &known));
    assert!(failures[2].contains("none of its own"), "{failures:?}");
}

#[test]
fn a_vmm_whose_files_belong_to_its_user_is_dumpable() {
    let fixture = Fixture::vmm();
    let mut process = Process::read(fixture.0.path(), PID).unwrap();
    process.owner = USER;
    let failures = failures(&judge(Role::Vmm, &process, &known()));
    assert!(
        matches!(failures.as_slice(), [one] if one.starts_with("vmm: dumpable: yes")),
        "{failures:?}"
    );
}

#[test]
fn a_file_server_fails_by_name_too() {
    let table: [Tampered; 4] = [
        (
            "capabilities",
            |f| {
                f.replace(
                    "task/42/status",
                    "CapEff:\t00000000000000df",
                    "CapEff:\t00000000002000df",
                )
            },
            "CapEff of main",
        ),
        (
            "root",
            |f| {
                f.replace(
                    "mountinfo",
                    "/shares/p1 rw,nosuid,nodev,",
                    "/shares/p1 rw,nosuid,",
                )
            },
            "without nodev",
        ),
        (
            "limits",
            |f| f.replace("limits", "536870912", "unlimited"),
            "data size is unlimited",
        ),
        (
            "descriptors",
            |f| f.open(9, "/dev/kvm", "2"),
            "9 is /dev/kvm",
        ),
    ];
    for (rule, change, word) in table {
        let fixture = Fixture::server();
        change(&fixture);
        let failures = failures(&fixture.judge(Role::FileServer, &known()));
        // On a host without KVM its device is no device either.
        if rule == "descriptors" && !Path::new("/dev/kvm").exists() {
            continue;
        }
        assert_eq!(failures.len(), 1, "{rule}: {failures:?}");
        assert!(
            failures[0].starts_with(&format!("file server: {rule}: ")),
            "{failures:?}"
        );
        assert!(failures[0].contains(word), "{failures:?}");
    }
}
