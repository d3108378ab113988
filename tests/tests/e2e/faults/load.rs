// SPDX-License-Identifier: Apache-2.0
//! The daemon is killed at random moments while several clients make and end pods.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_proto::cri::ListPodSandboxRequest;
use bulkhead_tests::client::{Client, container};
use bulkhead_tests::daemon::Daemon;
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{Wait, until, whether};
use tonic::Status;

const KILLS: usize = 25;
const CLIENTS: usize = 2;
/// The longest time that a daemon lives.
const LONGEST_LIFE_MS: u64 = 4000;
/// Chooses the moments again as in an earlier run.
const SEED_VARIABLE: &str = "BULKHEAD_SEED";
/// Counts without end.
const TICKS: &str = "i=0; while true; do echo tick $i; i=$((i+1)); sleep 0.2; done";

/// xorshift64.
struct Random(u64);

impl Random {
    /// Prints its seed.
    fn new() -> Self {
        let given = std::env::var(SEED_VARIABLE).ok();
        let clock = SystemTime::now().duration_since(UNIX_EPOCH);
        let clock = clock.map_or(1, |since| u64::from(since.subsec_nanos()));
        let seed = given
            .and_then(|text| text.parse().ok())
            .unwrap_or(clock)
            .max(1);
        println!("{SEED_VARIABLE}={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What several clients share.
struct Load {
    socket: PathBuf,
    logs: PathBuf,
    image: String,
    is_over: AtomicBool,
    lives: AtomicUsize,
    broken: AtomicUsize,
}

impl Load {
    async fn client(&self) -> Client {
        let mut wait = Wait::until("the daemon answers");
        loop {
            match Client::connect(&self.socket, &self.logs).await {
                Ok(client) => return client,
                Err(error) => wait.again(error.to_string()).await,
            }
        }
    }

    /// Makes and ends pods until the load is over. What a call that failed has left is removed, as kubelet does it.
    async fn go_on(&self, name: String) {
        while !self.is_over.load(Ordering::Relaxed) {
            let mut client = self.client().await;
            match self.life(&mut client, &name).await {
                Ok(()) => self.lives.fetch_add(1, Ordering::Relaxed),
                Err(_) => self.broken.fetch_add(1, Ordering::Relaxed),
            };
            let mut wait = Wait::until("what is left of the pod is removed");
            while let Err(error) = remove(&mut self.client().await, &name).await {
                wait.again(format!("{error:?}")).await;
            }
        }
    }

    async fn life(&self, client: &mut Client, name: &str) -> Result<(), Status> {
        let pod = client.run_pod(name).await?;
        let config = container("main", &self.image, &["sh", "-c", TICKS]);
        let id = client.create(&pod, config).await?;
        client.start(&id).await?;
        let answer = client.exec(&id, &["echo", "well"], 20).await?;
        assert_eq!(answer.stdout, b"well\n", "{name}");
        let log = client.log_until(&pod, "main", |log| log.contains("tick 1\n"));
        log.await;
        client.stop(&id, 0).await?;
        client.remove(&id).await?;
        client.stop_pod(&pod.id).await?;
        client.remove_pod(&pod.id).await
    }
}

/// Stops and removes the pods with this name.
async fn remove(client: &mut Client, name: &str) -> Result<(), Status> {
    let request = ListPodSandboxRequest { filter: None };
    let listed = client.runtime.list_pod_sandbox(request).await?.into_inner();
    for pod in listed.items {
        if pod.metadata.is_some_and(|metadata| metadata.name == name) {
            client.stop_pod(&pod.id).await?;
            client.remove_pod(&pod.id).await?;
        }
    }
    Ok(())
}

/// What the first process of a container is recognized by: its VMM's process id, and when it has started in its guest.
async fn process(daemon: &Daemon, client: &mut Client, id: &str) -> (Vec<i32>, String) {
    let started = client.shell(id, "cut -d' ' -f22 /proc/1/stat").await;
    (daemon.vmm_pids(), started)
}

/// Asserts that a log counts from 0 to its end. A line that was not acknowledged before a kill may come twice.
fn assert_whole(log: &str) -> usize {
    let mut next = 0;
    for line in log.lines() {
        let number = line
            .strip_prefix("tick ")
            .and_then(|number| number.parse().ok());
        let number: usize = number.unwrap_or_else(|| panic!("{line:?} in the log"));
        assert!(number <= next, "tick {next} is lost: {line}");
        next = next.max(number + 1);
    }
    next
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_five_kills_at_random_moments_under_load_harm_no_pod_and_leave_nothing() {
    let mut random = Random::new();
    let mut daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let image = Registry::shared().image("test/busybox");
    client.pull(&image).await.expect("pull");
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();

    let steady = client.run_pod("steady").await.expect("run pod");
    let id = client.run_script(&steady, "main", &image, TICKS).await;
    let first = process(&daemon, &mut client, &id).await;
    let load = Arc::new(Load {
        socket: daemon.socket(),
        logs: daemon.path("logs"),
        image,
        is_over: AtomicBool::new(false),
        lives: AtomicUsize::new(0),
        broken: AtomicUsize::new(0),
    });
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let load = Arc::clone(&load);
            tokio::spawn(async move { load.go_on(format!("load-{number}")).await })
        })
        .collect();
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(random.below(LONGEST_LIFE_MS))).await;
        daemon.restart().await;
    }
    let before_last = load.lives.load(Ordering::Relaxed);
    until("the clients live undisturbed", async || {
        let lives = load.lives.load(Ordering::Relaxed);
        whether(lives >= before_last + CLIENTS, lives)
    })
    .await;
    load.is_over.store(true, Ordering::Relaxed);
    for one in clients {
        one.await.expect("a client");
    }
    let count = |what: &AtomicUsize| what.load(Ordering::Relaxed);
    println!(
        "{KILLS} kills: {} lives from beginning to end, {} broken ones",
        count(&load.lives),
        count(&load.broken)
    );

    let mut client = daemon.client().await;
    assert_eq!(client.pod_ids().await, [steady.id.as_str()]);
    let last = process(&daemon, &mut client, &id).await;
    assert_eq!(last, first, "the same process, and no VM without a pod");
    assert_eq!(client.shell(&id, "echo well").await, "well\n");
    let seen = assert_whole(&client.log_until(&steady, "main", |_| true).await);
    let more = format!("tick {}\n", seen + 5);
    assert_whole(
        &client
            .log_until(&steady, "main", |log| log.contains(&more))
            .await,
    );
    client.end_pod(&steady).await;
    until("the node is idle", async || {
        let difference = daemon
            .census()
            .without("process")
            .difference(&before.without("process"));
        difference.map_or(Ok(()), Err)
    })
    .await;
    whether(daemon.vmm_pids().is_empty(), daemon.vmm_pids()).expect("no VM");
    assert!(
        !has_unfinished(&daemon.path("state/cni")),
        "files that were not finished"
    );
}

/// Whether a file is there that was to get another name.
fn has_unfinished(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.path());
    names.any(|path| path.extension().is_some_and(|extension| extension == "new"))
}
