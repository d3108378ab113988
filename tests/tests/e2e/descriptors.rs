// SPDX-License-Identifier: Apache-2.0
//! File descriptors: the daemon takes what it may have, and when few are left, it still lists, stops and removes.

use std::process::Command;
use std::time::Duration;

use bulkhead_tests::client::{Client, Pod, assert_fails};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::spdy::Process;
use bulkhead_tests::wait::{PATIENCE, until};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tonic::Code;

/// What a process is given by default. Some 110 pods fit.
const USUAL: usize = 1024;
/// To how many a service of systemd may raise that.
const SERVICES: usize = 512 << 10;
/// 200 pods and their containers have so many.
const OF_200_PODS: usize = 3000;

/// A daemon that was started with the usual limit, while this process may have more descriptors.
async fn daemon() -> Daemon {
    limit_own_descriptors(USUAL);
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    limit_own_descriptors(2 * OF_200_PODS);
    daemon
}

/// Sets this process's own limit, which programs that it starts inherit. They may raise it to a limit that a systemd
/// service has by default.
fn limit_own_descriptors(most: usize) {
    let pid = std::process::id().to_string();
    let set = Command::new("prlimit")
        .args(["--pid", &pid, &format!("--nofile={most}:{SERVICES}")])
        .status();
    assert!(set.expect("run prlimit").success(), "prlimit");
}

async fn sleeper(client: &mut Client, name: &str) -> (Pod, String) {
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod(name).await.expect("run pod");
    let line = "exec sleep 10000";
    let id = client.run_script(&pod, "main", &busybox, line).await;
    (pod, id)
}

/// Opens connections to the daemon's socket, on which nothing happens.
async fn idle(daemon: &Daemon, number: usize) -> Vec<UnixStream> {
    let mut connections = Vec::new();
    for _ in 0..number {
        let connection = UnixStream::connect(daemon.socket()).await;
        connections.push(connection.expect("connect to the daemon"));
    }
    connections
}

#[tokio::test(flavor = "multi_thread")]
async fn more_descriptors_than_a_process_has_by_default_are_no_obstacle() {
    let daemon = daemon().await;
    let many = idle(&daemon, OF_200_PODS).await;
    until("the daemon has them all", async || {
        let held = daemon.descriptors();
        if held > many.len() {
            Ok(())
        } else {
            Err(format!("{held}"))
        }
    })
    .await;
    assert!(daemon.descriptors() > USUAL);
    let mut client = daemon.client().await;
    let (pod, id) = sleeper(&mut client, "among-many").await;
    assert_eq!(client.shell(&id, "echo well").await, "well\n");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_few_descriptors_left_new_pods_are_refused_and_old_ones_end() {
    let daemon = daemon().await;
    let mut client = daemon.client().await;
    let (pod, id) = sleeper(&mut client, "before").await;
    daemon.limit_descriptors(daemon.descriptors() + 260);
    let refused = client.run_pod("after").await;
    assert_fails(refused, Code::ResourceExhausted, &["LimitNOFILE"]);
    assert_eq!(client.pod_ids().await, [pod.id.as_str()]);

    // No descriptor at all is left while others hold connections. The daemon does not end, and serves afterwards.
    let all = idle(&daemon, 400).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    drop(all);
    client.stop(&id, 0).await.expect("stop the container");
    client.end_pod(&pod).await;
    assert_eq!(daemon.client().await.pod_ids().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_without_a_token_keep_no_stream_away() {
    let daemon = daemon().await;
    let mut client = daemon.client().await;
    let (_pod, id) = sleeper(&mut client, "streams").await;
    let url = client
        .exec_url(&id, &["echo", "through"], &["stdout"])
        .await;
    let url = url.expect("exec");
    let address = url.split('/').nth(2).expect("an address").to_owned();
    // One after the other, so that they are there all the time: the first ones are sent away meanwhile.
    let mut silent = Vec::new();
    for _ in 0..1100 {
        silent.push(TcpStream::connect(&address).await.expect("connect"));
    }
    let process = Process::connect(&url, &["stdout"]).await;
    let outcome = timeout(PATIENCE, process.end()).await.expect("an end");
    assert_eq!(outcome.out(), "through\n");
    assert!(daemon.descriptors() < USUAL, "{}", daemon.descriptors());
}
