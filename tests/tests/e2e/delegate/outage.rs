// SPDX-License-Identifier: Apache-2.0
//! A delegate that is down, or answers nothing: the pods in VMs do not notice, and its own pods are not taken for dead.

use std::time::{Duration, Instant};

use bulkhead_tests::client::{Client, Pod, assert_fails};
use bulkhead_tests::containerd::Release;
use bulkhead_tests::wait::until;
use tonic::{Code, Status};

use super::{Both, OWN_PROCESSES, pod_config};

/// How long both lists may take while a delegate does not answer. Each waits for it for two seconds, and kubelet waits
/// two minutes for a list. The rest is for a host that is slow itself.
const SOON: Duration = Duration::from_secs(30);

async fn lists(client: &mut Client) -> (Vec<String>, Vec<String>) {
    let started = Instant::now();
    let mut both = (client.pod_ids().await, client.container_ids().await);
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    both.0.sort();
    both.1.sort();
    both
}

fn names_the_delegate(error: &Status, call: &str) {
    let codes = [Code::Unavailable, Code::DeadlineExceeded];
    let right = codes.contains(&error.code()) && error.message().contains("runc");
    assert!(right, "{call}: {error:?}");
}

impl Both {
    /// Pods in VMs run, are created and end.
    async fn vms_work(&mut self, inside: &str) {
        assert_eq!(self.client.shell(inside, "echo works").await, "works\n");
        self.client.pull_by("bulkhead", &self.busybox).await;
        let (pod, container) = self.sleeper("bulkhead", "meanwhile").await;
        assert_eq!(self.client.shell(&container, "echo new").await, "new\n");
        self.client.end_pod(&pod).await;
    }

    /// Waits until the delegate's container can be used again.
    async fn delegate_works(&mut self, beside: &str) {
        until("the delegate's container can be used again", async || {
            let answer = self.client.exec(beside, &["true"], 60).await;
            answer.map(drop).map_err(|status| status.to_string())
        })
        .await;
        assert_eq!(self.client.shell(beside, "echo back").await, "back\n");
    }

    async fn end(&mut self, pods: [&Pod; 2]) {
        for pod in pods {
            self.client.end_pod(pod).await;
        }
        assert_eq!(lists(&mut self.client).await, (Vec::new(), Vec::new()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delegate_that_is_killed_takes_nothing_with_it() {
    let mut both = Both::start(Release::New, "").await;
    let [(inside, a), (beside, b)] = both.sleepers().await;
    let before = lists(&mut both.client).await;
    assert_eq!((before.0.len(), before.1.len()), (2, 2));
    both.containerd.kill();
    assert_eq!(lists(&mut both.client).await, before);
    both.vms_work(&a).await;
    let client = &mut both.client;
    for id in [b.as_str(), "0123456789abcdef"] {
        let down = &["runc"];
        assert_fails(client.exec(id, &["true"], 0).await, Code::Unavailable, down);
        assert_fails(client.status(id).await, Code::Unavailable, down);
        assert_fails(client.stop(id, 1).await, Code::Unavailable, down);
        assert_fails(client.remove(id).await, Code::Unavailable, down);
    }
    for id in [beside.id.as_str(), "0123456789abcdef"] {
        let down = &["runc"];
        assert_fails(client.pod_state(id).await, Code::Unavailable, down);
        assert_fails(client.stop_pod(id).await, Code::Unavailable, down);
        assert_fails(client.remove_pod(id).await, Code::Unavailable, down);
    }
    let config = pod_config(client, "late", OWN_PROCESSES);
    let late = client.run_pod_by("runc", config.clone()).await;
    assert_fails(late, Code::Unavailable, &["runc"]);

    both.daemon.restart().await;
    both.client = both.daemon.client().await;
    assert_eq!(lists(&mut both.client).await, before, "after a restart");
    both.vms_work(&a).await;

    both.containerd.start_again().await;
    both.delegate_works(&b).await;
    assert_eq!(lists(&mut both.client).await, before);
    let late = both.client.run_pod_by("runc", config).await;
    let late = late.expect("a pod of the delegate");
    both.client.end_pod(&late).await;
    both.end([&inside, &beside]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delegate_that_answers_nothing_delays_no_pod_in_a_vm() {
    let mut both = Both::start(Release::New, "").await;
    let [(inside, a), (beside, b)] = both.sleepers().await;
    let before = lists(&mut both.client).await;
    both.containerd.pause();
    assert_eq!(lists(&mut both.client).await, before);
    both.vms_work(&a).await;
    let error = both.client.status(&b).await.expect_err("no answer");
    names_the_delegate(&error, "status of a container");
    let error = both.client.pod_state(&beside.id).await;
    names_the_delegate(&error.expect_err("no answer"), "status of a pod");
    both.containerd.resume();
    both.delegate_works(&b).await;
    assert_eq!(lists(&mut both.client).await, before);
    both.end([&inside, &beside]).await;
}
