// SPDX-License-Identifier: Apache-2.0
//! A host that systemd runs: a real one, process 1 of namespaces of its own, with the network and the disk of the host.
//!
//! It knows no units but a test's and D-Bus's: an ordinary boot would empty the host's `/tmp`, for one. What it and the test
//! write in [`OWN`] is its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const CGROUP: &str = "/sys/fs/cgroup/bulkhead-tests-systemd";
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the host has empty directories of its own.
const OWN: &str = "/run /etc/systemd/system /etc/modules-load.d /etc/sysctl.d /etc/bulkhead /etc/cni/net.d \
                   /etc/kubernetes /usr/lib/bulkhead /var/lib/kubelet /var/log/pods";

/// Where units are looked for: without the distribution's, whose sysinit.target units by default want, with all that it wants.
const UNITS: &str =
    "/run/systemd/transient:/etc/systemd/system:/run/systemd/system:/run/systemd/generator";

const BOOT: &str = r#"
set -eu
echo $$ >"$CGROUP/cgroup.procs"
exec unshare --pid --mount --cgroup --uts --ipc --fork --mount-proc --kill-child sh -euc '
    mount --make-rprivate /
    mount --make-rshared /
    umount -R /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    for own in $OWN; do mkdir -p "$own"; mount -t tmpfs -o mode=755 tmpfs "$own"; done
    # Who waits for systemd outside leaves its cgroup, which could have no controllers for others: process 0, as seen here.
    alone() { while read -r pid; do [ "$pid" != 0 ] || return 1; done </sys/fs/cgroup/cgroup.procs; }
    until alone; do sleep 0.1; done
    mkdir /run/lock /run/dbus
    cp /usr/lib/systemd/system/dbus.service /usr/lib/systemd/system/dbus.socket /etc/systemd/system/
    for target in sysinit basic tests; do
        printf "[Unit]\nDefaultDependencies=no\n" >"/etc/systemd/system/$target.target"
    done
    exec env -i PATH="$PATH" SYSTEMD_UNIT_PATH="$UNITS" container=tests "$SYSTEMD" --system --unit=tests.target --log-target=console --show-status=no
'
"#;

/// Ends with all that it runs.
#[derive(Debug)]
pub struct Systemd {
    unshare: Child,
    init: u32,
    log: PathBuf,
}

impl Systemd {
    /// Boots; what it says is in a file of `directory`.
    pub fn boot(directory: &Path) -> Self {
        assert!(
            Path::new(SYSTEMD).exists(),
            "no {SYSTEMD}: Debian's package systemd, which scripts/test installs"
        );
        fs::create_dir(CGROUP).expect("a cgroup for systemd");
        let log = directory.join("systemd.log");
        let output = fs::File::create(&log).expect("systemd's log");
        let unshare = Command::new("sh")
            .args(["-c", BOOT])
            .envs([
                ("CGROUP", CGROUP),
                ("OWN", OWN),
                ("SYSTEMD", SYSTEMD),
                ("UNITS", UNITS),
            ])
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second descriptor"))
            .stderr(output)
            .spawn()
            .expect("start unshare");
        let mut host = Self {
            unshare,
            init: 0,
            log,
        };
        let started = Instant::now();
        loop {
            let id = host.unshare.id();
            let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
            let child = children.unwrap_or_default().trim().parse().ok();
            host.init = child.unwrap_or(host.init);
            if host.init != 0 {
                fs::write("/sys/fs/cgroup/cgroup.procs", id.to_string()).expect("leave a cgroup");
            }
            let comm = fs::read_to_string(format!("/proc/{}/comm", host.init));
            let is_up = comm.is_ok_and(|comm| comm == "systemd\n");
            if is_up && host.path("/run/systemd/private").exists() && host.is_running() {
                return host;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "systemd does not boot: {}",
                host.output()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn is_running(&self) -> bool {
        let output = self.command(&["systemctl", "is-system-running"]).output();
        output.is_ok_and(|output| output.stdout == b"running\n")
    }

    /// A path of that host as this one names it.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("a directory")).expect("make a directory");
        fs::write(&path, text).expect("write a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--all", "--target", &self.init.to_string(), "--"])
            .args(arguments);
        command
    }

    /// Runs a command there and gives what it printed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output: Output = self.command(arguments).output().expect("nsenter");
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{arguments:?} ends with {}:\n{shown}{}\nsystemd said:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.output()
        );
        shown
    }

    /// The value of a unit's property.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let shown = self.run(&["systemctl", "show", "--value", "--property", name, unit]);
        shown.trim().to_owned()
    }

    /// Where one of its processes is, below the root of its cgroups; by the id that it has there.
    pub fn cgroup_of(&self, pid: &str) -> String {
        let shown = self.run(&["cat", &format!("/proc/{pid}/cgroup")]);
        let unified = shown.lines().find_map(|line| line.strip_prefix("0::"));
        unified.expect("cgroup v2").to_owned()
    }

    /// What a file of a cgroup has.
    pub fn cgroup_file(&self, cgroup: &str, file: &str) -> String {
        let path = self.path(&format!("/sys/fs/cgroup{cgroup}/{file}"));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim().to_owned()
    }

    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- systemd said:\n{}", self.output());
        }
        let _ = fs::write(Path::new(CGROUP).join("cgroup.kill"), "1");
        let _ = self.unshare.wait();
        remove_cgroup(Path::new(CGROUP));
    }
}

/// With those below it, once the last process is gone.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    for _ in 0..100 {
        if fs::remove_dir(path).is_ok() || !path.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
