// SPDX-License-Identifier: Apache-2.0
//! The life of containers under kubelet: init containers and sidecars, probes, hooks, restarts, termination messages,
//! grace periods.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_tests::node::{Node, PATIENCE, agnhost, pod, script, with};
use bulkhead_tests::node_api::{container, find_pod, is_ready, phase};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{try_until, whether};
use serde_json::{Value, json};

use crate::checkpoint::directory;
use crate::cli;

/// Checks a pod's status. Returns what was seen once it is as expected.
type Check = fn(&Value) -> Option<String>;

/// A case: its title, the name of the pod, and the check.
type Case = (&'static str, &'static str, Check);

/// Asks for all pods until every case is right or the time is over. Adds a row with the time for each.
async fn watch(node: &Node, table: &mut Table, cases: &[Case]) {
    let started = Instant::now();
    let mut left: Vec<_> = cases.iter().collect();
    // On an emulated CPU, a pod under kubelet takes half a minute.
    let all = try_until("every case is right", 2 * PATIENCE, async || {
        let pods = node.api.pods().await;
        left.retain(|(case, name, check)| {
            let Some(seen) = find_pod(&pods, name).and_then(check) else {
                return true;
            };
            let seconds = started.elapsed().as_secs();
            table.row(case, true, format!("after {seconds} s: {seen}"));
            false
        });
        whether(left.is_empty(), left.len())
    });
    // The cases that are left get their rows below.
    all.await.ok();
    let pods = node.api.pods().await;
    for (case, name, _) in left {
        let status = find_pod(&pods, name).map(|pod| pod["status"].to_string());
        table.row(case, false, format!("{status:?}"));
    }
}

fn restarts(pod: &Value, name: &str) -> u64 {
    container(pod, name)["restartCount"].as_u64().unwrap_or(0)
}

fn is_container_ready(pod: &Value, name: &str) -> bool {
    container(pod, name)["ready"] == true
}

