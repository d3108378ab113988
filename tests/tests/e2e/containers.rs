// SPDX-License-Identifier: Apache-2.0
//! Containers: exit codes, signals, users, limits, exec.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use bulkhead_proto::cri::{
    ContainerState, Int64Value, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxStatusRequest, ReopenContainerLogRequest,
    SecurityProfile, security_profile::ProfileType,
};
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{mount, with_mounts};
use bulkhead_tests::registry::Registry;
use tonic::Code;

/// Starts a daemon, pulls busybox and runs a pod: the start of most tests here.
async fn pod() -> (Daemon, Client, Pod, String) {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");
    (daemon, client, pod, busybox)
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_signals_and_start_failures_come_back_as_containerd_gives_them() {
    let (daemon, mut client, pod, busybox) = pod().await;
    let table = [
        ("zero", "true", 0, "Completed"),
        ("seven", "exit 7", 7, "Error"),
        ("killed", "kill -KILL $$; sleep 100", 137, "Error"),
        ("segv", "sh -c 'kill -SEGV $$'; exit 139", 139, "Error"),
    ];
    for (name, script, code, reason) in table {
        // PID 1 of a PID namespace cannot kill itself. In the guest's namespace, the script has another PID.
        let mut config = container(name, &busybox, &["sh", "-c", script]);
        config.linux = Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Node.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let id = client.create(&pod, config).await.expect("create");
        client.start(&id).await.expect("start");
        let status = client.exited(&id).await;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (code, reason),
            "{name}"
        );
        assert!(status.started_at >= status.created_at, "{status:?}");
        assert!(status.finished_at >= status.started_at, "{status:?}");
    }
    // Executable, and no program: neither the file of a machine nor a script.
    let text = daemon.path("text");
    std::fs::write(&text, "what").expect("a file");
    std::fs::set_permissions(&text, Permissions::from_mode(0o755)).expect("its mode");
    for (name, command, directory, user) in [
        ("missing", "no-such-command", "", ""),
        ("not-executable", "/etc/passwd", "", ""),
        ("no-program", "/text", "", ""),
        ("no-directory", "true", "/etc/passwd", ""),
        ("no-user", "true", "", "ghost"),
    ] {
        let mut config = container(name, &busybox, &[command]);
        config.working_dir = directory.into();
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        security.run_as_username = user.into();
        let config = with_mounts(config, vec![mount(&text, "/text")]);
        let wrong = [user, directory, command];
        let command = wrong.into_iter().find(|word| !word.is_empty());
        let command = command.expect("what is wrong");
        let id = client.create(&pod, config).await.expect("create");
        let error = client.start(&id).await.expect_err("start must fail");
        assert!(error.message().contains(command), "{error:?}");
        let status = client.status(&id).await.expect("status");
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (128, "StartError"),
            "{name}"
        );
        assert!(status.message.contains(command), "{status:?}");
        assert!(client.log_path(&pod, name).exists(), "{name} has a log");
        client.remove(&id).await.expect("remove");
    }
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_containers_share_the_pod_and_not_their_files() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let one = client
        .run_script(&pod, "one", &busybox, "echo one > /mine; exec sleep 1000")
        .await;
    let two = client
        .run_script(&pod, "two", &busybox, "exec sleep 1000")
        .await;
    assert_eq!(client.shell(&one, "cat /mine").await, "one\n");
    assert_fails_exec(&mut client, &two, "cat /mine").await;
    for namespace in ["net", "ipc", "uts"] {
        let line = format!("readlink /proc/self/ns/{namespace}");
        assert_eq!(
            client.shell(&one, &line).await,
            client.shell(&two, &line).await,
            "{namespace}"
        );
    }
    let line = "readlink /proc/self/ns/pid";
    assert_ne!(
        client.shell(&one, line).await,
        client.shell(&two, line).await
    );
    assert!(
        client
            .shell(&one, "cat /proc/1/comm")
            .await
            .starts_with("sleep"),
        "PID 1 of a container's own namespace is its process"
    );
    // One container reaches a server in the other one on loopback.
    client
        .shell(
            &one,
            "(echo hello | nc -l -p 7000 >/dev/null 2>&1) & sleep 0.5",
        )
        .await;
    let answer = client
        .shell(&two, "nc -w 5 127.0.0.1 7000 </dev/null || true")
        .await;
    assert_eq!(answer, "hello\n");
    client.end_pod(&pod).await;
}

