// SPDX-License-Identifier: Apache-2.0
//! A guest whose agent attacks (tests/hostile-agent), on every queue and stream: only its own pod suffers.
//!
//! The hostile pod has real neighbours, because a daemon that was started again with another initramfs keeps its pods.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_proto::cri::{
    ContainerState, ContainerStatsRequest, ListContainerStatsRequest, ListPodSandboxMetricsRequest,
    PodSandboxState, ReopenContainerLogRequest,
};
use bulkhead_tests::client::{Client, Pod, container};
use bulkhead_tests::daemon::program;
use bulkhead_tests::kubelet::{mount, with_mounts};
use bulkhead_tests::spdy::{self, Process};
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{until, whether};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::setting::Setting;

/// How long each attack lasts.
const ATTACK: Duration = Duration::from_secs(2);
/// How long a call that the hostile guest holds up may take: the longest time limit of a call to an agent.
const HELD_UP: Duration = Duration::from_secs(100);
/// How long it may take to stop a container, and to stop and remove the pod. Time in which the VM waits for a CPU does not
/// count for the daemon, and an emulated host has only one.
const GONE: Duration = Duration::from_secs(180);
/// How much the daemon may log because of all attacks.
const MOST_LOG_BYTES: usize = 256 << 10;

/// A daemon that gives new pods a hostile initramfs. `tables` are lines at the end of the configuration.
pub async fn setting(tables: &str) -> Setting {
    let initramfs = program("hostile-initramfs.cpio");
    let initramfs = initramfs.display();
    Setting::new(|_| {
        format!(
            "initramfs = \"{initramfs}\"\nsandbox.templates_mib = 0\nsandbox.log_mib_per_second = 1\n{tables}"
        )
    })
    .await
}

/// A pod with a hostile guest. Its container `orders` takes the orders.
pub struct Hostile {
    pub pod: Pod,
    client: Client,
    orders: String,
    busybox: String,
    /// How many pods the daemon has ended, because their guests no longer answered after an attack.
    ended: usize,
}

impl Hostile {
    pub async fn start(setting: &Setting) -> Self {
        let mut client = setting.daemon.client().await;
        let pod = client.run_pod("hostile").await.expect("run pod");
        let shared = setting.daemon.path("shared");
        fs::create_dir_all(&shared).expect("a directory to share");
        let config = container("orders", &setting.busybox, &["orders"]);
        let config = with_mounts(config, vec![mount(&shared, "/shared")]);
        let orders = client.create(&pod, config).await.expect("create");
        client.start(&orders).await.expect("start");
        Self {
            pod,
            client,
            orders,
            busybox: setting.busybox.clone(),
            ended: 0,
        }
    }

    pub async fn order(&mut self, words: &[&str]) {
        let answer = self.client.exec(&self.orders, words, 0).await;
        answer.unwrap_or_else(|error| panic!("{words:?}: {error:?}"));
    }

    /// Starts a container whose log, and whose attached streams, are of a kind.
    pub async fn run(&mut self, kind: &str) -> String {
        let config = container(kind, &self.busybox, &[kind]);
        let id = self.client.create(&self.pod, config).await;
        let id = id.expect("create");
        self.client.start(&id).await.expect("start");
        id
    }

    /// Waits until calls are answered again as by an honest guest. A guest that has lost its connection with the daemon by
    /// its attack is ended by the daemon; then the next attack comes from another one.
    async fn until_calm(&mut self, setting: &Setting) {
        let lives = until("the guest obeys again, or is ended", async || {
            let answer = self.client.exec(&self.orders, &["calm"], 5).await;
            let state = self.client.pod_state(&self.pod.id).await;
            match (&answer, state) {
                (Ok(_), _) => Ok(true),
                (_, Ok(PodSandboxState::SandboxNotready)) => Ok(false),
                _ => Err(format!("{answer:?}")),
            }
        })
        .await;
        if !lives {
            println!("the daemon has ended the guest");
            self.client.end_pod(&self.pod).await;
            let ended = self.ended + 1;
            *self = Self::start(setting).await;
            self.ended = ended;
        }
    }

    /// All that a node asks of the guest for the duration of an attack, many times. What it answers is its own affair,
    /// but there must be an answer.
    async fn be_asked(&self) {
        let mut asking = JoinSet::new();
        for number in 0..4 {
            let (mut client, id) = (self.client.clone(), self.orders.clone());
            asking.spawn(async move {
                let began = Instant::now();
                while began.elapsed() < ATTACK {
                    let asked = timeout(HELD_UP, ask(&mut client, &id, number));
                    asked.await.expect("an answer, whatever it is");
                    sleep(Duration::from_millis(50)).await;
                }
            });
        }
        while let Some(asked) = asking.join_next().await {
            asked.expect("questions");
        }
    }
}