fn when(right: bool, seen: impl ToString) -> Option<String> {
    right.then(|| seen.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_pod_runs_and_another_begins_where_it_is() {
    let place = directory();
    let config = format!("sandbox.warmed = \"{}\"", place.path().display());
    let node = Node::start_with(json!({}), &config).await;
    let main = script("main", "echo hello; date +%s%N >/begun; exec sleep 1000");
    let first = pod("first", json!({"containers": [main]}));
    node.apply(&first);
    let ready = async |name| {
        let running = node
            .api
            .until(name, PATIENCE, |pod| is_ready(pod).then_some(()));
        running.await.expect("the pod gets ready");
    };
    ready("first").await;
    let log = node.api.logs_until("first", "main", |log| !log.is_empty());
    assert_eq!(log.await, "hello\n");
    let run = async |name, command| node.api.run(name, "main", command).await.expect("run");
    // kubelet sends this, and other settings of a real node, only if it runs in its own cgroup.
    let swap = run("first", "cat /sys/fs/cgroup/memory.oom.group").await;
    assert_eq!(swap, "1\n");

    let ids = node.daemon.client().await.pod_ids().await;
    let warm = ["warm", &ids[0], "sleeps", "test", "-s", "/begun"];
    let warmed = cli::bulkhead(&node.daemon, &warm);
    assert!(warmed.status.success(), "{}", cli::stderr(&warmed));
    let second = with(
        first,
        json!({"metadata": {
            "name": "second", "annotations": {"bulkhead.dev/warmed": "sleeps"},
        }}),
    );
    node.apply(&second);
    ready("second").await;
    let begun = "cat /begun";
    let [was, is] = [run("first", begun).await, run("second", begun).await];
    assert_eq!(was, is, "it has not begun anew");
    for own in [
        "hostname",
        "cat /etc/hosts",
        "cat /sys/class/net/eth0/address",
    ] {
        assert_ne!(run("first", own).await, run("second", own).await, "{own}");
    }
    node.end().await;
}

/// A pod with a container for each kind of probe.
fn probes() -> Value {
    let probe = |what: Value| {
        // Not more often: on an emulated CPU, a probe by a command takes much of a second.
        let often = json!({"periodSeconds": 5, "timeoutSeconds": 20, "failureThreshold": 1});
        with(often, what)
    };
    let command = |line: &str| json!({"exec": {"command": ["sh", "-c", line]}});
    let late = "sleep 4; touch /tmp/there; exec sleep 1000";
    let startup = with(
        script("startup", late),
        json!({
            "startupProbe": with(probe(command("test -e /tmp/there")), json!({"failureThreshold": 60})),
            "livenessProbe": probe(command("test -e /tmp/there")),
        }),
    );
    let short = "touch /tmp/there; sleep 12; rm /tmp/there; exec sleep 1000";
    let containers = [
        with(
            script("exec", late),
            json!({"readinessProbe": probe(command("test -e /tmp/there"))}),
        ),
        with(
            agnhost("http", &["netexec", "--http-port=8081", "--udp-port=8081"]),
            json!({"readinessProbe": probe(json!({"httpGet": {"path": "/healthz", "port": 8081}}))}),
        ),
        with(
            script("tcp", "exec nc -ll -p 8082 -e true"),
            json!({"readinessProbe": probe(json!({"tcpSocket": {"port": 8082}}))}),
        ),
        with(
            agnhost(
                "grpc",
                &["grpc-health-checking", "--port=5000", "--http-port=8083"],
            ),
            json!({"readinessProbe": probe(json!({"grpc": {"port": 5000}}))}),
        ),
        with(
            script("closed", "exec sleep 1000"),
            json!({"readinessProbe": probe(json!({"tcpSocket": {"port": 9}}))}),
        ),
        with(
            script("exec-dies", short),
            json!({"livenessProbe": probe(command("test -e /tmp/there"))}),
        ),
        with(
            // agnhost is healthy for ten seconds, then fails.
            agnhost("http-dies", &["liveness"]),
            json!({"livenessProbe": with(
                probe(json!({"httpGet": {"path": "/healthz", "port": 8080}})),
                json!({"failureThreshold": 3}),
            )}),
        ),
        startup,
    ];
    pod("probes", json!({"containers": containers}))
}

const PROBES: [Case; 9] = [
    ("readiness by exec", "probes", |pod| {
        when(is_container_ready(pod, "exec"), "ready")
    }),
    ("readiness by HTTP", "probes", |pod| {
        when(is_container_ready(pod, "http"), "ready")
    }),
    ("readiness by TCP", "probes", |pod| {
        when(is_container_ready(pod, "tcp"), "ready")
    }),
    ("readiness by gRPC", "probes", |pod| {
        when(is_container_ready(pod, "grpc"), "ready")
    }),
    ("a container that is not ready", "probes", |pod| {
        let runs = container(pod, "closed")["state"]["running"].is_object();
        let alone = is_container_ready(pod, "http") && is_container_ready(pod, "grpc");
        let unready = !is_container_ready(pod, "closed") && !is_ready(pod);
        when(runs && alone && unready, "it runs, the pod is not ready")
    }),
    ("liveness by exec restarts", "probes", |pod| {
        let last = &container(pod, "exec-dies")["lastState"]["terminated"];
        let restarted = restarts(pod, "exec-dies") >= 1 && last["exitCode"] == 137;
        when(restarted, format!("exit code {}", last["exitCode"]))
    }),
    ("liveness by HTTP restarts", "probes", |pod| {
        let restarts = restarts(pod, "http-dies");
        when(restarts >= 1, format!("{restarts} restarts"))
    }),
    ("startup holds liveness back", "probes", |pod| {
        let started = container(pod, "startup")["started"] == true;
        when(
            started && restarts(pod, "startup") == 0,
            "started, never restarted",
        )
    }),
    ("containers that are well stay", "probes", |pod| {
        let names = ["exec", "http", "tcp", "grpc", "closed", "startup"];
        let ill = restarts(pod, "exec-dies") >= 1 && restarts(pod, "http-dies") >= 1;
        when(
            ill && names.iter().all(|name| restarts(pod, name) == 0),
            "no restarts",
        )
    }),
];

/// Pods that run to their end, and pods that restart again and again.
fn runs() -> Vec<Value> {
    let work = json!({"volumeMounts": [{"name": "work", "mountPath": "/work"}]});
    let at_work = |name: &str, line: &str| with(script(name, line), work.clone());
    let volumes = json!([{"name": "work", "emptyDir": {}}]);
    let sidecar =
        "echo sidecar >>/work/order; trap 'exit 0' TERM; touch /work/up; sleep 1000 & wait";
    let sidecar = with(
        at_work("sidecar", sidecar),
        json!({
            "restartPolicy": "Always",
            "startupProbe": {"exec": {"command": ["test", "-e", "/work/up"]}, "periodSeconds": 2, "timeoutSeconds": 20, "failureThreshold": 60},
        }),
    );
    let rule = |action: &str, code: u32| {
        json!({
            "restartPolicy": "Never",
            "restartPolicyRules": [{"action": action, "exitCodes": {"operator": "In", "values": [code]}}],
        })
    };
    let once = |code: u32| format!("[ -e /work/once ] && exit 0; touch /work/once; exit {code}");
    let once_then_stay = "[ -e /work/once ] && exec sleep 1000; touch /work/once; sleep 3; exit 88";
    vec![
        pod(
            "init",
            json!({
                "restartPolicy": "Never",
                "volumes": volumes,
                "initContainers": [
                    at_work("one", "echo one >>/work/order"),
                    sidecar,
                    at_work("two", "test -e /work/up && echo two >>/work/order"),
                ],
                "containers": [at_work("main", "echo main >>/work/order; sleep 2; cat /work/order")],
            }),
        ),
        pod(
            "init-fails",
            json!({
                "restartPolicy": "Never",
                "initContainers": [script("one", "exit 3")],
                "containers": [script("main", "exec sleep 1000")],
            }),
        ),
        pod("always", json!({"containers": [script("main", "exit 1")]})),
        pod(
            "on-failure",
            json!({
                "restartPolicy": "OnFailure",
                "volumes": volumes,
                "containers": [script("fine", "exit 0"), at_work("flaky", &once(5))],
            }),
        ),
        pod(
            "never",
            json!({
                "restartPolicy": "Never",
                "containers": [
                    script("exits", "exit 7"),
                    script("tells", "printf 'the last word' >/dev/termination-log"),
                    with(
                        script("logs", "echo said before the end; exit 1"),
                        json!({"terminationMessagePolicy": "FallbackToLogsOnError"}),
                    ),
                ],
            }),
        ),
        pod(
            "rules",
            json!({
                "restartPolicy": "Never",
                "volumes": volumes,
                "containers": [with(at_work("main", &once(42)), rule("Restart", 42))],
            }),
        ),
        pod(
            "rules-all",
            json!({
                "restartPolicy": "Always",
                "volumes": volumes,
                "containers": [
                    with(at_work("main", once_then_stay), rule("RestartAllContainers", 88)),
                    script("peer", "exec sleep 1000"),
                ],
            }),
        ),
        pod(
            "oom",
            json!({
                "containers": [
                    with(
                        script("greedy", "sleep 5; x=$(head -c 100000000 /dev/zero | tr '\\0' x)"),
                        json!({"resources": {"limits": {"memory": "32Mi"}}}),
                    ),
                    script("calm", "exec sleep 1000"),
                ],
            }),
        ),
    ]
}

fn exit_code(pod: &Value, name: &str) -> Option<u64> {
    container(pod, name)["state"]["terminated"]["exitCode"].as_u64()
}

fn message<'a>(pod: &'a Value, name: &str) -> &'a str {
    let terminated = &container(pod, name)["state"]["terminated"];
    terminated["message"].as_str().unwrap_or_default()
}

