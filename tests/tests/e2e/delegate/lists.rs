// SPDX-License-Identifier: Apache-2.0
//! Pods and containers of both sides in one list, with statistics, events and what the node says of itself; and calls
//! by id.

use std::collections::BTreeSet;

use bulkhead_proto::cri::{
    ContainerEventType, ContainerFilter, ContainerStatsRequest, GetEventsRequest,
    LinuxContainerResources, ListContainerStatsRequest, ListContainersRequest,
    ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest, ListPodSandboxRequest,
    ListPodSandboxStatsRequest, PodSandboxFilter, PodSandboxStatsRequest, StatusRequest,
    StreamContainersRequest, StreamPodSandboxesRequest, UpdateContainerResourcesRequest,
};
use bulkhead_tests::client::{Client, assert_fails};
use bulkhead_tests::containerd::Release;
use bulkhead_tests::wait::{PATIENCE, until, whether};
use tonic::Code;

use super::Both;

fn set(ids: &[&String]) -> BTreeSet<String> {
    ids.iter().map(|id| (*id).clone()).collect()
}

async fn pods(client: &mut Client, filter: Option<PodSandboxFilter>) -> BTreeSet<String> {
    let request = ListPodSandboxRequest { filter };
    let listed = client.runtime.list_pod_sandbox(request).await;
    let items = listed.expect("list pods").into_inner().items;
    items.into_iter().map(|pod| pod.id).collect()
}

