// SPDX-License-Identifier: Apache-2.0
//! The node's own components: containerd runs them behind Bulkhead's socket, beside pods in microVMs. They are kube-proxy
//! and the agent that installs the network, which the cluster has, and a DNS server, which this test adds.

use std::collections::BTreeMap;

use bulkhead_tests::cluster::{
    NODE, Namespace, RUNTIME_CLASS, apply_all, cluster, either, object, on_node, pod,
};
use bulkhead_tests::daemon::program;
use bulkhead_tests::node::with;
use bulkhead_tests::table::Table;
use serde_json::{Value, json};

const NAME: &str = "delegate";
const SYSTEM: &str = "kube-system";
/// Says which kernel it has, and tells its name on port 8080.
const SERVER: &str =
    "cat /proc/version; mkdir /www; hostname >/www/index.html; exec httpd -f -p 8080 -h /www";
/// Says which process it is on the node.
const ON_HOST: &str = "cat /proc/version; sed 's/.*) . \\([0-9]*\\).*/pid \\1/' /proc/self/stat
    trap 'exit 0' TERM; sleep 100000 & wait";
/// The pods that ask, by where they run.
const ASKING: [&str; 3] = ["in-vm", "in-runc", "on-host"];
/// The Services, and the pod of each. The last is made while containerd is down.
const SERVICES: [(&str, &str); 3] = [
    ("in-vm", "in-vm"),
    ("in-runc", "in-runc"),
    ("late", "in-vm"),
];

/// The node's containerd, which is dead. It is started again on drop.
struct Killed {
    command: String,
}

impl Killed {
    /// Kills the process that runs containerd's program, which no shim does.
    fn containerd() -> Self {
        let line = "for one in /proc/[0-9]*; do
                case $(readlink $one/exe) in
                    */containerd) tr '\\0' ' ' <$one/cmdline; kill -KILL ${one#/proc/} ;;
                esac
            done";
        let command = on_node(line).expect("kill containerd");
        assert!(!command.is_empty(), "no containerd runs on the node");
        Self { command }
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let directory = std::env::var("BULKHEAD_CLUSTER").unwrap_or_default();
        let log = format!("{directory}/share/{NODE}/logs/containerd.log");
        let _ = on_node(&format!(
            "setsid {} </dev/null >>{log} 2>&1 &",
            self.command
        ));
    }
}

/// Removes on drop what the test makes outside of its namespace.
struct MayRead;

impl MayRead {
    /// Lets the DNS server of this test read what the cluster's reads.
    fn give() -> Self {
        let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"});
        let account = json!({"kind": "ServiceAccount", "name": "coredns", "namespace": NAME});
        apply_all(&[json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "tests-delegate"},
            "roleRef": role,
            "subjects": [account],
        })]);
        Self
    }
}

impl Drop for MayRead {
    fn drop(&mut self) {
        let _ = cluster(&["delete", "clusterrolebinding", "tests-delegate"]);
    }
}

fn system_object(kind: &str, name: &str) -> Value {
    let text = cluster(&["-n", SYSTEM, "get", kind, name, "-o", "json"])
        .expect("an object of the cluster");
    serde_json::from_str(&text).expect("kubectl's JSON")
}

/// The cluster's DNS server once more, in containerd.
fn dns() -> Vec<Value> {
    let config = system_object("configmap", "coredns")["data"].clone();
    let deployment = system_object("deployment", "coredns")["spec"].clone();
    let ours = json!({"template": {"spec": {"runtimeClassName": "runc"}}});
    let service =
        json!({"selector": {"k8s-app": "kube-dns"}, "ports": [{"port": 53, "protocol": "UDP"}]});
    vec![
        object("ServiceAccount", "coredns", json!({})),
        object("ConfigMap", "coredns", json!({"data": config})),
        object("Deployment", "dns", json!({"spec": with(deployment, ours)})),
        object("Service", "dns", json!({"spec": service})),
    ]
}