const RUNS: [Case; 11] = [
    ("init containers, a sidecar, a job: done", "init", |pod| {
        let codes = ["one", "sidecar", "two", "main"].map(|name| exit_code(pod, name));
        when(
            phase(pod) == "Succeeded" && codes == [Some(0); 4],
            format!("Succeeded, {codes:?}"),
        )
    }),
    ("an init container that fails", "init-fails", |pod| {
        let code = exit_code(pod, "one");
        let main = &container(pod, "main")["state"]["waiting"]["reason"];
        let right = phase(pod) == "Failed" && code == Some(3) && main == "PodInitializing";
        when(right, format!("Failed, {code:?}, main {main}"))
    }),
    ("Always: back-off", "always", |pod| {
        let waiting = &container(pod, "main")["state"]["waiting"]["reason"];
        let count = restarts(pod, "main");
        when(
            count >= 2 && waiting == "CrashLoopBackOff",
            format!("{count} restarts, {waiting}"),
        )
    }),
    ("OnFailure: what failed runs again", "on-failure", |pod| {
        let (fine, flaky) = (restarts(pod, "fine"), restarts(pod, "flaky"));
        let right = phase(pod) == "Succeeded" && (fine, flaky) == (0, 1);
        when(right, format!("Succeeded, restarts {fine} and {flaky}"))
    }),
    ("Never: exit code", "never", |pod| {
        let right = phase(pod) == "Failed" && exit_code(pod, "exits") == Some(7);
        when(right && restarts(pod, "exits") == 0, "Failed, 7")
    }),
    ("termination message from its file", "never", |pod| {
        when(
            message(pod, "tells") == "the last word",
            message(pod, "tells"),
        )
    }),
    ("termination message from the log", "never", |pod| {
        let message = message(pod, "logs");
        when(message == "said before the end\n", message)
    }),
    ("restart rule: this container", "rules", |pod| {
        let count = restarts(pod, "main");
        when(
            phase(pod) == "Succeeded" && count == 1,
            format!("Succeeded, {count} restart"),
        )
    }),
    ("restart rule: all containers", "rules-all", |pod| {
        let counts = (restarts(pod, "main"), restarts(pod, "peer"));
        let runs = container(pod, "main")["state"]["running"].is_object();
        when(
            runs && counts.0 == 1 && counts.1 == 1,
            format!("restarts {counts:?}"),
        )
    }),
    ("OOM: the reason", "oom", |pod| {
        let status = container(pod, "greedy");
        let states = [&status["state"], &status["lastState"]];
        let killed = states
            .iter()
            .any(|state| state["terminated"]["reason"] == "OOMKilled");
        when(killed, "OOMKilled")
    }),
    ("OOM: its neighbour stays", "oom", |pod| {
        let status = container(pod, "calm");
        let right = restarts(pod, "greedy") >= 1
            && restarts(pod, "calm") == 0
            && status["state"]["running"].is_object();
        when(right, "runs, no restarts")
    }),
];

