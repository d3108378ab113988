// SPDX-License-Identifier: Apache-2.0
//! Tests with a fake systemd on a private bus. tests/tests/e2e/systemd.rs tests with the real one.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use zbus::object_server::SignalEmitter;
use zbus::{ObjectPath, OwnedVariant, fdo, interface};

use super::*;
use crate::cgroup::{Cgroups, HostLimits};

const SLICES: &str = "kubepods.slice/kubepods-burstable.slice";

/// `dbus-daemon` for one test.
struct Bus {
    daemon: Child,
    address: String,
}

impl Bus {
    fn start(directory: &Path) -> Self {
        let mut daemon = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--print-address"])
            .arg(format!("--address=unix:path={}/bus", directory.display()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon, of Debian's package dbus, which scripts/test installs");
        let mut address = String::new();
        let mut output = BufReader::new(daemon.stdout.take().unwrap());
        output.read_line(&mut address).unwrap();
        let address = address.trim().to_owned();
        assert!(!address.is_empty(), "dbus-daemon does not start");
        Self { daemon, address }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

type Calls = Arc<Mutex<Vec<String>>>;

struct Manager {
    calls: Calls,
    cgroups: PathBuf,
    /// How its jobs end.
    result: &'static str,
}

#[interface(name = "org.freedesktop.systemd1.Manager")]
impl Manager {
    async fn start_transient_unit(
        &self,
        unit: String,
        mode: String,
        properties: Vec<(String, OwnedVariant)>,
        _auxiliary: Vec<(String, Vec<(String, OwnedVariant)>)>,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> fdo::Result<ObjectPath<'static>> {
        let mut call = format!("start {unit} {mode}");
        for (name, value) in &properties {
            call.push_str(&format!(" {name}={}", **value));
        }
        self.calls.lock().unwrap().push(call);
        if self.result == "done" {
            let scope = self.cgroups.join(&unit);
            fs::create_dir(&scope).unwrap();
            fs::write(scope.join("cpu.weight"), "20\n").unwrap();
        }
        Ok(self.end(&emitter, &unit).await)
    }

    async fn stop_unit(
        &self,
        unit: String,
        mode: String,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> fdo::Result<ObjectPath<'static>> {
        self.calls
            .lock()
            .unwrap()
            .push(format!("stop {unit} {mode}"));
        Ok(self.end(&emitter, &unit).await)
    }

    async fn set_unit_properties(
        &self,
        unit: String,
        runtime: bool,
        properties: Vec<(String, OwnedVariant)>,
    ) {
        for (name, value) in &properties {
            let call = format!("set {unit} {runtime} {name}={}", **value);
            self.calls.lock().unwrap().push(call);
        }
    }

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: ObjectPath<'_>,
        unit: &str,
        result: &str,
    ) -> zbus::Result<()>;
}

impl Manager {
    /// Ends the job before the call is answered, and before that ends another job of the same unit.
    async fn end(&self, emitter: &SignalEmitter<'_>, unit: &str) -> ObjectPath<'static> {
        let path = |number| ObjectPath::try_from(format!("{PATH}/job/{number}")).unwrap();
        for (number, result) in [(6, "canceled"), (7, self.result)] {
            let ended = Self::job_removed(emitter, number, path(number), unit, result).await;
            ended.unwrap();
        }
        path(7)
    }
}

struct Host {
    directory: tempfile::TempDir,
    _bus: Bus,
    _manager: Connection,
    calls: Calls,
    systemd: Systemd,
}

async fn host(result: &'static str) -> Host {
    let directory = tempfile::tempdir().unwrap();
    let bus = Bus::start(directory.path());
    let cgroups = directory.path().join(SLICES);
    fs::create_dir_all(&cgroups).unwrap();
    let calls = Calls::default();
    let manager = Manager {
        calls: Arc::clone(&calls),
        cgroups,
        result,
    };
    let manager = Builder::address(bus.address.as_str())
        .serve_at(PATH, manager)
        .name(NAME)
        .build()
        .await
        .unwrap();
    let systemd = Systemd {
        bus: bus.address.clone(),
        patience: Duration::from_secs(10),
    };
    Host {
        directory,
        _bus: bus,
        _manager: manager,
        calls,
        systemd,
    }
}

fn scope() -> Scope<'static> {
    Scope {
        unit: "bulkhead-x.scope",
        slice: "kubepods-burstable.slice",
        description: "a VM",
        cpu_weight: 39,
        pid: 7,
    }
}

#[tokio::test]
async fn a_vm_is_in_a_scope_of_systemds_and_its_limits_are_in_a_cgroup_of_ours_inside() {
    let host = host("done").await;
    let root = host.directory.path();
    fs::write(root.join(SLICES).join("cgroup.procs"), "").unwrap();
    let systemd = Some(host.systemd.clone());
    let cgroups = Cgroups::below(root, Some(Path::new("bulkhead")), systemd);
    let given = cgroups.of_pod("/kubepods-burstable.slice").unwrap();
    let path = cgroups.place("x", Some(&given), None).unwrap();
    assert_eq!(path, root.join(SLICES).join("bulkhead-x.scope/vm"));
    let mut limits = HostLimits {
        memory_bytes: Some(1 << 20),
        cpu_shares: Some(1024),
        ..HostLimits::default()
    };
    cgroups.make(&path, &limits, 7).await.unwrap();
    let read = |file: &str| fs::read_to_string(path.join(file)).unwrap();
    assert_eq!(read("cgroup.procs"), "7");
    assert_eq!(read("memory.max"), "1048576\n");
    assert!(path.with_file_name("cgroup.subtree_control").exists());
    let slices = root.join(SLICES).join("cgroup.subtree_control");
    assert!(!slices.exists(), "systemd's slice was written to");

    fs::write(path.with_file_name("cpu.weight"), "39\n").unwrap();
    cgroups.limit(&path, &limits);
    limits.cpu_shares = Some(2);
    cgroups.limit(&path, &limits);
    while host.calls.lock().unwrap().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cgroups.remove(&path).await.unwrap();
    assert_eq!(
        *host.calls.lock().unwrap(),
        [
            "start bulkhead-x.scope fail Description=\"Bulkhead: VM of pod x\" \
             Slice=\"kubepods-burstable.slice\" Delegate=true DefaultDependencies=false \
             CollectMode=\"inactive-or-failed\" CPUWeight=uint64 39 TasksMax=uint64 18446744073709551615 \
             PIDs=[uint32 7]",
            "set bulkhead-x.scope true CPUWeight=uint64 1",
            "stop bulkhead-x.scope replace",
        ]
    );
}

#[tokio::test]
async fn a_job_that_fails_says_so() {
    let host = host("failed").await;
    let error = host.systemd.start(&scope()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "systemd: the job of StartTransientUnit bulkhead-x.scope ended as \"failed\"; journalctl --unit bulkhead-x.scope says \
         why"
    );
}

#[tokio::test]
async fn a_refusal_is_told_and_a_unit_that_is_gone_is_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let bus = Bus::start(directory.path());
    // No service with systemd's name is on this bus.
    let systemd = Systemd {
        bus: bus.address.clone(),
        patience: Duration::from_secs(10),
    };
    let error = systemd.start(&scope()).await.unwrap_err();
    assert!(matches!(error, SystemdError::Call { .. }), "{error:?}");

    struct Refusing;
    #[interface(name = "org.freedesktop.systemd1.Manager")]
    impl Refusing {
        fn stop_unit(&self, _unit: &str, _mode: &str) -> Result<ObjectPath<'static>, Gone> {
            Err(Gone::NoSuchUnit("not loaded".to_owned()))
        }
    }
    #[derive(Debug, zbus::DBusError)]
    #[zbus(prefix = "org.freedesktop.systemd1")]
    enum Gone {
        NoSuchUnit(String),
    }
    let _manager = Builder::address(bus.address.as_str())
        .serve_at(PATH, Refusing)
        .name(NAME)
        .build()
        .await
        .unwrap();
    systemd.stop("bulkhead-x.scope").await.unwrap();
}

#[tokio::test]
async fn without_systemd_the_error_says_what_to_do_and_a_dumb_one_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("dumb");
    let nowhere = "unix:path=/nowhere";
    let mut systemd = Systemd {
        bus: nowhere.to_owned(),
        patience: Duration::from_millis(300),
    };
    let error = systemd.start(&scope()).await.unwrap_err().to_string();
    assert!(error.contains("cgroup_driver = \"cgroupfs\""), "{error}");
    let _dumb = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    systemd.bus = format!("unix:path={}", socket.display());
    let error = systemd.start(&scope()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "systemd did not answer StartTransientUnit bulkhead-x.scope within 300ms"
    );
}