fn server(name: &str, class: &str) -> Value {
    let ready = json!({"readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}});
    pod(name, SERVER, ready, json!({"runtimeClassName": class}))
}

/// A pod that names no RuntimeClass and shares the host's network and processes.
fn on_host(name: &str, line: &str, more: Value) -> Value {
    let host =
        json!({"hostNetwork": true, "hostPID": true, "dnsPolicy": "ClusterFirstWithHostNet"});
    let mut pod = pod(name, line, json!({}), with(host, more));
    if let Some(spec) = pod["spec"].as_object_mut() {
        spec.remove("runtimeClassName");
    }
    pod
}

fn service(name: &str, app: &str) -> Value {
    let spec = json!({"selector": {"app": app}, "ports": [{"port": 80, "targetPort": 8080}]});
    object("Service", name, json!({"spec": spec}))
}

/// Asks Services by the names that the cluster's DNS knows, in a microVM, and for an address at the DNS server in
/// containerd.
fn ask(own: &Namespace, pod: &str, services: &[&str]) -> String {
    let line = format!(
        "for service in {}; do timeout 60 wget -qO- http://$service.{NAME}.svc.cluster.local/; done 2>&1
        nslookup in-vm.{NAME}.svc.cluster.local $(nslookup dns.{NAME}.svc.cluster.local | awk '/^Address/ && !/:53$/ {{print $NF}}') |
            awk '/^Address/ && !/:53$/ {{print $NF}}'",
        services.join(" ")
    );
    let said = either(own.kubectl(&["exec", pod, "--", "sh", "-c", &line]));
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The pods that containerd runs: the container of each, and how often it was started again.
fn of_containerd(own: &Namespace) -> BTreeMap<String, (String, u64)> {
    let mut pods = own.objects("pods", "app!=in-vm,app!=next");
    let text = cluster(&[
        "-n",
        SYSTEM,
        "get",
        "pods",
        "-l",
        "k8s-app in (kube-proxy, cni-agent)",
        "-o",
        "json",
    ]);
    let list: Value = serde_json::from_str(&either(text)).expect("kubectl's JSON");
    pods.extend(list["items"].as_array().cloned().unwrap_or_default());
    let one = |pod: &Value| {
        let status = &pod["status"]["containerStatuses"][0];
        let id = status["containerID"].as_str().unwrap_or_default();
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        (
            name.to_owned(),
            (id.to_owned(), status["restartCount"].as_u64().unwrap_or(0)),
        )
    };
    pods.iter().map(one).collect()
}

/// What the endpoint lists of these pods, each with its state, its container and the container's state.
fn listed(pods: &BTreeMap<String, (String, u64)>) -> Vec<String> {
    let shown = on_node(&format!("{} ps", program("bulkhead").display())).expect("bulkhead ps");
    let rows = shown
        .lines()
        .map(|line| line.split_whitespace().take(6).collect::<Vec<_>>());
    let mut rows: Vec<_> = rows
        .filter(|row| row.get(1).is_some_and(|name| pods.contains_key(*name)))
        .map(|row| row.join(" "))
        .collect();
    rows.sort();
    rows
}

/// Whether the node is ready, and since when.
fn readiness() -> String {
    let path = "jsonpath={range .status.conditions[?(@.type==\"Ready\")]}{.status} {.lastTransitionTime}{end}";
    either(cluster(&["get", "node", NODE, "-o", path]))
}

/// Which process of the node the pod `on-host` is, as its container says.
fn host_pid(own: &Namespace) -> String {
    let log = own.until_logged("on-host", "pid ");
    let pid = log.lines().find_map(|line| line.strip_prefix("pid "));
    pid.unwrap_or_default().to_owned()
}

fn kernel(own: &Namespace, pod: &str) -> String {
    let log = own.until_logged(pod, "Linux version");
    log.lines().next().unwrap_or_default().to_owned()
}

/// Where each component runs, and that it does there what it needs.
fn check_components(own: &Namespace, table: &mut Table) {
    let node = on_node("cat /proc/version").expect("the node's kernel");
    for component in ["kube-proxy", "cni-agent"] {
        let seen = cluster(&[
            "-n",
            SYSTEM,
            "exec",
            &format!("daemonset/{component}"),
            "--",
            "cat",
            "/proc/version",
        ]);
        table.equal(
            &format!("{component}: the node's kernel"),
            seen,
            Ok(node.clone()),
        );
    }
    for pod in ["in-runc", "on-host"] {
        table.equal(
            &format!("{pod}: the node's kernel"),
            kernel(own, pod).as_str(),
            node.trim_end(),
        );
    }
    let seen = kernel(own, "in-vm");
    table.row("in-vm: a kernel of its own", seen != node.trim_end(), seen);
    let seen = on_node(
        "awk '$5 == \"/run/cni-agent/bpf\" {sub(/.* - /, \"\"); print $1}' /proc/self/mountinfo",
    );
    table.equal(
        "the node sees what the agent mounted (Bidirectional)",
        seen,
        Ok("bpf\n".into()),
    );
    let seen = on_node("ls /etc/cni/net.d");
    table.equal(
        "the agent wrote the network's configuration",
        seen,
        Ok("10-cluster.conflist\n".into()),
    );
    let addresses =
        ["in-vm", "in-runc"].map(|name| own.object("pod", name)["status"]["podIP"].clone());
    let of_range = |address: &Value| {
        address
            .as_str()
            .is_some_and(|text| text.starts_with("10.87.1."))
    };
    let right = addresses.iter().all(of_range) && addresses[0] != addresses[1];
    table.row(
        "both have addresses of one range",
        right,
        format!("{addresses:?}"),
    );
}

/// Waits until these pods reach pods of both kinds, by names that DNS servers of both kinds know. DNS and kube-proxy learn
/// of a Service some time after the API server.
fn check_services(
    own: &Namespace,
    when: &str,
    asking: &[&str],
    services: &[(&str, &str)],
    table: &mut Table,
) {
    let service = own.object("service", "in-vm");
    let address = service["spec"]["clusterIP"].as_str().unwrap_or_default();
    let (names, mut expected): (Vec<_>, Vec<_>) = services.iter().copied().unzip();
    expected.push(address);
    for pod in asking {
        let case = format!("{when}: {pod} asks Services and DNS");
        let seen = own.until(&case, || {
            let seen = ask(own, pod, &names);
            (seen == expected.join(" ")).then_some(seen)
        });
        table.row(&case, true, seen);
    }
}

#[test]
fn the_nodes_components_run_in_a_delegate_that_may_be_killed() {
    let own = Namespace::new(NAME);
    let _may_read = MayRead::give();
    own.apply(&dns());
    own.apply(&[
        server("in-vm", RUNTIME_CLASS),
        server("in-runc", "runc"),
        on_host("on-host", ON_HOST, json!({})),
        service("in-vm", "in-vm"),
        service("in-runc", "in-runc"),
    ]);
    own.wait_for_rollout("deployment/dns");
    for pod in ASKING {
        own.until_ready(pod);
    }
    let mut table = Table::new("cluster: the node's components in containerd");
    check_components(&own, &mut table);
    check_services(&own, "before", &ASKING, &SERVICES[..2], &mut table);

    let (before, ready) = (of_containerd(&own), readiness());
    let list = listed(&before);
    table.row(
        "there are five pods of containerd",
        before.len() == 5 && list.len() == 5,
        list.join(", "),
    );
    let pid = host_pid(&own);
    let killed = Killed::containerd();
    check_while_down(&own, &mut table);
    table.equal(
        "down: its pods and their containers are listed",
        listed(&before),
        list,
    );
    on_node(&format!("kill -KILL {pid}")).expect("end a container of containerd");

    drop(killed);
    own.until("a container that ended meanwhile runs again", || {
        let (id, restarts) = of_containerd(&own).remove("on-host")?;
        (restarts == 1 && id != before["on-host"].0).then_some(())
    });
    own.until_ready("on-host");
    let new = host_pid(&own);
    table.row(
        "again: a container that ended meanwhile runs again",
        new != pid,
        format!("process {pid}, then {new}"),
    );
    let others = |mut pods: BTreeMap<_, _>| {
        pods.remove("on-host");
        pods
    };
    table.equal(
        "again: no other was started again",
        others(of_containerd(&own)),
        others(before),
    );
    check_again(&own, &mut table);
    table.equal("the node was ready all the time", readiness(), ready);
    table.finish();
}

/// containerd is down.
fn check_while_down(own: &Namespace, table: &mut Table) {
    // kube-proxy, whose containerd is down, makes this one.
    own.apply(&[service("late", "in-vm")]);
    check_services(own, "down", &["in-vm"], &SERVICES, table);
    let once = json!({"restartPolicy": "Never"});
    own.apply(&[pod("next", "echo runs", json!({}), once)]);
    own.until_phase("next", "Succeeded");
    let log = own.get(&["logs", "next"]);
    table.equal(
        "down: a new pod in a microVM starts and ends",
        log.as_str(),
        "runs\n",
    );
    let seen = own.kubectl(&["exec", "in-runc", "--", "true"]);
    let named = seen.as_ref().is_err_and(|error| error.contains("runc"));
    table.row(
        "down: exec in its pods fails and names it",
        named,
        either(seen),
    );
}

/// containerd is back.
fn check_again(own: &Namespace, table: &mut Table) {
    let said = own.kubectl(&[
        "exec",
        "in-runc",
        "--",
        "sh",
        "-c",
        "echo back >/proc/1/fd/1; echo said",
    ]);
    table.equal("again: exec in its pods", said, Ok("said\n".into()));
    let log = own.until_logged("in-runc", "back");
    table.row(
        "again: their logs go on",
        true,
        log.lines().last().unwrap_or_default(),
    );
    let once = json!({"restartPolicy": "Never"});
    own.apply(&[on_host("host-again", "echo runs; ip addr show pods0", once)]);
    own.until_phase("host-again", "Succeeded");
    let log = own.get(&["logs", "host-again"]);
    let right = log.starts_with("runs") && log.contains("10.87.1.1/24");
    table.row(
        "again: a new pod on the host's network runs",
        right,
        log.lines().next().unwrap_or_default(),
    );
    check_services(own, "again", &ASKING, &SERVICES, table);
}
