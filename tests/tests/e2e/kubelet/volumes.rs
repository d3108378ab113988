// SPDX-License-Identifier: Apache-2.0
//! What containers see: volumes of the kinds that need no API server, users, privileges, limits.
//!
//! Containers print what they see as lines `NAME=VALUE`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use bulkhead_tests::node::{Node, PATIENCE, pod, script, with};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{try_until, whether};
use serde_json::{Value, json};

/// Finds the value of a line `NAME=VALUE`.
fn fact<'a>(log: &'a str, name: &str) -> &'a str {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix('=');
    log.lines().find_map(value).unwrap_or("(not said)")
}

/// Adds a row for each of a container's lines.
async fn compare(node: &Node, table: &mut Table, at: (&str, &str), facts: &[(&str, &str, &str)]) {
    let log = node.api.logs(at.0, at.1).await;
    for (case, name, expected) in facts {
        table.equal(case, fact(&log, name), expected);
    }
    if facts
        .iter()
        .any(|(_, name, expected)| fact(&log, name) != *expected)
    {
        table.row("the whole log", false, log);
    }
}

fn volumes(host: &str) -> Value {
    let item = |path: &str, field: &str| json!({"path": path, "fieldRef": {"fieldPath": field}});
    let cpu = json!({"path": "cpu", "resourceFieldRef": {
        "containerName": "main", "resource": "limits.cpu", "divisor": "1m",
    }});
    // A projected volume is the same to a runtime, but kubelet does not make one without an API server.
    let nested = json!({"defaultMode": 0o440, "items": [
        item("a/name", "metadata.name"), item("b/uid", "metadata.uid"),
    ]});
    let oddities = Registry::shared().image("test/oddities");
    let volumes = json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
        {"name": "host", "hostPath": {"path": host, "type": "Directory"}},
        {"name": "file", "hostPath": {"path": format!("{host}/file"), "type": "File"}},
        {"name": "made", "hostPath": {"path": format!("{host}/made"), "type": "DirectoryOrCreate"}},
        {"name": "down", "downwardAPI": {"items": [item("labels", "metadata.labels"), cpu]}},
        {"name": "nested", "downwardAPI": nested},
        {"name": "image", "image": {"reference": oddities, "pullPolicy": "IfNotPresent"}},
    ]);
    let mount =
        |name: &str, path: &str, more: Value| with(json!({"name": name, "mountPath": path}), more);
    let mounts = json!([
        mount("disk", "/disk", json!({})),
        mount("disk", "/sub", json!({"subPath": "deep/down"})),
        mount(
            "disk",
            "/expression",
            json!({"subPathExpr": "$(POD_NAME)-$(COLOUR)"})
        ),
        mount("memory", "/memory", json!({})),
        mount("host", "/host", json!({})),
        mount("host", "/read-only", json!({"readOnly": true})),
        mount("file", "/one-file", json!({})),
        mount("made", "/made", json!({})),
        mount("down", "/down", json!({})),
        mount("nested", "/nested", json!({})),
        mount("image", "/image", json!({})),
        mount("image", "/image-part", json!({"subPath": "merged"})),
    ]);
    let environment = json!([
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}},
        {"name": "COLOUR", "value": "blue"},
    ]);
    let main = with(
        script("main", MAIN),
        json!({
            "volumeMounts": mounts,
            "env": environment,
            "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}},
        }),
    );
    let neighbour = "until [ -e /disk/from-main ]; do sleep 0.2; done; echo read=$(cat /disk/from-main); exec sleep 1234";
    let neighbour = with(
        script("neighbour", neighbour),
        json!({"volumeMounts": [mount("disk", "/disk", json!({}))]}),
    );
    let mut pod = pod(
        "volumes",
        json!({
            "hostname": "named",
            "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["elsewhere"]}],
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["192.0.2.53"], "searches": ["pods.example"]},
            "shareProcessNamespace": true,
            "volumes": volumes,
            "containers": [main, neighbour],
        }),
    );
    pod["metadata"]["labels"] = json!({"colour": "green"});
    pod
}

