// SPDX-License-Identifier: Apache-2.0
//! Pods with a user namespace (`hostUsers: false`) and the host's files. hostPath and persistent volumes are mounted
//! with mapped owners, as kubelet asks for each mount. On the host, files keep the host's owners.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_proto::cri::{
    ContainerConfig, Device, IdMapping, Int64Value, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, UserNamespace,
};
use bulkhead_tests::client::{Client, Pod, container, image_spec};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, readonly, with_mounts};
use bulkhead_tests::registry::Registry;

const SLEEP: [&str; 2] = ["sleep", "1000"];
/// A user and a group outside of the pod's mappings: nobody inside.
const FOREIGN: (u32, u32) = (70_000, 150_000);

/// The mappings of users and groups differ, so a confusion of the two is noticed.
fn users() -> UserNamespace {
    let from = |host_id| IdMapping {
        host_id,
        container_id: 0,
        length: 65536,
    };
    UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: vec![from(100_000)],
        gids: vec![from(200_000)],
    }
}

/// Adds the mappings with which kubelet mounts volumes in such a pod.
fn mapped(mount: Mount) -> Mount {
    Mount {
        uid_mappings: users().uids,
        gid_mappings: users().gids,
        ..mount
    }
}

struct Setting {
    client: Client,
    pod: Pod,
    busybox: String,
    kubelet: Kubelet,
    shared: PathBuf,
    _daemon: Daemon,
}

impl Setting {
    /// Runs a pod with a user namespace, and makes a directory of the host's root.
    async fn new() -> Self {
        let kubelet = Kubelet::new("uid-pod");
        let daemon = Daemon::start_with(Networking::Loopback, &kubelet.config()).await;
        let mut client = daemon.client().await;
        let busybox = Registry::shared().image("test/busybox");
        client.pull(&busybox).await.expect("pull");
        let mut config = client.pod_config("pod");
        config.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options()),
                ..Default::default()
            }),
            ..Default::default()
        });
        let pod = client.run_pod_with(config).await.expect("run pod");
        let shared = daemon.path("shared");
        fs::create_dir(&shared).expect("a directory to share");
        fs::set_permissions(&shared, Permissions::from_mode(0o755)).expect("chmod");
        Self {
            client,
            pod,
            busybox,
            kubelet,
            shared,
            _daemon: daemon,
        }
    }

    fn container(&self, name: &str, mounts: Vec<Mount>) -> ContainerConfig {
        let mut config = with_mounts(container(name, &self.busybox, &SLEEP), mounts);
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        security.namespace_options = Some(options());
        config
    }

    async fn run(&mut self, config: ContainerConfig) -> String {
        let id = self.client.create(&self.pod, config).await.expect("create");
        self.client.start(&id).await.expect("start");
        id
    }

    async fn sees(&mut self, id: &str, line: &str, expected: &str) {
        assert_eq!(self.client.shell(id, line).await, expected, "{line}");
    }

    /// Runs a line that must fail with `word` in its error output.
    async fn refused(&mut self, id: &str, line: &str, word: &str) {
        let result = self.client.exec(id, &["sh", "-c", line], 0).await;
        let result = result.expect("exec");
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        assert_ne!(result.exit_code, 0, "{line} succeeds");
        assert!(said.contains(word), "{line}: {said}");
    }

    /// Writes a file in the shared directory.
    fn put(&self, name: &str, mode: u32, (uid, gid): (u32, u32)) {
        let path = self.shared.join(name);
        fs::write(&path, format!("{name}\n")).expect("write");
        give(&path, mode, (uid, gid));
    }

    /// Returns mode and owner of a file on the host.
    fn on_host(&self, name: &str) -> (u32, u32, u32) {
        let found = fs::symlink_metadata(self.shared.join(name)).expect("a file of the share");
        (found.mode() & 0o7777, found.uid(), found.gid())
    }
}

fn options() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        userns_options: Some(users()),
        ..Default::default()
    }
}

fn give(path: &Path, mode: u32, (uid, gid): (u32, u32)) {
    chown(path, Some(uid), Some(gid)).expect("chown");
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
}

