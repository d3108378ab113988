// SPDX-License-Identifier: Apache-2.0
//! Shares: hostPath volumes, and persistent volumes with a file system.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_proto::cri::{ContainerConfig, MountPropagation};
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{mount, readonly, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

const SLEEP: [&str; 2] = ["sleep", "1000"];

/// A daemon with a pod, busybox, and a directory of the host to share.
struct Setting {
    daemon: Daemon,
    client: Client,
    pod: Pod,
    busybox: String,
    shared: PathBuf,
}

impl Setting {
    async fn new() -> Self {
        let daemon = Daemon::start_with(Networking::Loopback, "").await;
        let mut client = daemon.client().await;
        let busybox = Registry::shared().image("test/busybox");
        client.pull(&busybox).await.expect("pull");
        let pod = client.run_pod("pod").await.expect("run pod");
        let shared = daemon.path("shared");
        fs::create_dir(&shared).expect("a directory to share");
        Self {
            daemon,
            client,
            pod,
            busybox,
            shared,
        }
    }

    fn container(&self, name: &str) -> ContainerConfig {
        container(name, &self.busybox, &SLEEP)
    }

    async fn run(&mut self, config: ContainerConfig) -> String {
        let id = self.client.create(&self.pod, config).await.expect("create");
        self.client.start(&id).await.expect("start");
        id
    }

    /// Starts a container called `name` with the shared directory at `/shared`.
    async fn run_sharing(&mut self, name: &str) -> String {
        let config = with_mounts(self.container(name), vec![mount(&self.shared, "/shared")]);
        self.run(config).await
    }

    /// Runs a command that must fail, and returns its error output.
    async fn refused(&mut self, id: &str, line: &str) -> String {
        let result = self.client.exec(id, &["sh", "-c", line], 0).await;
        let result = result.expect("exec");
        assert_ne!(result.exit_code, 0, "{line} succeeds");
        String::from_utf8_lossy(&result.stderr).into_owned()
    }
}

fn mode_and_owner(path: &Path) -> (u32, u32, u32) {
    let found = fs::symlink_metadata(path).expect("a file of the share");
    (found.mode() & 0o7777, found.uid(), found.gid())
}

fn host(arguments: &[&str]) {
    let status = Command::new(arguments[0]).args(&arguments[1..]).status();
    assert!(status.expect("a program").success(), "{arguments:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_keep_owners_and_modes_both_ways() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    fs::write(shared.join("from-host"), "host\n").expect("write");
    std::os::unix::fs::chown(shared.join("from-host"), Some(1234), Some(2345)).expect("chown");
    fs::set_permissions(shared.join("from-host"), Permissions::from_mode(0o640)).expect("chmod");
    fs::create_dir(shared.join("group")).expect("mkdir");
    // kubelet leaves a volume so for fsGroup: only a supplementary group may write.
    std::os::unix::fs::chown(shared.join("group"), Some(0), Some(4242)).expect("chown");
    fs::set_permissions(shared.join("group"), Permissions::from_mode(0o2770)).expect("chmod");

    let root = setting.run_sharing("root").await;
    let seen = setting.client.shell(
        &root,
        "stat -c '%a %u %g' /shared/from-host; cat /shared/from-host",
    );
    assert_eq!(seen.await, "640 1234 2345\nhost\n");
    let lines = "cd /shared; umask 022; echo guest > made; mkdir dir; chmod 4755 made; chown 77:88 made; \
        ln made hard; ln -s made soft; mv dir moved; mkfifo pipe; echo tail >> made; truncate -s 3 from-host";
    setting.client.shell(&root, lines).await;
    assert_eq!(
        mode_and_owner(&shared.join("made")),
        (0o755, 77, 88),
        "chown drops set-user-id"
    );
    assert_eq!(fs::metadata(shared.join("hard")).expect("hard").nlink(), 2);
    assert_eq!(
        fs::read_link(shared.join("soft")).expect("soft"),
        Path::new("made")
    );
    assert_eq!(
        fs::read_to_string(shared.join("soft")).expect("read"),
        "guest\ntail\n"
    );
    assert_eq!(
        fs::read_to_string(shared.join("from-host")).expect("read"),
        "hos"
    );
    assert!(shared.join("moved").is_dir() && !shared.join("dir").exists());
    let said = setting.refused(&root, "mknod /shared/null c 1 3").await;
    assert!(said.contains("not permitted"), "{said}");

    let mut config = with_mounts(setting.container("user"), vec![mount(&shared, "/shared")]);
    let security = config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    security.run_as_user = Some(bulkhead_proto::cri::Int64Value { value: 1000 });
    security.supplemental_groups = vec![4242];
    let user = setting.run(config).await;
    let lines = "umask 002; echo mine > /shared/group/file; mkdir /shared/group/dir";
    setting.client.shell(&user, lines).await;
    assert_eq!(
        mode_and_owner(&shared.join("group/file")),
        (0o664, 1000, 4242)
    );
    assert_eq!(
        mode_and_owner(&shared.join("group/dir")),
        (0o2775, 1000, 4242)
    );
    let said = setting.refused(&user, "cat /shared/from-host").await;
    assert!(said.contains("Permission denied"), "{said}");
    let said = setting.refused(&user, "rm /shared/made").await;
    assert!(said.contains("Permission denied"), "{said}");
    setting.client.end_pod(&setting.pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn links_lead_where_the_container_is_and_never_out_of_a_share() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    fs::write(setting.daemon.path("secret"), "of the host\n").expect("write");
    symlink("../secret", shared.join("up")).expect("symlink");
    symlink("/etc/hostname", shared.join("absolute")).expect("symlink");
    symlink(setting.daemon.path("secret"), shared.join("host")).expect("symlink");
    let id = setting.run_sharing("main").await;
    assert_eq!(
        setting.client.shell(&id, "cat /shared/absolute").await,
        "pod\n",
        "the pod's own"
    );
    for name in ["up", "host"] {
        let said = setting.refused(&id, &format!("cat /shared/{name}")).await;
        assert!(said.contains("No such file"), "{name}: {said}");
    }
    // A link made by the guest does not lead out of the share either.
    setting
        .client
        .shell(&id, "ln -s ../../../../../../proc/1/root /shared/out")
        .await;
    let listed = setting
        .client
        .shell(&id, "ls /shared/out/ | grep -c e2e- || true")
        .await;
    assert_eq!(listed, "0\n");
    setting.client.end_pod(&setting.pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_of_the_host_run_from_a_share_with_maps_locks_attributes_and_threads() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    // What can be written, and what is around it.
    let tree = setting.daemon.path("tree");
    fs::create_dir_all(tree.join("below/deep")).expect("mkdir");
    fs::create_dir(tree.join("sealed")).expect("mkdir");
    fs::write(tree.join("file"), "").expect("write");
    let at = |name: &str| tree.join(name).display().to_string();
    host(&["mount", "-t", "tmpfs", "tmpfs", &at("below")]);
    host(&["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", &at("sealed")]);
    let mut recursive = readonly(&tree, "/recursive");
    recursive.recursive_read_only = true;
    let config = with_mounts(
        setting.container("python"),
        vec![
            readonly(Path::new("/usr"), "/usr"),
            readonly(Path::new("/usr/lib"), "/lib"),
            readonly(Path::new("/usr/lib64"), "/lib64"),
            mount(&shared, "/shared"),
            readonly(&tree, "/ro"),
            recursive,
            mount(&tree, "/rw"),
            readonly(&tree.join("file"), "/one"),
            mount(&tree.join("sealed"), "/sealed"),
        ],
    );
    let script = r#"
import errno, fcntl, mmap, os, socket, threading
os.chdir("/shared")
os.setxattr("/shared", "user.key", b"value")
assert os.getxattr("/shared", "user.key") == b"value" and os.listxattr("/shared") == ["user.key"]
os.removexattr("/shared", "user.key")
assert os.listxattr("/shared") == []
with open("/shared/space", "wb") as space:
    os.posix_fallocate(space.fileno(), 0, 8192); os.fsync(space.fileno()); os.fdatasync(space.fileno())
os.utime("/shared/space", (1, 2))
assert os.stat("/shared/space").st_size == 8192 and os.stat("/shared/space").st_mtime == 2
assert os.statvfs("/shared").f_blocks > 0
try: os.setxattr("/shared/script.py", "security.capability", b"\0\0\0\2" + bytes(16)); raise SystemExit("security.* can be set")
except OSError as e: print("refused")
one, two = open("lock", "w"), open("lock", "w")
fcntl.flock(one, fcntl.LOCK_EX)
try: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB); raise SystemExit("two locks")
except BlockingIOError: print("locked")
fcntl.lockf(one, fcntl.LOCK_EX)
with open("mapped", "w+b") as f:
    f.truncate(1 << 20)
    with mmap.mmap(f.fileno(), 1 << 20) as m:
        m[0:5] = b"start"; m[-3:] = b"end"; m.flush()
os.rename("mapped", "renamed")
with open("renamed", "rb") as f: data = f.read(); assert data[:5] == b"start" and data[-3:] == b"end"
fd = os.open("direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT); assert os.pwrite(fd, b"x" * 512, 0) == 512
server = socket.socket(socket.AF_UNIX); server.bind("socket"); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect("socket"); print("connected")
held = open("gone", "w+"); held.write("still here"); held.flush(); os.unlink("gone"); held.seek(0); print(held.read())
options = {line.split()[4]: line.split()[5].split(",")[0] for line in open("/proc/self/mountinfo")}
def writable(path):
    file = path + "/new" if os.path.isdir(path) else path
    try: os.close(os.open(file, os.O_CREAT | os.O_WRONLY)); wrote = True
    except OSError as e: assert e.errno == errno.EROFS, (path, e); wrote = False
    access = os.access(path, os.W_OK)
    statvfs = not os.statvfs(path).f_flag & os.ST_RDONLY
    mount = path
    while mount not in options: mount = os.path.dirname(mount)
    told = (wrote, access, statvfs, options[mount] == "rw")
    return {(True,) * 4: "rw", (False,) * 4: "ro"}.get(told, told)
for path in ["/usr/lib", "/ro", "/ro/below", "/ro/sealed", "/recursive", "/recursive/below", "/rw", "/rw/below",
             "/rw/sealed", "/one", "/sealed"]:
    print(path, writable(path))
os.setgroups([]); os.setgid(1000); os.setuid(1000)
stop = threading.Event(); threading.stack_size(64 << 10)
threads = [threading.Thread(target=stop.wait) for _ in range(1000)]
for one in threads: one.start()
print(threading.active_count() - 1, "threads"); stop.set()
"#;
    fs::write(shared.join("script.py"), script).expect("write");
    let id = setting.run(config).await;
    let said = setting
        .client
        .shell(&id, "/usr/bin/python3 /shared/script.py")
        .await;
    // Of a share that is read-only but not recursively, mounts of the host below it stay as they are.
    let expected = "refused\nlocked\nconnected\nstill here\n/usr/lib ro\n/ro ro\n/ro/below rw\n/ro/sealed ro\n\
        /recursive ro\n/recursive/below ro\n/rw rw\n/rw/below rw\n/rw/sealed ro\n/one ro\n/sealed ro\n1000 threads\n";
    assert_eq!(said, expected);
    let mapped = fs::read(shared.join("renamed")).expect("read");
    assert_eq!(
        (mapped.len(), &mapped[..5], &mapped[(1 << 20) - 3..]),
        (1 << 20, &b"start"[..], &b"end"[..])
    );
    setting.client.end_pod(&setting.pod).await;
    host(&["umount", &at("below")]);
    host(&["umount", &at("sealed")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn big_files_and_trees_of_many_small_ones_are_whole() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    let id = setting.run_sharing("main").await;
    // 8 MiB of random bytes, from the host and back.
    let words: Vec<u8> = (0u32..2 << 20)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(shared.join("big"), &words).expect("write");
    let sums = setting
        .client
        .shell(
            &id,
            "cp /shared/big /shared/copy; md5sum < /shared/big; md5sum < /shared/copy",
        )
        .await;
    let (one, two) = sums.trim_end().split_once('\n').expect("two sums");
    assert_eq!(one, two);
    assert!(
        fs::read(shared.join("copy")).expect("read") == words,
        "the copy differs"
    );
    // A package manager works like this: many directories and small files, a rename at the end; then all is removed.
    let tree = "cd /shared && mkdir tmp && for d in $(seq 20); do mkdir -p tmp/p$d/lib && \
        for f in $(seq 40); do echo \"module $d/$f\" > tmp/p$d/lib/f$f.js; done; ln -s p$d/lib/f1.js tmp/l$d; done && \
        mv tmp modules && find modules -type f | wc -l";
    assert_eq!(setting.client.shell(&id, tree).await, "800\n");
    assert_eq!(
        fs::read_to_string(shared.join("modules/p20/lib/f40.js")).expect("read"),
        "module 20/40\n"
    );
    assert_eq!(
        setting
            .client
            .shell(
                &id,
                "cat /shared/modules/*/lib/*.js | md5sum; rm -r /shared/modules; ls /shared"
            )
            .await
            .lines()
            .count(),
        3
    );
    assert!(!shared.join("modules").exists());
    setting.client.end_pod(&setting.pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_holds_on_the_host_and_beside_a_writable_share_of_the_same_directory() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    fs::write(shared.join("file"), "kept\n").expect("write");
    fs::create_dir(shared.join("below")).expect("mkdir");
    let below = shared.join("below").display().to_string();
    host(&["mount", "-t", "tmpfs", "tmpfs", &below]);
    let mut recursive = readonly(&shared, "/recursive");
    recursive.recursive_read_only = true;
    let config = with_mounts(
        setting.container("main"),
        vec![
            readonly(&shared, "/ro"),
            recursive,
            mount(&shared, "/rw"),
            readonly(&shared.join("file"), "/one"),
        ],
    );
    let id = setting.run(config).await;
    for line in [
        "echo x > /ro/file",
        "echo x > /ro/new",
        "rm /ro/file",
        "echo x > /recursive/below/new",
        "echo x > /one",
    ] {
        let said = setting.refused(&id, line).await;
        assert!(said.contains("Read-only"), "{line}: {said}");
    }
    setting.client.shell(&id, "echo more >> /rw/file").await;
    // Read-only but not recursively: a mount of the host below stays writable.
    setting.client.shell(&id, "echo x > /ro/below/new").await;
    assert_eq!(
        fs::read_to_string(shared.join("file")).expect("read"),
        "kept\nmore\n"
    );
    // The mounts in the file server's namespace are read-only, so the guest cannot change that.
    let server = setting.daemon.file_server_pids()[0];
    let table = fs::read_to_string(format!("/proc/{server}/mountinfo")).expect("its mounts");
    let is_read_only = |place: &str| {
        let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mut lines = table.lines().map(fields);
        let line = lines
            .find(|line| line[4] == place)
            .unwrap_or_else(|| panic!("{place} in {table}"));
        line[5].split(',').any(|option| option == "ro")
    };
    let found: Vec<_> = ["p1", "p2", "p2/below", "p3", "p4"]
        .iter()
        .map(|name| is_read_only(&format!("/shares/{name}")))
        .collect();
    assert_eq!(found, [true, true, true, false, true], "{table}");
    assert!(is_read_only("/"), "its root");
    assert_eq!(
        table
            .lines()
            .filter(|line| !line.contains("/shares/"))
            .count(),
        2,
        "root and proc: {table}"
    );
    setting.client.end_pod(&setting.pod).await;
    host(&["umount", &below]);
}

#[tokio::test(flavor = "multi_thread")]
async fn later_mounts_of_the_host_appear_where_propagation_asks_for_it() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    let path = shared.display().to_string();
    fs::create_dir(shared.join("late")).expect("mkdir");
    let late = shared.join("late").display().to_string();
    let mut follows = mount(&shared, "/follows");
    follows.propagation = MountPropagation::PropagationHostToContainer.into();
    let config = with_mounts(setting.container("early"), vec![follows.clone()]);
    if !is_shared(&shared) {
        let refused = setting.client.create(&setting.pod, config.clone()).await;
        assert_fails(refused, Code::FailedPrecondition, &["make-rshared"]);
        host(&["mount", "--bind", &path, &path]);
        host(&["mount", "--make-shared", &path]);
    }
    let config = with_mounts(
        setting.container("main"),
        vec![follows, mount(&shared, "/private")],
    );
    let id = setting.run(config).await;
    host(&["mount", "-t", "tmpfs", "tmpfs", &late]);
    fs::write(shared.join("late/file"), "x").expect("write");
    assert_eq!(
        setting
            .client
            .shell(&id, "ls /follows/late; ls /private/late")
            .await,
        "file\n"
    );
    host(&["umount", &late]);
    assert_eq!(setting.client.shell(&id, "ls /follows/late").await, "");
    setting.client.end_pod(&setting.pod).await;
    // Removes the bind mount, if this test made one.
    let _ = Command::new("umount").arg(&path).status();
}

fn is_shared(path: &Path) -> bool {
    let output = Command::new("findmnt")
        .args(["-n", "-o", "PROPAGATION", "--target"])
        .arg(path)
        .output();
    String::from_utf8_lossy(&output.expect("findmnt").stdout).starts_with("shared")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_vanishes_gives_errors_and_nothing_hangs() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    fs::create_dir(shared.join("volume")).expect("mkdir");
    let volume = shared.join("volume").display().to_string();
    host(&["mount", "-t", "tmpfs", "tmpfs", &volume]);
    fs::write(shared.join("volume/file"), "x").expect("write");
    fs::create_dir(shared.join("directory")).expect("mkdir");
    let config = with_mounts(
        setting.container("main"),
        vec![
            mount(&shared.join("volume"), "/volume"),
            mount(&shared.join("directory"), "/directory"),
        ],
    );
    let id = setting.run(config).await;
    host(&["umount", &volume]);
    fs::remove_dir(shared.join("directory")).expect("rmdir");
    assert_eq!(
        setting.client.shell(&id, "cat /volume/file").await,
        "x",
        "its mount is the guest's own"
    );
    let started = Instant::now();
    let said = setting.refused(&id, "echo x > /directory/file").await;
    assert!(
        said.contains("No such file") || said.contains("nonexistent"),
        "{said}"
    );
    assert!(started.elapsed() < Duration::from_secs(20));
    let socket = std::os::unix::net::UnixListener::bind(shared.join("socket")).expect("bind");
    let config = with_mounts(
        setting.container("socket"),
        vec![mount(&shared.join("socket"), "/socket")],
    );
    let refused = setting.client.create(&setting.pod, config).await;
    assert_fails(refused, Code::InvalidArgument, &["a socket"]);
    drop(socket);
    setting.client.end_pod(&setting.pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_file_server_fails_its_shares_and_nothing_else() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    fs::write(shared.join("file"), "x").expect("write");
    let other_pod = setting.client.run_pod("other").await.expect("run pod");
    let config = with_mounts(setting.container("other"), vec![mount(&shared, "/shared")]);
    let other = setting
        .client
        .create(&other_pod, config)
        .await
        .expect("create");
    setting.client.start(&other).await.expect("start");
    let others_server = setting.daemon.file_server_pids();
    let sharing = setting.run_sharing("sharing").await;
    let plain = setting.container("plain");
    let plain = setting.run(plain).await;
    let servers = setting.daemon.file_server_pids();
    let server = servers
        .iter()
        .find(|pid| !others_server.contains(pid))
        .expect("a server");
    host(&["kill", "-9", &server.to_string()]);
    until("the file server has ended", async || {
        let pids = setting.daemon.file_server_pids();
        whether(!pids.contains(server), pids)
    })
    .await;
    let said = setting.refused(&sharing, "cat /shared/file").await;
    assert!(said.contains("Input/output error"), "{said}");
    assert_eq!(setting.client.shell(&plain, "echo lives").await, "lives\n");
    assert_eq!(setting.client.shell(&other, "cat /shared/file").await, "x");
    let config = with_mounts(setting.container("late"), vec![mount(&shared, "/shared")]);
    let refused = setting.client.create(&setting.pod, config).await;
    assert_fails(refused, Code::FailedPrecondition, &["file server", "ended"]);
    setting.client.end_pod(&setting.pod).await;
    setting.client.end_pod(&other_pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_outlive_the_daemon_and_leave_nothing_behind() {
    let mut setting = Setting::new().await;
    let shared = setting.shared.clone();
    let before = setting.daemon.census();
    let first = setting.run_sharing("first").await;
    let second = setting.run_sharing("second").await;
    let server = setting.daemon.file_server_pids();
    assert_eq!(server.len(), 1, "one for the pod");
    setting.daemon.restart().await;
    setting.client = setting.daemon.client().await;
    assert_eq!(setting.daemon.file_server_pids(), server);
    setting
        .client
        .shell(&first, "echo after > /shared/file")
        .await;
    // A mount of the same directory uses the same share. Another directory at the same path is another share.
    let third = setting.run_sharing("third").await;
    assert_eq!(
        setting.client.shell(&third, "cat /shared/file").await,
        "after\n"
    );
    let shares = || {
        let table =
            fs::read_to_string(format!("/proc/{}/mountinfo", server[0])).expect("its mounts");
        table
            .lines()
            .filter(|line| line.contains(" /shares/"))
            .count()
    };
    assert_eq!(shares(), 1);
    fs::rename(&shared, setting.daemon.path("moved")).expect("rename");
    fs::create_dir(&shared).expect("mkdir");
    let fourth = setting.run_sharing("fourth").await;
    assert_eq!(setting.client.shell(&fourth, "ls /shared").await, "");
    assert_eq!(
        setting.client.shell(&first, "cat /shared/file").await,
        "after\n"
    );
    assert_eq!(shares(), 2);
    for id in [first, second, third] {
        setting.client.remove(&id).await.expect("remove");
    }
    assert_eq!(shares(), 1, "the last user takes the share along");
    setting.client.remove(&fourth).await.expect("remove");
    assert_eq!(shares(), 0);
    setting.client.end_pod(&setting.pod).await;
    assert!(setting.daemon.file_server_pids().is_empty());
    let pod = setting.client.run_pod("pod").await.expect("run pod");
    let after = setting.daemon.census();
    let count = |census: &bulkhead_tests::census::Census, word: &str| {
        census
            .to_string()
            .lines()
            .filter(|line| line.starts_with(word))
            .count()
    };
    for word in ["process", "mount", "cgroup"] {
        assert_eq!(
            count(&after, word),
            count(&before, word),
            "{word}: {before}\n{after}"
        );
    }
    setting.client.end_pod(&pod).await;
}