const MAIN: &str = r#"
say() { echo "$1=$2"; }
echo hello >/disk/from-main
echo below >/sub/file; say sub-path "$(cat /disk/deep/down/file)"
echo named >/expression/file; say expression "$(cat /disk/volumes-node-blue/file)"
say memory-type "$(awk '$2 == "/memory" {print $3}' /proc/mounts)"
say memory-size "$(df -k /memory | awk 'END {print $2}')"
say host "$(cat /host/file)"
echo from the pod >/host/from-pod; echo more >>/one-file; echo made >/made/file
touch /read-only/x 2>/dev/null && say read-only written || say read-only refused
say labels "$(cat /down/labels)"; say cpu "$(cat /down/cpu)"
say nested "$(cat /nested/a/name)"; say mode "$(stat -Lc %a /nested/b/uid)"
say image "$(cat /image/changed)"; say image-part "$(ls /image-part)"
touch /image/x 2>/dev/null && say image-written yes || say image-written no
say memory "$MEMORY"; say ip "$(hostname -i)/$POD_IP"
say hostname "$(hostname)"; say alias "$(awk '/elsewhere/ {print $1}' /etc/hosts)"
say dns "$(tr '\n' ' ' </etc/resolv.conf)"
say limit "$(cat /sys/fs/cgroup/memory.max)"; say quota "$(cat /sys/fs/cgroup/cpu.max)"
until ps | grep -q '[s]leep 1234'; do sleep 0.2; done; say others seen
exec sleep 1000
"#;

/// A pod whose containers have different users and privileges.
fn identities() -> Value {
    let containers = [
        script("plain", IDENTITY),
        with(
            script("root", IDENTITY),
            json!({"securityContext": {
                "runAsUser": 0, "runAsGroup": 0,
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "CHOWN"]},
            }}),
        ),
        with(
            script("privileged", IDENTITY),
            json!({"securityContext": {
                "runAsUser": 0, "privileged": true, "seccompProfile": {"type": "Unconfined"},
            }}),
        ),
    ];
    let mount = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    let containers: Vec<_> = containers
        .into_iter()
        .map(|container| with(container, mount.clone()))
        .collect();
    pod(
        "identities",
        json!({
            "securityContext": {
                "runAsUser": 1000, "runAsGroup": 3000, "fsGroup": 2000, "supplementalGroups": [4000],
                "seccompProfile": {"type": "RuntimeDefault"},
                "sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "80"}],
            },
            "volumes": [{"name": "data", "emptyDir": {}}],
            "containers": containers,
        }),
    )
}

const IDENTITY: &str = r#"
say() { echo "$1=$2"; }
of() { awk -v name="$1:" '$1 == name {print $2}' /proc/self/status; }
say id "$(id -u):$(id -g)"; say groups "$(id -G | tr ' ' '\n' | sort -n | tr '\n' ' ')"
touch "/data/by-$(id -u)"; say data "$(stat -c %g:%a /data) $(stat -c %g /data/by-$(id -u))"
touch /tmp/x 2>/dev/null && say root written || say root refused
say capabilities "$(of CapEff)"; say seccomp "$(of Seccomp)"; say no-new-privileges "$(of NoNewPrivs)"
say sysctl "$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)"
say user-namespace "$(awk '{print ($2 == 0) ? "the guest'"'"'s" : "its own"}' /proc/self/uid_map)"
exec sleep 1000
"#;

/// A Guaranteed pod without a RuntimeClass's overhead, as small as pods usually are.
fn limited() -> Value {
    let limits = json!({"cpu": "500m", "memory": "64Mi"});
    pod(
        "limited",
        json!({"containers": [with(
            script("main", "x=$(head -c 30000000 /dev/zero | tr '\\0' x); echo held=${#x}; exec sleep 1000"),
            json!({"resources": {"limits": limits, "requests": limits}}),
        )]}),
    )
}

/// The script for a pod without a volume.
const IDENTITY_ALONE: &str = r#"
echo "id=$(id -u):$(id -g)"
awk '{print "user-namespace=" (($2 == 0) ? "the guest'"'"'s" : "its own")}' /proc/self/uid_map
exec sleep 1000
"#;

