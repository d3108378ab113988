// SPDX-License-Identifier: Apache-2.0
//! A host under systemd: a real systemd as process 1 of new PID, mount, cgroup, UTS and IPC namespaces. It shares the
//! network and the disk with the host.
//!
//! It knows only the units of the test and of D-Bus, because an ordinary boot would, for example, empty the host's
//! `/tmp`. The directories in [`OWN`] are empty and belong to it alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::cgroups::remove_cgroup;
use crate::wait::try_until_blocking;

const CGROUP: &str = "/sys/fs/cgroup/bulkhead-tests-systemd";
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
const PATIENCE: Duration = Duration::from_secs(60);

/// Directories that are replaced by empty ones.
const OWN: &str = "/run /etc/systemd/system /etc/modules-load.d /etc/sysctl.d /etc/bulkhead /etc/cni/net.d \
                   /etc/kubernetes /usr/lib/bulkhead /var/lib/kubelet /var/log/pods";

/// Where systemd looks for units. Not in the distribution's directory: units want its sysinit.target by default, and
/// that wants many others.
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
    # A cgroup with processes cannot enable controllers for those below. The process that waits for systemd outside is
    # in this cgroup until the test moves it; seen from here, its id is 0.
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

/// A running systemd. On drop it is killed with all its processes.
#[derive(Debug)]
pub struct Systemd {
    unshare: Child,
    init: u32,
    log: PathBuf,
}

impl Systemd {
    /// Boots systemd. Its output goes to a file in `directory`.
    pub fn boot(directory: &Path) -> Self {
        assert!(
            Path::new(SYSTEMD).exists(),
            "{SYSTEMD} is missing: install Debian's package systemd, as scripts/test does"
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
        let booted = try_until_blocking("systemd has booted", PATIENCE, || {
            let id = host.unshare.id();
            let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
            let child = children.unwrap_or_default().trim().parse().ok();
            host.init = child.unwrap_or(host.init);
            if host.init != 0 {
                fs::write("/sys/fs/cgroup/cgroup.procs", id.to_string()).expect("leave a cgroup");
            }
            let comm = fs::read_to_string(format!("/proc/{}/comm", host.init));
            let is_up = comm.is_ok_and(|comm| comm == "systemd\n");
            let is_up = is_up && host.path("/run/systemd/private").exists() && host.is_running();
            is_up.then_some(()).ok_or_else(|| host.output())
        });
        booted.unwrap_or_else(|late| panic!("{late}"));
        host
    }

    fn is_running(&self) -> bool {
        let output = self.command(&["systemctl", "is-system-running"]).output();
        output.is_ok_and(|output| output.stdout == b"running\n")
    }

    /// Returns the path by which this process reaches a path of that host.
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

    /// Runs a command on that host and returns its output.
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

    /// Returns the value of a unit's property.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let shown = self.run(&["systemctl", "show", "--value", "--property", name, unit]);
        shown.trim().to_owned()
    }

    /// Returns the cgroup of a process, relative to that host's root. `pid` is the id on that host.
    pub fn cgroup_of(&self, pid: &str) -> String {
        let shown = self.run(&["cat", &format!("/proc/{pid}/cgroup")]);
        let unified = shown.lines().find_map(|line| line.strip_prefix("0::"));
        unified.expect("cgroup v2").to_owned()
    }

    /// Reads a file of a cgroup.
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
