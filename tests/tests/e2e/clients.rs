// SPDX-License-Identifier: Apache-2.0
//! Clients that work at the same time, and clients that disconnect in the middle of a call, at every step of a pod's
//! life.

use std::time::Duration;

use bulkhead_tests::client::{Client, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};

/// How long after the start of a call its client disconnects.
const MOMENTS_MS: [u64; 3] = [1, 30, 300];

/// Does `step` with a new client that disconnects after `moment_ms` milliseconds if the call is not done.
async fn vanishing<F: Future>(
    daemon: &Daemon,
    moment_ms: u64,
    step: impl FnOnce(Client) -> F,
) -> Option<F::Output> {
    let client = daemon.client().await;
    let limit = Duration::from_millis(moment_ms);
    tokio::time::timeout(limit, step(client)).await.ok()
}

/// Waits until the daemon has exactly so many pods.
async fn settled(client: &mut Client, pods: usize) {
    let what = format!("the number of pods is {pods}");
    until(&what, async || {
        let ids = client.pod_ids().await;
        whether(ids.len() == pods, ids)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_go_away_at_every_step_and_come_back() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let warm = client.run_pod("warm").await.expect("run pod");
    client.end_pod(&warm).await;
    let before = daemon.census();
    for moment in MOMENTS_MS {
        // If the caller disconnects, nobody knows the pod's id. So the pod must be removed and its name must be free.
        let name = format!("left-{moment}");
        vanishing(&daemon, moment, |mut gone| {
            let name = name.clone();
            async move { gone.run_pod(&name).await.map(drop) }
        })
        .await;
        settled(&mut client, 0).await;
        let pod = until("the first attempt is undone", async || {
            match client.run_pod(&name).await {
                Ok(pod) => Ok(pod),
                Err(status) if status.code() == tonic::Code::AlreadyExists => {
                    Err(status.to_string())
                }
                Err(status) => panic!("{name}: {status:?}"),
            }
        })
        .await;
        let config = container("main", &busybox, &["sleep", "1000"]);
        vanishing(&daemon, moment, |mut gone| {
            let (pod, config) = (pod.clone(), config.clone());
            async move { gone.create(&pod, config).await.map(drop) }
        })
        .await;
        // kubelet lists the containers and creates those that are missing.
        let mut config = config.clone();
        config.metadata.as_mut().expect("metadata").attempt = 1;
        let id = client.create(&pod, config).await.expect("create");
        vanishing(&daemon, moment, |mut gone| {
            let id = id.clone();
            async move { gone.start(&id).await }
        })
        .await;
        let again = client.start(&id).await;
        let fine = |status: &tonic::Status| status.code() == tonic::Code::FailedPrecondition;
        assert!(
            again.as_ref().map_or_else(fine, |()| true),
            "either it runs already or it starts now: {again:?}"
        );
        assert_eq!(client.shell(&id, "echo runs").await, "runs\n");
        vanishing(&daemon, moment, |mut gone| {
            let id = id.clone();
            async move { gone.exec(&id, &["sh", "-c", "sleep 2"], 0).await.map(drop) }
        })
        .await;
        assert_eq!(client.shell(&id, "echo still").await, "still\n");
        vanishing(&daemon, moment, |mut gone| {
            let id = id.clone();
            async move { gone.stop(&id, 1).await }
        })
        .await;
        client.stop(&id, 0).await.expect("stop");
        assert_eq!(client.exited(&id).await.exit_code, 137);
        vanishing(&daemon, moment, |mut gone| {
            let id = pod.id.clone();
            async move { gone.stop_pod(&id).await }
        })
        .await;
        client.stop_pod(&pod.id).await.expect("stop pod");
        vanishing(&daemon, moment, |mut gone| {
            let id = pod.id.clone();
            async move { gone.remove_pod(&id).await }
        })
        .await;
        client.remove_pod(&pod.id).await.expect("remove pod");
    }
    settled(&mut client, 0).await;
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clients_see_the_same_pods_and_do_not_wait_for_each_other() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let busybox = Registry::shared().image("test/busybox");
    let mut one = daemon.client().await;
    let mut two = daemon.client().await;
    let (first, second) = tokio::join!(one.pull(&busybox), two.pull(&busybox));
    assert_eq!(first.expect("pull"), second.expect("pull"), "one image");
    let (pod, other) = tokio::join!(one.run_pod("one"), two.run_pod("two"));
    let (pod, other) = (pod.expect("run pod"), other.expect("run pod"));
    let mut seen = two.pod_ids().await;
    seen.sort();
    let mut expected = [pod.id.clone(), other.id.clone()];
    expected.sort();
    assert_eq!(seen, expected);

    let id = one
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    // While one client waits for a long exec, the other one uses the same container.
    let mut waiting = one.clone();
    let waited = id.clone();
    let long = tokio::spawn(async move { waiting.shell(&waited, "sleep 3; echo waited").await });
    assert_eq!(two.shell(&id, "echo meanwhile").await, "meanwhile\n");
    assert!(
        !long.is_finished(),
        "the second exec did not wait for the first"
    );
    // If two clients remove it at the same time, both calls succeed.
    assert_eq!(long.await.expect("the exec"), "waited\n");
    let (first, second) = tokio::join!(one.remove(&id), two.remove(&id));
    first.expect("remove");
    second.expect("remove");
    let mut same = two.clone();
    let (first, second) = tokio::join!(one.run_pod("same"), same.run_pod("same"));
    assert!(
        first.is_ok() != second.is_ok(),
        "one name, one pod: {first:?} {second:?}"
    );
    for pod in [&pod, &other, &first.or(second).expect("one of them")] {
        let mut twin = two.clone();
        let (a, b) = tokio::join!(one.stop_pod(&pod.id), twin.stop_pod(&pod.id));
        a.and(b).expect("stop pod");
        one.end_pod(pod).await;
    }
    assert!(two.pod_ids().await.is_empty());
}
