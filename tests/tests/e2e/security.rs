// SPDX-License-Identifier: Apache-2.0
//! Security contexts: users, groups, capabilities, privileges, profiles and namespaces of containers.

use std::collections::HashMap;

use bulkhead_proto::cri::{
    Capability, IdMapping, Int64Value, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    SeLinuxOption, SecurityProfile, SupplementalGroupsPolicy, UserNamespace,
    security_profile::ProfileType,
};
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use tonic::Code;

type Context = LinuxContainerSecurityContext;

struct Bench {
    daemon: Daemon,
    client: Client,
    pod: Pod,
    image: String,
    containers: u32,
}

impl Bench {
    /// Starts a daemon and a pod with sysctls, and pulls busybox, whose image has users.
    async fn new() -> Self {
        let daemon = Daemon::start_with(Networking::Loopback, "").await;
        let mut client = daemon.client().await;
        let image = Registry::shared().image("test/busybox");
        client.pull(&image).await.expect("pull");
        let mut config = client.pod_config("pod");
        config.linux = Some(LinuxPodSandboxConfig {
            sysctls: HashMap::from([
                ("kernel.shm_rmid_forced".into(), "1".into()),
                ("net.ipv4.ip_local_port_range".into(), "2000\t3000".into()),
            ]),
            ..Default::default()
        });
        let pod = client.run_pod_with(config).await.expect("run pod");
        Self {
            daemon,
            client,
            pod,
            image,
            containers: 0,
        }
    }

    async fn create(
        &mut self,
        context: Context,
        command: &[&str],
    ) -> Result<String, tonic::Status> {
        self.containers += 1;
        let mut config = container(&format!("c{}", self.containers), &self.image, command);
        config.linux = Some(LinuxContainerConfig {
            security_context: Some(context),
            ..Default::default()
        });
        self.client.create(&self.pod, config).await
    }

    /// Starts a container that sleeps.
    async fn start(&mut self, context: Context) -> String {
        let created = self.create(context, &["sleep", "1000"]).await;
        let id = created.expect("create");
        self.client.start(&id).await.expect("start");
        id
    }

    /// Runs a shell line in a new container with this context and returns what it prints.
    async fn prints(&mut self, context: Context, line: &str) -> String {
        let id = self.start(context).await;
        let output = self.client.shell(&id, line).await;
        self.client.remove(&id).await.expect("remove");
        output
    }
}