async fn assert_fails_exec(client: &mut Client, id: &str, line: &str) {
    let answer = client.exec(id, &["sh", "-c", line], 0).await.expect("exec");
    assert_ne!(answer.exit_code, 0, "{line} must fail");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_over_its_memory_limit_is_killed_and_says_so() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let mut config = container(
        "hungry",
        &busybox,
        &[
            "sh",
            "-c",
            "dd if=/dev/zero of=/dev/shm/x bs=1M count=60; exec tail /dev/zero",
        ],
    );
    config.linux = Some(LinuxContainerConfig {
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: 24 << 20,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let status = client.exited(&id).await;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    // The sandbox still works.
    let other = client
        .run_script(&pod, "other", &busybox, "exec sleep 100")
        .await;
    assert_eq!(client.shell(&other, "echo alive").await, "alive\n");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_has_exit_codes_output_bounds_and_timeouts() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    let answer = client
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"], 30)
        .await
        .expect("exec");
    assert_eq!(answer.exit_code, 3);
    assert_eq!(
        (&answer.stdout[..], &answer.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_fails(
        client
            .exec(&id, &["sh", "-c", "sleep 321 & sleep 321"], 1)
            .await,
        Code::DeadlineExceeded,
        &["1"],
    );
    let left = client
        .shell(&id, "ps | grep -c '[s]leep 321' || true")
        .await;
    assert_eq!(left, "0\n", "a timed out exec leaves no process");
    assert_fails(
        client.exec(&id, &["no-such-command"], 0).await,
        Code::InvalidArgument,
        &["no-such-command"],
    );
    let many = client
        .exec(&id, &["sh", "-c", "head -c 3000000 /dev/zero"], 0)
        .await
        .expect("exec");
    assert_eq!(many.stdout.len(), 3_000_000);
    client.stop(&id, 0).await.expect("stop");
    assert_fails(
        client.exec(&id, &["true"], 0).await,
        Code::FailedPrecondition,
        &[&id],
    );
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_sends_the_images_signal_and_kills_a_program_that_ignores_it() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let entrypoint = Registry::shared().image("test/entrypoint");
    client.pull(&entrypoint).await.expect("pull");
    let handler = |signal: &str, code: i32| {
        format!("trap 'echo got; exit {code}' {signal}; echo ready; while true; do sleep 0.1; done")
    };
    for (name, image, script, grace, code) in [
        ("term", &busybox, handler("TERM", 3), 60, 3),
        ("usr1", &entrypoint, handler("USR1", 4), 60, 4),
        (
            "deaf",
            &busybox,
            "echo ready; exec sleep 1000".to_owned(),
            1,
            137,
        ),
    ] {
        let id = client.run_script(&pod, name, image, &script).await;
        client
            .log_until(&pod, name, |log| log.contains("ready"))
            .await;
        client.stop(&id, grace).await.expect("stop");
        assert_eq!(client.exited(&id).await.exit_code, code, "{name}");
        client.stop(&id, grace).await.expect("stop it again");
    }
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_stop_sends_no_second_signal_and_can_only_shorten_the_wait() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let script = "trap 'echo got' TERM; echo ready; while true; do sleep 0.1; done";
    let id = client.run_script(&pod, "stubborn", &busybox, script).await;
    client
        .log_until(&pod, "stubborn", |log| log.contains("ready"))
        .await;
    let (mut first, of_first) = (client.clone(), id.clone());
    let first = tokio::spawn(async move { first.stop(&of_first, 600).await });
    client
        .log_until(&pod, "stubborn", |log| log.contains("got"))
        .await;
    client.stop(&id, 3).await.expect("stop with less patience");
    first.await.expect("the first stop").expect("first stop");
    assert_eq!(client.exited(&id).await.exit_code, 137);
    let log = client.log_until(&pod, "stubborn", |_| true).await;
    assert_eq!(log.matches("got").count(), 1, "{log}");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_finds_the_cgroup_limits_and_files_that_a_node_gives() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    let image_id = client.pull(&busybox).await.expect("pull");
    let config = client.privileged_pod_config("pod");
    let pod = client.run_pod_with(config).await.expect("run pod");
    let linux = |privileged: bool| {
        Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                privileged,
                readonly_rootfs: !privileged,
                run_as_user: (!privileged).then_some(Int64Value { value: 1000 }),
                ..Default::default()
            }),
        })
    };
    let mut config = container("plain", &busybox, &["sh", "-c", "pwd; exec sleep 1000"]);
    // kubelet names an image by its id, and says beside it what the user wrote.
    let image = config.image.as_mut().expect("image");
    image.user_specified_image = std::mem::replace(&mut image.image, image_id);
    config.working_dir = "/not/in/the/image".into();
    config.linux = linux(false);
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    client
        .log_until(&pod, "plain", |log| log == "/not/in/the/image\n")
        .await;
    let script = "cat /proc/self/cgroup /sys/fs/cgroup/memory.max; \
        awk '/Max (open files|processes)/ {print $(NF-2), $(NF-1)}' /proc/self/limits; \
        cd /proc/sys && cat kernel/threads-max kernel/pid_max fs/file-max fs/inotify/max_user_watches \
        fs/fanotify/max_user_marks fs/epoll/max_user_watches; \
        cat user/max_*_namespaces | uniq; cd net/ipv4; cat tcp_max_orphans tcp_max_tw_buckets tcp_max_syn_backlog; \
        cat tcp_mem udp_mem tcp_rmem tcp_wmem | tr '\\t' ' '; \
        for file in resolv.conf hosts hostname; do grep -c \" /etc/$file ro,\" /proc/self/mountinfo; done";
    assert_eq!(
        client.shell(&id, script).await,
        "0::/\n67108864\nunlimited unlimited\n1024 1048576\n4194304\n4194304\n9223372036854775807\n1048576\n\
         1048576\n14316557\n262144\n262144\n262144\n4096\n768000 1024000 1536000\n1536000 2048000 3072000\n\
         4096 131072 6291456\n4096 16384 4194304\n1\n1\n1\n"
    );
    let image = client.status(&id).await.expect("status").image;
    let image = image.expect("image").image;
    assert_eq!(image, format!("{busybox}:latest"), "not the image's id");
    // A container that divides its cgroup among children, as systemd does, has no process in it any more.
    let script = "cd /sys/fs/cgroup && mkdir first && echo $$ >first/cgroup.procs && \
        echo +memory >cgroup.subtree_control && echo divided; exec sleep 1000";
    let mut config = container("divided", &busybox, &["sh", "-c", script]);
    config.linux = linux(true);
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    client
        .log_until(&pod, "divided", |log| log.contains("divided"))
        .await;
    let script = "cat /proc/self/cgroup /sys/fs/cgroup/memory.max";
    assert_eq!(client.shell(&id, script).await, "0::/first\n67108864\n");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_waits_for_the_handler_of_a_program_that_has_just_started() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let script = "echo started; sleep 6; trap 'exit 9' TERM; while true; do sleep 0.1; done";
    let id = client.run_script(&pod, "early", &busybox, script).await;
    client
        .log_until(&pod, "early", |log| log.contains("started"))
        .await;
    client.stop(&id, 60).await.expect("stop");
    assert_eq!(client.exited(&id).await.exit_code, 9);
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_sandbox_takes_new_containers() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    for attempt in 0..3 {
        let mut config = container("main", &busybox, &["sh", "-c", "echo round; exit 1"]);
        config.metadata.as_mut().expect("metadata").attempt = attempt;
        let id = client.create(&pod, config).await.expect("create");
        client.start(&id).await.expect("start");
        assert_eq!(client.exited(&id).await.exit_code, 1);
        client.remove(&id).await.expect("remove");
        assert!(client.container_ids().await.is_empty());
    }
    let log = client
        .log_until(&pod, "main", |log| log.matches("round").count() == 3)
        .await;
    assert_eq!(log, "round\nround\nround\n");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_and_pods_set_user_groups_and_working_directory() {
    let (_daemon, mut client, pod, _busybox) = pod().await;
    let registry = Registry::shared();
    let who = "id -u; id -g; id -G; pwd";
    for (image, uid, expected) in [
        ("test/user-name", None, "33\n33\n33 1234\n/made/for/you\n"),
        ("test/user-number", None, "1003\n1004\n1004\n/\n"),
        (
            "test/user-name",
            Some(65534),
            "65534\n65534\n65534\n/made/for/you\n",
        ),
    ] {
        let reference = registry.image(image);
        client.pull(&reference).await.expect("pull");
        let name = format!("who-{}", uid.unwrap_or_default());
        let mut config = container(&name, &reference, &["sh", "-c", who]);
        config.metadata.as_mut().expect("metadata").name = format!("{name}-{}", image.len());
        config.log_path = format!("{name}-{}.log", image.len());
        config.linux = Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                run_as_user: uid.map(|value| Int64Value { value }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let id = client.create(&pod, config).await.expect("create");
        client.start(&id).await.expect("start");
        let status = client.exited(&id).await;
        assert_eq!(status.exit_code, 0);
        let shown = status.user.and_then(|user| user.linux).expect("a user");
        let lines: Vec<&str> = expected.lines().collect();
        assert_eq!(shown.uid.to_string(), lines[0], "{image} as {uid:?}");
        assert_eq!(shown.gid.to_string(), lines[1], "{image} as {uid:?}");
        let groups: Vec<String> = shown
            .supplemental_groups
            .iter()
            .map(i64::to_string)
            .collect();
        assert_eq!(groups.join(" "), lines[2], "{image} as {uid:?}");
        let log = client
            .log_until(&pod, &format!("{name}-{}", image.len()), |log| {
                log.lines().count() == 4
            })
            .await;
        assert_eq!(log, expected, "{image} as {uid:?}");
        client.remove(&id).await.expect("remove");
    }
    let reference = registry.image("test/entrypoint");
    client.pull(&reference).await.expect("pull");
    for (name, command, args, expected) in [
        ("both", vec![], vec![], "entry cmd\n"),
        ("args", vec![], vec!["args"], "entry args\n"),
        (
            "command",
            vec!["/bin/sh", "-c", "echo $FROM_IMAGE $HERE"],
            vec![],
            "yes there\n",
        ),
    ] {
        let mut config = container(name, &reference, &command);
        config.args = args.iter().map(ToString::to_string).collect();
        config.envs = vec![bulkhead_proto::cri::KeyValue {
            key: "HERE".into(),
            value: "there".into(),
        }];
        let id = client.create(&pod, config).await.expect("create");
        client.start(&id).await.expect("start");
        client.exited(&id).await;
        let log = client.log_until(&pod, name, |log| !log.is_empty()).await;
        assert_eq!(log, expected, "{name}");
    }
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_container_is_confined() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let mut config = container("main", &busybox, &["sleep", "1000"]);
    config.linux = Some(LinuxContainerConfig {
        security_context: Some(LinuxContainerSecurityContext {
            masked_paths: vec!["/proc/kcore".into()],
            readonly_paths: vec!["/proc/sys".into()],
            seccomp: Some(SecurityProfile {
                profile_type: ProfileType::RuntimeDefault.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let status = client.shell(&id, "cat /proc/1/status").await;
    assert!(status.contains("CapEff:\t00000000a80425fb"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    for line in [
        "mount -t tmpfs none /mnt",
        "echo 1 > /proc/sys/kernel/panic",
        "echo 1 > /sys/kernel/mm/ksm/run",
        // The image disk: as with runc, a device node for it can be created but not opened.
        "mknod /dev/own b $(awk '$4 == \"vda\" {print $1, $2}' /proc/partitions) && head -c 1 /dev/own",
        "dd if=/proc/kcore of=/dev/null bs=1 count=1 2>/dev/null | grep x",
    ] {
        assert_fails_exec(&mut client, &id, line).await;
    }
    let devices = client.shell(&id, "ls /dev").await;
    for name in [
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "shm", "stdin",
    ] {
        assert!(
            devices.lines().any(|line| line == name),
            "{name}: {devices}"
        );
    }
    assert!(
        !devices.contains("vd"),
        "no disks in a container: {devices}"
    );
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_pid_namespace_has_a_pause_process_and_all_containers() {
    let (_daemon, mut client, first, busybox) = pod().await;
    client.end_pod(&first).await;
    let options = NamespaceOption {
        pid: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let mut config = client.pod_config("shared");
    config.linux = Some(LinuxPodSandboxConfig {
        security_context: Some(LinuxSandboxSecurityContext {
            namespace_options: Some(options.clone()),
            ..Default::default()
        }),
        ..Default::default()
    });
    let pod = client.run_pod_with(config).await.expect("run pod");
    let mut ids = Vec::new();
    // A container without namespace options is in the pod's PID namespace: CRI's default, though kubelet always sets
    // them.
    for (name, options) in [("one", Some(options)), ("two", None)] {
        let mut config = container(name, &busybox, &["sleep", "777"]);
        config.linux = options.map(|options| LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        });
        let created = client.create_as_it_is(&pod, config).await;
        let id = created.expect("create");
        client.start(&id).await.expect("start");
        ids.push(id);
    }
    let processes = client.shell(&ids[0], "ps").await;
    assert_eq!(processes.matches("sleep 777").count(), 2, "{processes}");
    let first = client.shell(&ids[0], "cat /proc/1/comm").await;
    assert!(
        !first.starts_with("sleep"),
        "PID 1 is a pause process: {first}"
    );
    client.end_pod(&pod).await;
    let config = client.pod_config("silent");
    let pod = client.run_pod_as_it_is(config).await.expect("run pod");
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let status = client.runtime.pod_sandbox_status(request).await;
    let status = status.expect("status").into_inner().status;
    let namespaces = status.and_then(|status| status.linux?.namespaces);
    let options = namespaces.and_then(|namespaces| namespaces.options);
    assert_eq!(options.expect("options").pid(), NamespaceMode::Pod);
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_rotated_without_losing_a_line() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); done; sleep 1; echo last; exec sleep 1000";
    let id = client.run_script(&pod, "main", &busybox, script).await;
    client
        .log_until(&pod, "main", |log| log.contains("line 10\n"))
        .await;
    let path = client.log_path(&pod, "main");
    let rotated = path.with_extension("log.1");
    std::fs::rename(&path, &rotated).expect("rotate");
    client
        .runtime
        .reopen_container_log(ReopenContainerLogRequest {
            container_id: id.clone(),
        })
        .await
        .expect("reopen");
    client
        .log_until(&pod, "main", |log| log.contains("last\n"))
        .await;
    let text = std::fs::read_to_string(&rotated).expect("old log")
        + &std::fs::read_to_string(&path).expect("new log");
    for number in 0..400 {
        assert_eq!(
            text.matches(&format!(" F line {number}\n")).count(),
            1,
            "line {number}"
        );
    }
    client.end_pod(&pod).await;
}