async fn containers(client: &mut Client, filter: Option<ContainerFilter>) -> BTreeSet<String> {
    let request = ListContainersRequest { filter };
    let listed = client.runtime.list_containers(request).await;
    let items = listed.expect("list containers").into_inner().containers;
    items.into_iter().map(|container| container.id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_statistics_have_the_pods_of_both_sides() {
    for release in Release::ALL {
        let mut both = Both::start(release, "").await;
        let [(inside, a), (beside, b)] = both.sleepers().await;
        let client = &mut both.client;
        assert_eq!(pods(client, None).await, set(&[&inside.id, &beside.id]));
        assert_eq!(containers(client, None).await, set(&[&a, &b]));
        for (pod, container) in [(&inside, &a), (&beside, &b)] {
            let filter = PodSandboxFilter {
                id: pod.id.clone(),
                ..Default::default()
            };
            assert_eq!(pods(client, Some(filter)).await, set(&[&pod.id]));
            let filter = ContainerFilter {
                pod_sandbox_id: pod.id.clone(),
                ..Default::default()
            };
            assert_eq!(containers(client, Some(filter)).await, set(&[container]));
        }
        let streamed = client
            .runtime
            .stream_pod_sandboxes(StreamPodSandboxesRequest::default())
            .await;
        let mut streamed = streamed.expect("stream pods").into_inner();
        let mut ids = BTreeSet::new();
        while let Some(message) = streamed.message().await.expect("a message") {
            ids.extend(message.pod_sandboxes.into_iter().map(|pod| pod.id));
        }
        assert_eq!(ids, set(&[&inside.id, &beside.id]));
        let streamed = client
            .runtime
            .stream_containers(StreamContainersRequest::default())
            .await;
        let mut streamed = streamed.expect("stream containers").into_inner();
        let mut ids = BTreeSet::new();
        while let Some(message) = streamed.message().await.expect("a message") {
            ids.extend(message.containers.into_iter().map(|one| one.id));
        }
        assert_eq!(ids, set(&[&a, &b]));

        // A delegate that measures for long is left out.
        until("both sides' containers are measured", async || {
            let request = ListContainerStatsRequest { filter: None };
            let stats = client.runtime.list_container_stats(request).await;
            let stats = stats.expect("list statistics").into_inner().stats;
            let measured = stats.iter().filter(|one| {
                let memory = one
                    .memory
                    .as_ref()
                    .and_then(|memory| memory.working_set_bytes);
                memory.is_some_and(|bytes| bytes.value > 0)
            });
            let ids = measured.filter_map(|one| one.attributes.clone().map(|its| its.id));
            whether(ids.collect::<BTreeSet<_>>() == set(&[&a, &b]), &stats)
        })
        .await;
        let request = ListPodSandboxStatsRequest { filter: None };
        let stats = client.runtime.list_pod_sandbox_stats(request).await;
        let stats = stats.expect("list statistics of pods").into_inner().stats;
        let ids = stats
            .iter()
            .filter_map(|one| one.attributes.clone().map(|its| its.id));
        // containerd 1.6 refuses this list while it has a pod without a cgroup parent, as here. Then ours are there anyway.
        let ids: BTreeSet<_> = ids.collect();
        assert!(ids.contains(&inside.id), "{ids:?}");
        for container in [&a, &b] {
            let request = ContainerStatsRequest {
                container_id: container.clone(),
            };
            let one = client.runtime.container_stats(request).await;
            let one = one.expect("statistics").into_inner().stats.expect("some");
            assert_eq!(&one.attributes.expect("whose").id, container);
        }
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: inside.id.clone(),
        };
        let one = client.runtime.pod_sandbox_stats(request).await;
        let one = one.expect("statistics").into_inner().stats.expect("some");
        assert_eq!(one.attributes.expect("whose").id, inside.id);
        // An old delegate has no metrics; ours are there anyway.
        let described = client
            .runtime
            .list_metric_descriptors(ListMetricDescriptorsRequest::default())
            .await;
        assert!(
            !described
                .expect("descriptors")
                .into_inner()
                .descriptors
                .is_empty()
        );
        let metrics = client
            .runtime
            .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest::default())
            .await;
        let metrics = metrics.expect("metrics").into_inner().pod_metrics;
        assert!(metrics.iter().any(|one| one.pod_sandbox_id == inside.id));

        client.end_pod(&inside).await;
        client.end_pod(&beside).await;
        assert!(pods(client, None).await.is_empty());
        assert!(containers(client, None).await.is_empty());
        assert_fails(client.status(&a).await, Code::NotFound, &[&a]);
        assert_fails(client.status(&b).await, Code::NotFound, &[&b]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_from_both_sides() {
    for release in Release::ALL {
        let mut both = Both::start(release, "").await;
        let listening = both
            .client
            .runtime
            .get_container_events(GetEventsRequest {})
            .await;
        let mut events = listening.expect("listen").into_inner();
        let [(inside, a), (beside, b)] = both.sleepers().await;
        let mut missing = set(&[&a]);
        // containerd has events since 1.7.
        if release == Release::New {
            missing.insert(b);
        }
        while !missing.is_empty() {
            let event = tokio::time::timeout(PATIENCE, events.message()).await;
            let event = event
                .unwrap_or_else(|_| panic!("no event of {missing:?}"))
                .expect("a stream")
                .expect("an event");
            if event.container_event_type() == ContainerEventType::ContainerStartedEvent {
                missing.remove(&event.container_id);
            }
        }
        both.client.end_pod(&inside).await;
        both.client.end_pod(&beside).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_status_says_how_each_delegate_is_and_what_each_handler_can_do() {
    for release in Release::ALL {
        let mut both = Both::start(release, "").await;
        for (running, word) in [(true, ""), (false, "does not answer")] {
            if !running {
                both.containerd.kill();
            }
            let client = &mut both.client;
            until("the status says how the delegate is", async || {
                let request = StatusRequest { verbose: true };
                let status = client.runtime.status(request).await;
                let status = status.expect("status").into_inner();
                let names: BTreeSet<_> = status
                    .runtime_handlers
                    .iter()
                    .map(|handler| handler.name.as_str())
                    .collect();
                assert_eq!(names, BTreeSet::from(["", "bulkhead", "runc"]));
                let found = status.status.expect("a status").conditions;
                let of = |name: &str| {
                    let mut conditions = found.iter();
                    let one = conditions.find(|condition| condition.r#type == name);
                    one.unwrap_or_else(|| panic!("{name} in {found:?}")).clone()
                };
                assert!(of("RuntimeReady").status && of("NetworkReady").status);
                let delegate = of("Delegate/runc");
                let is_so = delegate.status == running && delegate.message.contains(word);
                whether(is_so, &found)
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_delegates_container_change_by_its_id() {
    for release in Release::ALL {
        let mut both = Both::start(release, "").await;
        both.client.pull(&both.busybox).await.expect("pull");
        let (pod, id) = both.sleeper("runc", "beside").await;
        let request = UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            ..Default::default()
        };
        let updated = both
            .client
            .runtime
            .update_container_resources(request)
            .await;
        updated.expect("update");
        let limit = both
            .client
            .shell(&id, "cat /sys/fs/cgroup/memory.max")
            .await;
        assert_eq!(limit, "67108864\n");
        both.client.end_pod(&pod).await;
    }
}
