// SPDX-License-Identifier: Apache-2.0
//! Volumes in block mode: containers get block devices of the host, here loop devices.

use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_proto::cri::{
    ContainerConfig, Device, LinuxContainerConfig, LinuxContainerSecurityContext,
};
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::Daemon;
use bulkhead_tests::registry::Registry;
use tonic::Code;

const BYTES: u64 = 16 << 20;
const SLEEP: [&str; 2] = ["sleep", "1000"];

/// A loop device over a sparse file. It is detached on drop.
pub struct Loop {
    device: PathBuf,
    file: tempfile::NamedTempFile,
}

impl Loop {
    pub fn new(options: &[&str]) -> Self {
        let file = tempfile::NamedTempFile::new_in("/var/lib/bulkhead").expect("a file");
        file.as_file().set_len(BYTES).expect("make it large");
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).args(options);
        let made = losetup.arg(file.path()).output().expect("losetup");
        assert!(made.status.success(), "{made:?}");
        let device = String::from_utf8_lossy(&made.stdout).trim().into();
        Self { device, file }
    }

    pub fn path(&self) -> String {
        self.device.display().to_string()
    }

    /// Reads the file behind the device.
    fn behind(&self, at: u64, len: usize) -> String {
        let mut bytes = vec![0; len];
        let file = self.file.as_file();
        file.read_exact_at(&mut bytes, at).expect("read the file");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Asserts that nobody has the device open: an open loop device keeps its backing file when it is detached.
    fn assert_can_be_detached(&self) {
        run_on_host(&["losetup", "--detach", &self.path()]);
        let name = self.device.file_name().expect("a name");
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        assert!(!backing.exists(), "{backing:?}: somebody has it open");
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Fails if the test has already detached it.
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.device)
            .output();
    }
}

fn run_on_host(command: &[&str]) {
    let done = Command::new(command[0]).args(&command[1..]).output();
    let done = done.expect("run a command of the host");
    assert!(done.status.success(), "{command:?}: {done:?}");
}

async fn pod() -> (Daemon, Client, Pod, String) {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let config = client.privileged_pod_config("block");
    let pod = client.run_pod_with(config).await.expect("run pod");
    (daemon, client, pod, busybox)
}

fn with_device(
    name: &str,
    image: &str,
    host_path: impl Into<String>,
    permissions: &str,
) -> ContainerConfig {
    let mut config = container(name, image, &SLEEP);
    config.devices = vec![Device {
        host_path: host_path.into(),
        container_path: "/dev/xvda".into(),
        permissions: permissions.into(),
    }];
    config
}