async fn ask(client: &mut Client, id: &str, kind: usize) {
    let container_id = id.to_owned();
    match kind {
        0 => {
            let request = ContainerStatsRequest { container_id };
            let _ = client.runtime.container_stats(request).await;
        }
        1 => {
            let request = ListContainerStatsRequest::default();
            let listed = client.runtime.list_container_stats(request).await;
            let listed = listed.expect("statistics of all").into_inner().stats;
            let ids: Vec<_> = listed.iter().flat_map(|one| &one.attributes).collect();
            let own = ids.iter().filter(|one| one.id == id).count();
            assert!(own <= 1, "{ids:?}");
        }
        2 => {
            let request = ListPodSandboxMetricsRequest {};
            let listed = client.runtime.list_pod_sandbox_metrics(request).await;
            let listed = listed.expect("metrics of all").into_inner();
            let metrics = listed.pod_metrics.iter().flat_map(|pod| {
                let of_containers = pod.container_metrics.iter().flat_map(|one| &one.metrics);
                pod.metrics.iter().chain(of_containers)
            });
            let mut seen = std::collections::HashSet::new();
            for metric in metrics {
                let labels = metric.label_values.join(",");
                assert!(!labels.contains(char::is_control), "{labels:?}");
                assert!(seen.insert((&metric.name, labels)), "{metric:?} twice");
            }
        }
        _ => {
            let _ = client.exec(id, &["exec", "code"], 2).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes ten minutes on an emulated host: scripts/test --only hostile::guest"]
async fn a_hostile_guest_costs_only_its_own_pod() {
    let mut setting = setting("").await;
    // Only then has the daemon's look at KVM ended.
    let first = Hostile::start(&setting).await;
    setting.client.end_pod(&first.pod).await;
    let (before, said) = (setting.daemon.census(), setting.daemon.output().len());
    let mut table = Table::new("another client and a neighbour beside a hostile guest");
    setting.measured_idle(&mut table).await;

    let mut hostile = Hostile::start(&setting).await;
    let victim = news(&setting, &mut table, &mut hostile).await;
    calls(&setting, &mut table, &mut hostile).await;
    // News are taken at their own pace. Another guest knows nothing of the victim.
    if hostile.ended == 0 {
        until("the victim has exited", async || {
            let status = setting.client.status(&victim).await.expect("status");
            whether(status.state() == ContainerState::ContainerExited, status)
        })
        .await;
    }
    streams(&setting, &mut table, &mut hostile).await;
    for device in ["frames", "disk", "random", "sockets", "files"] {
        hostile.order(&["devices", device]).await;
        let name = format!("devices: {device}");
        setting.measured(&mut table, &name, sleep(ATTACK)).await;
        hostile.until_calm(&setting).await;
    }
    let logged = setting.daemon.output().len() - said;
    table.row("bytes in the daemon's log", logged < MOST_LOG_BYTES, logged);
    table.row("guests that the daemon has ended", true, hostile.ended);
    table.finish();

    for pod in [&setting.healthy, &hostile.pod] {
        let state = setting.client.pod_state(&pod.id).await.expect("state");
        assert_eq!(state, PodSandboxState::SandboxReady);
    }
    // A guest that answers nothing more is stopped all the same.
    hostile.order(&["control", "drip", "1000"]).await;
    let began = Instant::now();
    let stopped = setting.client.stop(&hostile.orders, 2).await;
    stopped.expect("stop a container");
    assert!(began.elapsed() < GONE, "{:?}", began.elapsed());
    setting.client.end_pod(&hostile.pod).await;
    assert!(began.elapsed() < 2 * GONE, "{:?}", began.elapsed());
    setting.daemon.census().assert_equals(&before);
    let neighbour = &setting.neighbour;
    assert_eq!(setting.client.shell(neighbour, "echo well").await, "well\n");
}

/// News. One says that a container has exited, whose id is returned.
async fn news(setting: &Setting, table: &mut Table, hostile: &mut Hostile) -> String {
    let victim = hostile.run("victim").await;
    for kind in [
        "unknown",
        "failed-starts",
        "invalid",
        "marks",
        "too-long",
        "exits",
        "users",
        "long",
    ] {
        hostile.order(&["news", kind]).await;
        let name = format!("news: {kind}");
        setting.measured(table, &name, hostile.be_asked()).await;
        hostile.until_calm(setting).await;
    }
    victim
}

/// Statistics, and answers to calls.
async fn calls(setting: &Setting, table: &mut Table, hostile: &mut Hostile) {
    for kind in ["absurd", "repeated", "names"] {
        hostile.order(&["statistics", kind]).await;
        let name = format!("statistics: {kind}");
        setting.measured(table, &name, hostile.be_asked()).await;
        hostile.until_calm(setting).await;
    }
    for kind in ["full", "too-long"] {
        let name = format!("output of an exec: {kind}");
        let (mut client, id) = (hostile.client.clone(), hostile.orders.clone());
        let exec = async {
            let answer = client.exec(&id, &["exec", kind], 60).await;
            drop(answer);
        };
        setting.measured(table, &name, exec).await;
    }
    for kind in [
        "drip",
        "claim",
        "truncated",
        "garbled",
        "crowd",
        "grains",
        "pings",
        "settings",
        "continuations",
        "header",
        "resets",
        "farewells",
        "noise",
        "silence",
        "closed",
    ] {
        let seconds = ATTACK.as_secs().to_string();
        hostile.order(&["control", kind, &seconds]).await;
        let name = format!("control port: {kind}");
        setting.measured(table, &name, hostile.be_asked()).await;
        hostile.until_calm(setting).await;
    }
}

/// Logs, execs, attachments and forwarded ports, all kinds of one at the same time.
async fn streams(setting: &Setting, table: &mut Table, hostile: &mut Hostile) {
    let mut client = hostile.client.clone();
    let logs = [
        "flood",
        "line",
        "feeds",
        "bytes",
        "empty",
        "offset",
        "long",
        "kinds",
        "reset",
        "drip",
        "claim",
        "silent",
        "refuse",
        "drip-answer",
    ];
    let mut ids = Vec::new();
    setting
        .measured(table, "logs", async {
            for kind in logs {
                ids.push(hostile.run(kind).await);
            }
            sleep(ATTACK).await;
            for container_id in ids.clone() {
                let request = ReopenContainerLogRequest { container_id };
                let reopened = client.runtime.reopen_container_log(request);
                // Logs that are complete refuse it.
                let _ = timeout(HELD_UP, reopened).await.expect("an answer");
            }
        })
        .await;
    setting
        .measured(table, "attachments, read by nobody", async {
            let mut open = Vec::new();
            for id in &ids {
                let streams = ["stdin", "stdout", "stderr"];
                let url = client.attach_url(id, &streams).await;
                open.push(Process::connect(&url.expect("attach"), &streams).await);
            }
            sleep(ATTACK).await;
        })
        .await;
    let execs = [
        "flood",
        "bytes",
        "empty",
        "input",
        "long",
        "kinds",
        "end",
        "half",
        "drip",
        "claim",
        "silent",
        "refuse",
        "drip-answer",
    ];
    setting
        .measured(table, "execs, output read by nobody", async {
            let mut open = Vec::new();
            for kind in execs {
                let streams = ["stdin", "stdout", "stderr"];
                let url = client.exec_url(&hostile.orders, &[kind], &streams).await;
                open.push(Process::connect(&url.expect("exec"), &streams).await);
            }
            for process in &mut open {
                let stdin = process.stdin.expect("a stream for input");
                // Some sessions have ended by now.
                let _ = process.sender.data(stdin, &[b'i'; 32 << 10]).await;
            }
            sleep(ATTACK).await;
        })
        .await;
    setting
        .measured(table, "forwarded ports, read by nobody", async {
            let url = client.port_forward_url(&hostile.pod.id, &[]).await;
            let connected = spdy::connect(&url.expect("URL"), &["portforward.k8s.io"]).await;
            let (mut sender, mut receiver) = connected.expect("an upgrade");
            for port in ["1", "2", "3", "4"] {
                for kind in ["error", "data"] {
                    let headers = [("streamtype", kind), ("port", port), ("requestid", port)];
                    sender.open(&headers).await;
                }
            }
            let _ = timeout(ATTACK, receiver.next()).await;
            sleep(ATTACK).await;
        })
        .await;
    hostile.order(&["ready", "flood"]).await;
    setting
        .measured(table, "the ready connection", sleep(ATTACK))
        .await;
    hostile.order(&["deaf"]).await;
    setting
        .measured(table, "connections that nobody accepts", async {
            let mut open = JoinSet::new();
            for _ in 0..30 {
                let url = client.exec_url(&hostile.orders, &["silent"], &["stdout"]);
                let url = url.await.expect("exec");
                open.spawn(async move { Process::connect(&url, &["stdout"]).await.end().await });
            }
            sleep(ATTACK).await;
        })
        .await;
    hostile.until_calm(setting).await;
}