fn host(arguments: &[&str]) {
    let status = Command::new(arguments[0]).args(&arguments[1..]).status();
    assert!(status.expect("a program").success(), "{arguments:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_are_the_same_numbers_inside_and_on_the_host() {
    let mut setting = Setting::new().await;
    setting.put("roots", 0o600, (0, 0));
    setting.put("data", 0o640, (33, 34));
    setting.put("foreign", 0o600, FOREIGN);
    setting.put("pods", 0o600, (100_000, 200_000));
    fs::create_dir(setting.shared.join("group")).expect("mkdir");
    give(&setting.shared.join("group"), 0o2770, (0, 4242));
    let shared = mapped(mount(&setting.shared, "/shared"));
    let config = setting.container("root", vec![shared.clone()]);
    let root = setting.run(config).await;
    let line = "cd /shared; stat -c '%n %a %u %g' . roots data foreign pods; cat roots data";
    let expected = ". 755 0 0\nroots 600 0 0\ndata 640 33 34\nforeign 600 65534 65534\n\
                    pods 600 65534 65534\nroots\ndata\n";
    setting.sees(&root, line, expected).await;

    let line = "cd /shared; umask 022; echo new > made; mkdir dir; ln -s made soft; mkfifo pipe; ln made hard; \
        echo x > given; chmod 4755 given; chown 33:34 given; mv dir moved; echo more >> data; \
        stat -c '%n %u %g' made moved soft pipe hard given";
    let expected = "made 0 0\nmoved 0 0\nsoft 0 0\npipe 0 0\nhard 0 0\ngiven 33 34\n";
    setting.sees(&root, line, expected).await;
    for (name, mode, owner) in [
        ("made", 0o644, (0, 0)),
        ("moved", 0o755, (0, 0)),
        ("soft", 0o777, (0, 0)),
        ("pipe", 0o644, (0, 0)),
        ("given", 0o755, (33, 34)),
        ("data", 0o640, (33, 34)),
    ] {
        let found = setting.on_host(name);
        assert_eq!(found, (mode, owner.0, owner.1), "{name}");
    }
    let data = fs::read_to_string(setting.shared.join("data")).expect("read");
    assert_eq!(data, "data\nmore\n");
    // Root inside has no rights on files of foreign owners, and cannot give files to them.
    let foreign = setting.on_host("foreign");
    for (line, word) in [
        ("cat /shared/foreign", "denied"),
        ("cat /shared/pods", "denied"),
        ("echo x > /shared/foreign", "denied"),
        ("chmod 666 /shared/foreign", "too large"),
        ("chown 0:0 /shared/foreign", "chown"),
        ("chown 70000 /shared/made", "chown"),
        ("mknod /shared/null c 1 3", "mknod"),
    ] {
        setting.refused(&root, line, word).await;
    }
    assert_eq!(setting.on_host("foreign"), foreign);
    assert_eq!(setting.on_host("made"), (0o644, 0, 0));

    let mut config = setting.container("user", vec![shared]);
    let security = config.linux.get_or_insert_default();
    let security = security.security_context.get_or_insert_default();
    security.run_as_user = Some(Int64Value { value: 1000 });
    security.run_as_group = Some(Int64Value { value: 1001 });
    security.supplemental_groups = vec![4242];
    let user = setting.run(config).await;
    let line =
        "umask 002; cd /shared/group; echo mine > file; mkdir dir; stat -c '%n %u %g' file dir";
    let expected = "file 1000 4242\ndir 1000 4242\n";
    setting.sees(&user, line, expected).await;
    assert_eq!(setting.on_host("group/file"), (0o664, 1000, 4242));
    assert_eq!(setting.on_host("group/dir"), (0o2775, 1000, 4242));
    setting
        .refused(&user, "cat /shared/roots", "Permission denied")
        .await;
    setting
        .refused(&user, "rm -f /shared/made", "Permission denied")
        .await;
    setting.client.end_pod(&setting.pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mapped_mounts_can_be_read_only_single_files_sub_paths_and_nested() {
    let mut setting = Setting::new().await;
    setting.put("file", 0o600, (0, 0));
    let below = setting.shared.join("below");
    fs::create_dir(&below).expect("mkdir");
    host(&[
        "mount",
        "-t",
        "tmpfs",
        "tmpfs",
        &below.display().to_string(),
    ]);
    fs::write(below.join("deep"), "deep\n").expect("write");
    give(&below.join("deep"), 0o600, (0, 0));
    let claim = setting.kubelet.volume("kubernetes.io~csi", "claim");
    let sub_path = setting.kubelet.sub_path(&claim, "part", "main");
    let scratch = setting.kubelet.empty_dir("scratch");
    let memory = setting.kubelet.memory_dir("memory", 1024);
    let shared = setting.shared.clone();
    let mounts = vec![
        mapped(mount(&shared, "/rw")),
        mapped(readonly(&shared, "/ro")),
        mapped(mount(&shared.join("file"), "/one")),
        mapped(mount(&sub_path, "/part")),
        // The mount point is created on the host.
        mapped(mount(&scratch, "/rw/scratch")),
        mapped(mount(&memory, "/rw/scratch/memory")),
        // A mount without a mapping: all of the host's owners are nobody.
        mount(&shared, "/plain"),
    ];
    let config = setting.container("main", mounts);
    let id = setting.run(config).await;
    let line = "cat /one /ro/file /rw/below/deep; echo sub > /part/new; echo x > /rw/scratch/x; \
        echo y > /rw/scratch/memory/y; cd /; \
        stat -c '%n %u %g' one ro/file rw/below/deep part/new rw/scratch rw/scratch/x rw/scratch/memory/y plain/file";
    let expected = "file\nfile\ndeep\none 0 0\nro/file 0 0\nrw/below/deep 0 0\npart/new 0 0\nrw/scratch 0 0\n\
        rw/scratch/x 0 0\nrw/scratch/memory/y 0 0\nplain/file 65534 65534\n";
    setting.sees(&id, line, expected).await;
    for line in ["echo x > /ro/file", "rm /ro/file", "chown 33 /ro/file"] {
        setting.refused(&id, line, "Read-only").await;
    }
    for line in ["cat /plain/file", "echo x > /plain/new"] {
        setting.refused(&id, line, "denied").await;
    }
    setting
        .sees(&id, "echo one > /one; cat /rw/file", "one\n")
        .await;
    let made = fs::symlink_metadata(claim.join("part/new")).expect("made by sub-path");
    assert_eq!((made.uid(), made.gid()), (0, 0));
    assert_eq!(setting.on_host("scratch"), (0o755, 0, 0));
    assert!(
        !shared.join("scratch/x").exists(),
        "the emptyDir is the guest's"
    );
    setting.client.end_pod(&setting.pod).await;
    host(&["umount", &below.display().to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_the_pod_can_use_devices_of_the_guest_and_own_declared_volumes() {
    let mut setting = Setting::new().await;
    let device = |host_path: &str, container_path: &str, permissions: &str| Device {
        host_path: host_path.into(),
        container_path: container_path.into(),
        permissions: permissions.into(),
    };
    let mut config = setting.container("main", Vec::new());
    config.devices = vec![
        device("/dev/fuse", "/dev/fuse", "rw"),
        device("/dev/net/tun", "/dev/net/tun", "r"),
        device("/dev/zero", "/opt/a/zero", "rw"),
    ];
    let id = setting.run(config).await;
    let line = "exec 3<> /dev/fuse; exec 4< /dev/net/tun; head -c 4 /opt/a/zero | wc -c";
    setting.sees(&id, line, "4\n").await;
    setting
        .refused(&id, "exec 3<> /dev/net/tun", "not permitted")
        .await;
    let line = "stat -c '%F %u' /dev/fuse";
    setting
        .sees(&id, line, "character special file 65534\n")
        .await;
    let config = setting.container("without", Vec::new());
    let id = setting.run(config).await;
    setting.refused(&id, "cat /dev/fuse", "No such file").await;

    // The volumes that an image declares have the owners that its files have.
    let image = Registry::shared().image("test/volumes");
    setting.client.pull(&image).await.expect("pull");
    let mut config = setting.container("declares", Vec::new());
    config.image = Some(image_spec(&image));
    let id = setting.run(config).await;
    let line = "stat -c '%u:%g' /data /data/sub/file /fresh/deep; cd /fresh/deep && echo x > made && stat -c %u made";
    setting.sees(&id, line, "33:1234\n33:0\n0:0\n0\n").await;
    setting.client.end_pod(&setting.pod).await;
}