#[tokio::test(flavor = "multi_thread")]
async fn containers_see_the_volumes_privileges_and_limits_of_their_pods() {
    let node = Node::start(json!({})).await;
    let host = node.path("host");
    fs::create_dir(&host).expect("a directory of the host");
    fs::write(host.join("file"), "of the host\n").expect("a file of the host");
    fs::set_permissions(&host, fs::Permissions::from_mode(0o777)).expect("its mode");
    let own = pod(
        "own-users",
        json!({"hostUsers": false, "containers": [script("main", IDENTITY_ALONE)]}),
    );
    let pods = [
        volumes(&host.display().to_string()),
        identities(),
        own,
        limited(),
    ];
    let mut table = Table::new("kubelet: volumes, privileges and limits");
    for pod in &pods {
        node.apply(pod);
    }
    // The last line that each container prints. One that does not run never prints it.
    let told = |log: &str, name: &str| fact(log, name) != "(not said)";
    let cases = [
        ("volumes", "main", "others"),
        ("volumes", "neighbour", "read"),
        ("identities", "plain", "user-namespace"),
        ("identities", "root", "user-namespace"),
        ("identities", "privileged", "user-namespace"),
        ("own-users", "main", "user-namespace"),
        ("limited", "main", "held"),
    ];
    let all = try_until("all containers have said all", PATIENCE, async || {
        for (pod, container, last) in cases {
            let log = node.api.logs(pod, container).await;
            whether(told(&log, last), log)?;
        }
        Ok(())
    });
    // If one is missing, its row says so.
    all.await.ok();
    for (pod, container, last) in cases {
        let log = node.api.logs(pod, container).await;
        let status = node.api.pod(pod).await["status"].to_string();
        let seen = if told(&log, last) { "it has" } else { &status };
        let case = format!("{pod}/{container} has said all");
        table.row(&case, told(&log, last), seen);
    }
    compare(
        &node,
        &mut table,
        ("volumes", "main"),
        &[
            ("subPath", "sub-path", "below"),
            ("subPathExpr", "expression", "named"),
            ("emptyDir in memory", "memory-type", "tmpfs"),
            ("its size limit", "memory-size", "8192"),
            ("hostPath, a directory", "host", "of the host"),
            ("hostPath, read-only", "read-only", "refused"),
            ("downwardAPI: labels", "labels", "colour=\"green\""),
            ("downwardAPI: a limit", "cpu", "500"),
            ("downwardAPI: a path", "nested", "volumes-node"),
            ("its mode", "mode", "440"),
            ("image volume", "image", "new"),
            ("image volume, subPath", "image-part", "above"),
            ("image volume, writing", "image-written", "no"),
            ("environment: a limit", "memory", "67108864"),
            ("hostname", "hostname", "named"),
            ("hostAliases", "alias", "192.0.2.7"),
            (
                "dnsConfig",
                "dns",
                "search pods.example nameserver 192.0.2.53 ",
            ),
            ("memory limit", "limit", "67108864"),
            ("CPU limit", "quota", "50000 100000"),
            (
                "shared processes: the neighbour's are seen",
                "others",
                "seen",
            ),
        ],
    )
    .await;
    let ip = node.api.pod("volumes").await["status"]["podIP"].clone();
    let ip = ip.as_str().unwrap_or("none");
    compare(
        &node,
        &mut table,
        ("volumes", "main"),
        &[(
            "environment: the pod's address",
            "ip",
            &format!("{ip}/{ip}"),
        )],
    )
    .await;
    compare(
        &node,
        &mut table,
        ("volumes", "neighbour"),
        &[("emptyDir on disk is shared", "read", "hello")],
    )
    .await;
    let read = |name: &str| fs::read_to_string(host.join(name)).unwrap_or_default();
    table.equal(
        "hostPath: what the pod wrote",
        read("from-pod").as_str(),
        "from the pod\n",
    );
    table.equal(
        "hostPath, a file",
        read("file").as_str(),
        "of the host\nmore\n",
    );
    table.equal(
        "hostPath, made by kubelet",
        read("made/file").as_str(),
        "made\n",
    );

    compare(
        &node,
        &mut table,
        ("identities", "plain"),
        &[
            ("runAsUser, runAsGroup", "id", "1000:3000"),
            ("fsGroup, supplementalGroups", "groups", "2000 3000 4000 "),
            (
                "fsGroup of a volume and of new files",
                "data",
                "2000:2777 2000",
            ),
            (
                "no capabilities for who is not root",
                "capabilities",
                "0000000000000000",
            ),
            ("seccomp: RuntimeDefault", "seccomp", "2"),
            ("a sysctl", "sysctl", "80"),
        ],
    )
    .await;
    compare(
        &node,
        &mut table,
        ("identities", "root"),
        &[
            ("a container overrides its pod", "id", "0:0"),
            (
                "capabilities dropped and added",
                "capabilities",
                "0000000000001001",
            ),
            ("readOnlyRootFilesystem", "root", "refused"),
            ("allowPrivilegeEscalation", "no-new-privileges", "1"),
        ],
    )
    .await;
    compare(
        &node,
        &mut table,
        ("identities", "privileged"),
        &[
            (
                "privileged: capabilities",
                "capabilities",
                "000001ffffffffff",
            ),
            ("seccomp: Unconfined", "seccomp", "0"),
            ("privileged: writes", "root", "written"),
        ],
    )
    .await;
    compare(
        &node,
        &mut table,
        ("own-users", "main"),
        &[
            ("a user namespace", "user-namespace", "its own"),
            ("who is root in it", "id", "0:0"),
        ],
    )
    .await;
    compare(
        &node,
        &mut table,
        ("limited", "main"),
        &[("64Mi without overhead holds 30 MB", "held", "30000000")],
    )
    .await;
    table.finish();
    node.end().await;
}