fn number(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn pid_mode(mode: NamespaceMode, target: &str) -> Option<NamespaceOption> {
    Some(NamespaceOption {
        pid: mode.into(),
        target_id: target.into(),
        ..Default::default()
    })
}

fn profile(kind: ProfileType, file: &str) -> Option<SecurityProfile> {
    Some(SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: file.into(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn users_groups_and_capabilities_are_those_of_the_security_context() {
    let mut bench = Bench::new().await;
    let www_data = |policy: SupplementalGroupsPolicy| Context {
        run_as_username: "www-data".into(),
        supplemental_groups: vec![5000],
        supplemental_groups_policy: policy.into(),
        ..Default::default()
    };
    let merged = www_data(SupplementalGroupsPolicy::Merge);
    assert_eq!(
        bench.prints(merged, "id -u; id -G").await,
        "33\n33 1234 5000\n"
    );
    let strict = www_data(SupplementalGroupsPolicy::Strict);
    assert_eq!(bench.prints(strict, "id -u; id -G").await, "33\n33 5000\n");
    let numbers = Context {
        run_as_user: number(1000),
        run_as_group: number(2000),
        ..Default::default()
    };
    assert_eq!(bench.prints(numbers, "id -u; id -g").await, "1000\n2000\n");

    let masks = "awk '/^Cap(Eff|Amb)/ {print $2}' /proc/self/status";
    let capabilities = |user, add: &[&str], drop: &[&str], ambient: &[&str]| Context {
        run_as_user: number(user),
        capabilities: Some(Capability {
            add_capabilities: names(add),
            drop_capabilities: names(drop),
            add_ambient_capabilities: names(ambient),
        }),
        ..Default::default()
    };
    for (context, expected) in [
        // Bits: CAP_CHOWN 0, CAP_NET_ADMIN 12, CAP_SYS_TIME 25.
        (
            capabilities(0, &["NET_ADMIN", "SYS_TIME"], &["CHOWN"], &[]),
            "00000000aa0435fa\n0000000000000000\n",
        ),
        (
            capabilities(0, &["SYS_TIME"], &["ALL"], &[]),
            "0000000002000000\n0000000000000000\n",
        ),
        (
            capabilities(1000, &["NET_ADMIN"], &[], &[]),
            "0000000000000000\n0000000000000000\n",
        ),
        (
            capabilities(1000, &["NET_ADMIN"], &[], &["NET_ADMIN"]),
            "0000000000001000\n0000000000001000\n",
        ),
    ] {
        let described = format!("{:?}", context.capabilities);
        let shown = bench.prints(context, masks).await;
        // The first line is CapEff.
        assert_eq!(shown, expected, "{described}");
    }
    let unknown = capabilities(0, &["FLY"], &[], &[]);
    assert_fails(
        bench.create(unknown, &["true"]).await,
        Code::InvalidArgument,
        &["FLY"],
    );
    bench.client.end_pod(&bench.pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileges_end_at_the_guest_and_every_restriction_is_in_force() {
    let mut bench = Bench::new().await;
    let privileged = Context {
        privileged: true,
        masked_paths: names(&["/proc/kcore"]),
        readonly_paths: names(&["/proc/sys"]),
        ..Default::default()
    };
    assert_fails(
        bench.create(privileged.clone(), &["true"]).await,
        Code::InvalidArgument,
        &["privileged", "sandbox"],
    );
    bench.client.end_pod(&bench.pod).await;
    let plain = bench.pod.config.clone();
    let with = |context| {
        let mut config = plain.clone();
        config.linux.get_or_insert_default().security_context = Some(context);
        config
    };
    let config = with(LinuxSandboxSecurityContext {
        run_as_group: number(5),
        ..Default::default()
    });
    assert_fails(
        bench.client.run_pod_with(config).await,
        Code::InvalidArgument,
        &["run_as_user"],
    );
    let config = with(LinuxSandboxSecurityContext {
        privileged: true,
        run_as_user: number(7),
        run_as_group: number(5),
        ..Default::default()
    });
    bench.pod = bench.client.run_pod_with(config).await.expect("run pod");
    let script = "mount -t tmpfs none /home && echo 1 > /proc/sys/vm/overcommit_memory && ls /dev/vda && \
                  awk '/^(CapEff|Seccomp:)/ {print $2}' /proc/self/status; uname -r";
    let shown = bench.prints(privileged, script).await;
    let guest = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[..3], ["/dev/vda", "000001ffffffffff", "0"], "{shown}");
    assert_ne!(lines[3], guest.trim(), "privileged in a kernel of its own");

    let confined = Context {
        no_new_privs: true,
        readonly_rootfs: true,
        masked_paths: names(&["/proc/kcore", "/usr"]),
        readonly_paths: names(&["/proc/sys"]),
        ..Default::default()
    };
    let id = bench.start(confined).await;
    let status = bench.client.shell(&id, "cat /proc/1/status").await;
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    let shown = bench
        .client
        .shell(&id, "ls /usr; touch /dev/shm/x; ls /dev/shm")
        .await;
    assert_eq!(shown, "x\n", "a masked directory is empty, shm is writable");
    for line in [
        "touch /x",
        "echo 1 > /proc/sys/kernel/panic",
        "touch /usr/x",
    ] {
        let answer = bench.client.exec(&id, &["sh", "-c", line], 0).await;
        assert_ne!(answer.expect("exec").exit_code, 0, "{line} must fail");
    }
    let shown = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range";
    assert_eq!(bench.client.shell(&id, shown).await, "1\n2000\t3000\n");
    bench.client.end_pod(&bench.pod).await;

    let mut config = bench.client.pod_config("bad-sysctl");
    config.linux = Some(LinuxPodSandboxConfig {
        sysctls: HashMap::from([("kernel.no_such_thing".into(), "1".into())]),
        ..Default::default()
    });
    let refused = bench.client.run_pod_with(config).await;
    assert!(refused.is_err_and(|status| status.message().contains("kernel.no_such_thing")));
    assert!(bench.client.pod_ids().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_are_applied_ignored_or_refused_as_cri_allows() {
    let mut bench = Bench::new().await;
    let file = bench.daemon.path("no-chmod.json");
    std::fs::write(
        &file,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["chmod", "fchmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["getpid"], "action": "SCMP_ACT_KILL", "includes": {"arches": ["s390x"]}},
                {"names": ["getpid"], "action": "SCMP_ACT_KILL", "excludes": {"minKernel": "5.0"}}]}"#,
    )
    .expect("write a profile");
    let seccomp = |kind, file: &str| Context {
        seccomp: profile(kind, file),
        ..Default::default()
    };
    let try_chmod = "awk '/^Seccomp:/ {print $2}' /proc/self/status; touch /x; chmod 400 /x 2>/dev/null; echo $?";
    let path = file.display().to_string();
    for (context, expected) in [
        (seccomp(ProfileType::Localhost, &path), "2\n1\n"),
        (seccomp(ProfileType::RuntimeDefault, ""), "2\n0\n"),
        (seccomp(ProfileType::Unconfined, ""), "0\n0\n"),
        (Context::default(), "0\n0\n"),
    ] {
        let described = format!("{:?}", context.seccomp);
        assert_eq!(
            bench.prints(context, try_chmod).await,
            expected,
            "{described}"
        );
    }
    std::fs::write(&file, "no JSON").expect("write");
    for (file, code, word) in [
        (path.as_str(), Code::InvalidArgument, path.as_str()),
        (
            "/no/such/profile",
            Code::InvalidArgument,
            "/no/such/profile",
        ),
        ("relative", Code::InvalidArgument, "relative"),
    ] {
        let refused = bench
            .create(seccomp(ProfileType::Localhost, file), &["true"])
            .await;
        assert_fails(refused, code, &[word]);
    }

    // A guest has neither AppArmor nor SELinux. The default profiles are accepted, a profile by name is refused.
    let apparmor = |kind, name: &str| Context {
        apparmor: profile(kind, name),
        selinux_options: Some(SeLinuxOption {
            level: "s0:c1,c2".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    for kind in [ProfileType::RuntimeDefault, ProfileType::Unconfined] {
        assert_eq!(
            bench.prints(apparmor(kind, ""), "echo runs").await,
            "runs\n"
        );
    }
    let refused = bench
        .create(apparmor(ProfileType::Localhost, "strict"), &["true"])
        .await;
    assert_fails(refused, Code::Unimplemented, &["AppArmor", "strict"]);
    let labelled = Context {
        selinux_options: Some(SeLinuxOption {
            r#type: "strict_t".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let refused = bench.create(labelled, &["true"]).await;
    assert_fails(refused, Code::Unimplemented, &["SELinux", "strict_t"]);
    // The field that older kubelets use.
    let by_name = Context {
        apparmor_profile: "localhost/strict".into(),
        ..Default::default()
    };
    let refused = bench.create(by_name, &["true"]).await;
    assert_fails(refused, Code::Unimplemented, &["AppArmor", "strict"]);
    bench.client.end_pod(&bench.pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_in_a_pod_with_a_user_namespace_is_nobody_outside() {
    let mut bench = Bench::new().await;
    bench.client.end_pod(&bench.pod).await;
    let mapping = IdMapping {
        host_id: 100_000,
        container_id: 0,
        length: 65536,
    };
    let options = |pid: NamespaceMode| NamespaceOption {
        pid: pid.into(),
        userns_options: Some(UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![mapping],
            gids: vec![mapping],
        }),
        ..Default::default()
    };
    for pid in [NamespaceMode::Container, NamespaceMode::Pod] {
        let mut config = bench.client.pod_config(&format!("users-{}", pid as i32));
        config.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options(pid)),
                ..Default::default()
            }),
            ..Default::default()
        });
        bench.pod = bench.client.run_pod_with(config).await.expect("run pod");
        let root = Context {
            namespace_options: Some(options(pid)),
            masked_paths: names(&["/proc/kcore"]),
            readonly_paths: names(&["/proc/sys"]),
            seccomp: profile(ProfileType::RuntimeDefault, ""),
            ..Default::default()
        };
        let id = bench.start(root.clone()).await;
        let script = "awk '{print $1, $2, $3}' /proc/self/uid_map; id -u; \
                      touch /new && stat -c '%u:%g' /new /bin/busybox /dev/shm /etc/hosts; \
                      chown 33:33 /new && stat -c '%u' /new; echo x > /dev/null; cat /sys/class/net/lo/mtu";
        let shown = bench.client.shell(&id, script).await;
        assert_eq!(
            shown, "0 100000 65536\n0\n0:0\n0:0\n0:0\n0:0\n33\n65536\n",
            "{pid:?}"
        );
        // Root's capabilities do not reach what belongs to the guest.
        for line in [
            "chown 0 /dev/null",
            "mknod /x c 1 3 && cat /x",
            "echo 1 > /proc/sys/vm/overcommit_memory",
            "hostname other",
        ] {
            let answer = bench.client.exec(&id, &["sh", "-c", line], 0).await;
            assert_ne!(answer.expect("exec").exit_code, 0, "{line} must fail");
        }
        let user = Context {
            run_as_username: "www-data".into(),
            ..root
        };
        let id = bench.start(user).await;
        let shown = bench
            .client
            .shell(&id, "id -u; id -G; echo out > /dev/stdout")
            .await;
        assert_eq!(shown, "33\n33 1234\nout\n", "{pid:?}");
        bench.client.end_pod(&bench.pod).await;
    }
    let mut config = bench.client.pod_config("other-users");
    let pod = bench.client.run_pod_with(config.clone()).await;
    bench.pod = pod.expect("run pod");
    let foreign = Context {
        namespace_options: Some(options(NamespaceMode::Container)),
        ..Default::default()
    };
    assert_fails(
        bench.create(foreign, &["true"]).await,
        Code::InvalidArgument,
        &["user namespace"],
    );
    bench.client.end_pod(&bench.pod).await;
    config.linux = Some(LinuxPodSandboxConfig {
        security_context: Some(LinuxSandboxSecurityContext {
            namespace_options: Some(options(NamespaceMode::Node)),
            ..Default::default()
        }),
        ..Default::default()
    });
    assert_fails(
        bench.client.run_pod_with(config).await,
        Code::InvalidArgument,
        &["NODE"],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_shared_as_asked_and_namespaces_of_the_host_are_refused() {
    let mut bench = Bench::new().await;
    let target = bench.start(Context::default()).await;
    let debugger = Context {
        namespace_options: pid_mode(NamespaceMode::Target, &target),
        ..Default::default()
    };
    let shown = bench
        .prints(debugger, "cat /proc/1/cmdline | tr '\\0' ' '")
        .await;
    assert_eq!(shown, "sleep 1000 ", "PID 1 is the target's");
    let guest = Context {
        namespace_options: pid_mode(NamespaceMode::Node, ""),
        ..Default::default()
    };
    let shown = bench.prints(guest, "cat /proc/1/comm").await;
    assert_eq!(shown, "init\n", "PID 1 is the guest's");
    let nobody = Context {
        namespace_options: pid_mode(NamespaceMode::Target, "no-such-container"),
        ..Default::default()
    };
    assert_fails(
        bench.create(nobody, &["true"]).await,
        Code::NotFound,
        &["no-such-container"],
    );
    bench.client.end_pod(&bench.pod).await;

    for (name, options) in [
        (
            "network",
            NamespaceOption {
                network: NamespaceMode::Node.into(),
                ..Default::default()
            },
        ),
        (
            "IPC",
            NamespaceOption {
                ipc: NamespaceMode::Node.into(),
                ..Default::default()
            },
        ),
    ] {
        let mut config = bench.client.pod_config(&name.to_lowercase());
        config.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        });
        assert_fails(
            bench.client.run_pod_with(config).await,
            Code::InvalidArgument,
            &["host", name, "RuntimeClass"],
        );
    }
    assert!(bench.client.pod_ids().await.is_empty());
}