const ENDING: [Case; 2] = [
    ("a pod with hooks is ready", "hooks", |pod| {
        when(is_ready(pod), "ready")
    }),
    ("a pod that ignores SIGTERM is ready", "stubborn", |pod| {
        when(is_ready(pod), "ready")
    }),
];

/// Two pods whose end the test observes. Their hooks and signal handlers write to files of the host.
fn ending(shared: &str) -> [Value; 2] {
    let mount = json!({"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]});
    let say = |what: &str| json!({"exec": {"command": ["sh", "-c", format!("echo {what} >>/shared/events")]}});
    let main = "trap 'echo term >>/shared/events; exit 0' TERM; sleep 1000 & wait";
    let containers = [
        with(
            with(script("main", main), mount.clone()),
            json!({"lifecycle": {"postStart": say("post-start"), "preStop": say("pre-stop")}}),
        ),
        with(
            with(
                // httpd has no handler for SIGTERM, so as PID 1 it would not get the signal.
                script(
                    "http",
                    "httpd -f -vv -p 8080 2>>/shared/requests & trap 'exit 0' TERM; wait",
                ),
                mount.clone(),
            ),
            json!({"lifecycle": {"preStop": {"httpGet": {"path": "/pre-stop", "port": 8080}}}}),
        ),
        with(
            script("sleeps", "trap 'exit 0' TERM; sleep 1000 & wait"),
            json!({"lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}),
        ),
    ];
    let volumes = json!([{"name": "shared", "hostPath": {"path": shared, "type": "Directory"}}]);
    [
        pod(
            "hooks",
            json!({"terminationGracePeriodSeconds": 30, "volumes": volumes, "containers": containers}),
        ),
        pod(
            "stubborn",
            json!({
                "terminationGracePeriodSeconds": 6,
                "containers": [script("main", "trap '' TERM; exec sleep 1000")],
            }),
        ),
    ]
}

// Three tests, because an emulated CPU has enough to do with the pods of one.

#[tokio::test(flavor = "multi_thread")]
async fn probes_decide_who_is_ready_and_who_starts_again() {
    Registry::shared().push("agnhost");
    let node = Node::start(json!({})).await;
    let mut table = Table::new("kubelet: probes");
    node.apply(&probes());
    watch(&node, &mut table, &PROBES).await;
    table.finish();
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_run_to_their_end_and_start_again_as_their_pods_specify() {
    let node = Node::start(json!({})).await;
    let mut table = Table::new("kubelet: containers run and end");
    for pod in runs() {
        node.apply(&pod);
    }
    watch(&node, &mut table, &RUNS).await;
    let order = node.api.logs("init", "main").await;
    table.equal(
        "init containers: their order",
        order.as_str(),
        "one\nsidecar\ntwo\nmain\n",
    );
    table.finish();
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_and_signals_end_containers_in_time() {
    let node = Node::start(json!({})).await;
    let shared = node.path("shared");
    fs::create_dir(&shared).expect("a directory of the host");
    let mut table = Table::new("kubelet: hooks and signals");
    for pod in ending(&shared.display().to_string()) {
        node.apply(&pod);
    }
    watch(&node, &mut table, &ENDING).await;

    let begun = Instant::now();
    node.delete("hooks");
    node.delete("stubborn");
    let hooks = node.until_stopped("hooks").await.map(|()| begun.elapsed());
    let stubborn = node.until_stopped("stubborn").await;
    let stubborn = stubborn.map(|()| begun.elapsed());
    // It ended by SIGTERM, before its grace period of 30 s was over.
    let grace = hooks
        .as_ref()
        .is_ok_and(|time| *time < Duration::from_secs(30));
    table.row("SIGTERM ends a container", grace, format!("{hooks:?}"));
    let grace = stubborn
        .as_ref()
        .is_ok_and(|time| *time >= Duration::from_secs(6));
    table.row(
        "SIGKILL ends it after the grace period",
        grace,
        format!("{stubborn:?}"),
    );
    let events = fs::read_to_string(shared.join("events")).unwrap_or_default();
    table.equal(
        "hooks by exec",
        events.as_str(),
        "post-start\npre-stop\nterm\n",
    );
    let requests = fs::read_to_string(shared.join("requests")).unwrap_or_default();
    table.row("a hook by HTTP", requests.contains("/pre-stop"), requests);
    table.finish();
    node.end().await;
}