async fn run(client: &mut Client, pod: &Pod, config: ContainerConfig) -> String {
    let id = client.create(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    id
}

async fn fails(client: &mut Client, id: &str, line: &str) {
    let answer = client.exec(id, &["sh", "-c", line], 0).await.expect("exec");
    assert_ne!(answer.exit_code, 0, "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_pod_share_a_device_that_outlives_the_daemon_and_is_given_back() {
    let (mut daemon, mut client, pod, busybox) = pod().await;
    let volume = Loop::new(&[]);
    // kubelet names the device by a link.
    let links = tempfile::tempdir().expect("directory");
    let link = links.path().join("pvc");
    std::os::unix::fs::symlink(&volume.device, &link).expect("link");
    let link = link.display().to_string();
    let first = with_device("first", &busybox, link.clone(), "rwm");
    let first = run(&mut client, &pod, first).await;
    let second = run(
        &mut client,
        &pod,
        with_device("second", &busybox, link, "rwm"),
    )
    .await;
    let size = client.shell(&first, "blockdev --getsize64 /dev/xvda").await;
    assert_eq!(size.trim(), BYTES.to_string());

    let write = |text: &str, sector: u64| {
        format!("echo {text} | dd of=/dev/xvda bs=512 seek={sector} conv=fsync,notrunc 2>/dev/null")
    };
    client.shell(&first, &write("from-first", 9)).await;
    assert_eq!(volume.behind(9 * 512, 10), "from-first");
    let read = "dd if=/dev/xvda bs=512 skip=9 count=1 2>/dev/null | head -c 10";
    assert_eq!(client.shell(&second, read).await, "from-first");

    daemon.kill();
    daemon.restart().await;
    let mut client = daemon.client().await;
    client.stop(&first, 0).await.expect("stop");
    client.remove(&first).await.expect("remove");
    client.shell(&second, &write("still-here", 9)).await;
    assert_eq!(volume.behind(9 * 512, 10), "still-here");
    // Behind the device's last sector there is nothing to write to.
    let last = BYTES / 512 - 1;
    client.shell(&second, &write("end", last)).await;
    fails(&mut client, &second, &write("beyond", last + 1)).await;
    // The pod's other disks are closed to the container.
    let node = "mknod /vdc b $(tr : ' ' < /sys/block/vdc/dev)";
    client.shell(&second, node).await;
    fails(&mut client, &second, "head -c 1 /vdc").await;
    client.stop(&second, 0).await.expect("stop");
    client.remove(&second).await.expect("remove");
    volume.assert_can_be_detached();
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_read_only_if_its_permissions_or_the_device_itself_say_so() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let (given, fixed) = (Loop::new(&[]), Loop::new(&["--read-only"]));
    let write = "echo x | dd of=/dev/xvda bs=512 conv=fsync,notrunc";
    for (name, volume, permissions) in [("given", &given, "r"), ("fixed", &fixed, "rwm")] {
        let config = with_device(name, &busybox, volume.path(), permissions);
        let id = run(&mut client, &pod, config).await;
        client.shell(&id, "head -c 512 /dev/xvda >/dev/null").await;
        fails(&mut client, &id, write).await;
        assert_eq!(volume.behind(0, 1), "\0");
    }
    client.end_pod(&pod).await;
    given.assert_can_be_detached();
    fixed.assert_can_be_detached();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_its_medium_gives_errors_and_other_devices_work() {
    let (daemon, mut client, pod, busybox) = pod().await;
    let (lost, other) = (Loop::new(&[]), Loop::new(&[]));
    let mut config = with_device("main", &busybox, lost.path(), "rwm");
    config.devices.push(Device {
        host_path: other.path(),
        container_path: "/dev/xvdb".into(),
        permissions: "rwm".into(),
    });
    let id = run(&mut client, &pod, config).await;
    lost.file.as_file().set_len(1 << 20).expect("shrink");
    run_on_host(&["losetup", "--set-capacity", &lost.path()]);
    let beyond = "bs=512 count=1";
    let read = format!("dd if=/dev/xvda of=/dev/null skip=8192 {beyond}");
    fails(&mut client, &id, &read).await;
    let write = |device: &str| {
        format!("dd if=/dev/zero of=/dev/{device} seek=8192 conv=fsync,notrunc {beyond}")
    };
    fails(&mut client, &id, &write("xvda")).await;
    client.shell(&id, &write("xvdb")).await;
    assert_eq!(daemon.vmm_pids().len(), 1);
    client.end_pod(&pod).await;
    lost.assert_can_be_detached();
    other.assert_can_be_detached();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_privileged_container_mounts_a_file_system_of_the_host() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let volume = Loop::new(&[]);
    run_on_host(&["mkfs.ext4", "-q", &volume.path()]);
    let mut config = with_device("mounts", &busybox, volume.path(), "rwm");
    config.linux = Some(LinuxContainerConfig {
        security_context: Some(LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = run(&mut client, &pod, config).await;
    let line =
        "mkdir -p /mnt && mount -t ext4 /dev/xvda /mnt && echo kept > /mnt/file && umount /mnt";
    client.shell(&id, line).await;
    client.end_pod(&pod).await;
    let place = tempfile::tempdir().expect("directory");
    let at = place.path().display().to_string();
    run_on_host(&["mount", "-t", "ext4", &volume.path(), &at]);
    let kept = std::fs::read_to_string(place.path().join("file"));
    run_on_host(&["umount", &at]);
    assert_eq!(kept.expect("the container's file"), "kept\n");
    volume.assert_can_be_detached();
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_are_no_block_devices_are_refused_by_name() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    assert!(
        std::fs::metadata("/dev/kvm")
            .expect("/dev/kvm")
            .file_type()
            .is_char_device()
    );
    for (path, code) in [
        ("/dev/kvm", Code::Unimplemented),
        ("/etc/passwd", Code::InvalidArgument),
        ("/etc", Code::InvalidArgument),
        ("/dev/no-such", Code::NotFound),
        ("dev/loop0", Code::InvalidArgument),
    ] {
        let refused = client
            .create(&pod, with_device("refused", &busybox, path, "rw"))
            .await;
        assert_fails(refused, code, &[path]);
    }
    assert_eq!(client.container_ids().await, Vec::<String>::new());
    client.end_pod(&pod).await;
}
