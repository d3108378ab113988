// SPDX-License-Identifier: Apache-2.0
//! The life of a pod.

use bulkhead_proto::cri::{
    CgroupDriver, ContainerEventType, GetEventsRequest, ListPodSandboxRequest, PodSandboxFilter,
    PodSandboxState, RuntimeConfigRequest, StatusRequest, VersionRequest,
};
use bulkhead_tests::client::{assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::PATIENCE;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn kubelet_is_told_the_cgroup_driver_that_the_configuration_names() {
    for (line, expected) in [
        ("cgroup_driver = \"systemd\"", CgroupDriver::Systemd),
        ("cgroup_driver = \"cgroupfs\"", CgroupDriver::Cgroupfs),
    ] {
        let daemon = Daemon::start_with(Networking::Loopback, line).await;
        let mut client = daemon.client().await;
        let answer = client.runtime.runtime_config(RuntimeConfigRequest {}).await;
        let linux = answer.expect("runtime config").into_inner().linux;
        assert_eq!(linux.expect("of Linux").cgroup_driver(), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_from_run_to_removal_and_leaves_nothing() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    // CNI's bridge plugin does not remove the bridge. So the bridge must exist before the census.
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();

    let pod = client.run_pod("life").await.expect("run pod");
    assert_eq!(
        client.pod_state(&pod.id).await.expect("state"),
        PodSandboxState::SandboxReady
    );
    let id = client
        .run_script(
            &pod,
            "main",
            &busybox,
            "uname -r; hostname; echo to stderr >&2; exec sleep 1000",
        )
        .await;
    let log = client
        .log_until(&pod, "main", |log| log.contains("to stderr"))
        .await;
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("host kernel");
    assert!(
        !log.contains(host.trim()),
        "the container runs on the host's kernel: {log}"
    );
    assert!(log.contains("life\n"), "hostname: {log}");
    assert_eq!(client.shell(&id, "echo $((6 * 7))").await, "42\n");

    client.stop(&id, 1).await.expect("stop container");
    assert_eq!(
        client.exited(&id).await.exit_code,
        137,
        "sh ignores SIGTERM as PID 1"
    );
    client.remove(&id).await.expect("remove container");
    client.stop_pod(&pod.id).await.expect("stop pod");
    assert_eq!(
        client.pod_state(&pod.id).await.expect("state"),
        PodSandboxState::SandboxNotready
    );
    client.stop_pod(&pod.id).await.expect("stop it again");
    client.remove_pod(&pod.id).await.expect("remove pod");
    client.remove_pod(&pod.id).await.expect("remove it again");
    assert!(client.pod_ids().await.is_empty());
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_the_lives_of_pods_and_containers() {
    use ContainerEventType::{
        ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted,
        ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped,
    };
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let mut events = client
        .runtime
        .get_container_events(GetEventsRequest {})
        .await
        .expect("listen")
        .into_inner();
    let pod = client.run_pod("told").await.expect("run pod");
    let id = client.run_script(&pod, "main", &busybox, "exit 3").await;
    client.exited(&id).await;
    client.remove(&id).await.expect("remove");
    client.end_pod(&pod).await;
    let expected = [
        (&pod.id, Created),
        (&pod.id, Started),
        (&id, Created),
        (&id, Started),
        (&id, Stopped),
        (&id, Deleted),
        (&pod.id, Stopped),
        (&pod.id, Deleted),
    ];
    for (subject, kind) in expected {
        let event = tokio::time::timeout(PATIENCE, events.message()).await;
        let event = event
            .expect("an event in time")
            .expect("a stream")
            .expect("an event");
        assert_eq!(
            (&event.container_id, event.container_event_type()),
            (subject, kind)
        );
        let status = event.pod_sandbox_status.expect("the pod's status");
        assert_eq!(status.id, pod.id);
        if (subject, kind) == (&id, Stopped) {
            assert_eq!(event.containers_statuses[0].exit_code, 3);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn version_and_status_tell_the_truth() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let version = client
        .runtime
        .version(VersionRequest::default())
        .await
        .expect("version")
        .into_inner();
    assert_eq!(version.runtime_name, "bulkhead");
    assert_eq!(version.runtime_api_version, "v1");
    let status = client
        .runtime
        .status(StatusRequest { verbose: true })
        .await
        .expect("status")
        .into_inner();
    let conditions = status.status.expect("a status").conditions;
    for name in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions
            .iter()
            .find(|one| one.r#type == name)
            .expect(name);
        assert!(condition.status, "{condition:?}");
    }
    // NetworkReady follows the CNI configuration directory.
    std::fs::remove_file(daemon.path("cni/10-bridge.conflist")).expect("remove configuration");
    let status = client
        .runtime
        .status(StatusRequest { verbose: false })
        .await
        .expect("status")
        .into_inner();
    let conditions = status.status.expect("a status").conditions;
    let network = conditions
        .iter()
        .find(|one| one.r#type == "NetworkReady")
        .expect("NetworkReady");
    assert!(!network.status, "{network:?}");
    assert!(!network.message.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_listed_by_label_state_and_id() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let mut config = client.pod_config("labelled");
    config.labels.insert("app".into(), "web".into());
    config.annotations.insert("note".into(), "kept".into());
    let labelled = client.run_pod_with(config).await.expect("run pod");
    let table = [
        (
            "label",
            PodSandboxFilter {
                label_selector: [("app".into(), "web".into())].into(),
                ..Default::default()
            },
            1,
        ),
        (
            "other value",
            PodSandboxFilter {
                label_selector: [("app".into(), "db".into())].into(),
                ..Default::default()
            },
            0,
        ),
        (
            "id",
            PodSandboxFilter {
                id: labelled.id.clone(),
                ..Default::default()
            },
            1,
        ),
        (
            "id prefix",
            PodSandboxFilter {
                id: labelled.id[..12].into(),
                ..Default::default()
            },
            1,
        ),
        (
            "unknown id",
            PodSandboxFilter {
                id: "feed".repeat(16),
                ..Default::default()
            },
            0,
        ),
    ];
    for (case, filter, expected) in table {
        let request = ListPodSandboxRequest {
            filter: Some(filter),
        };
        let pods = client
            .runtime
            .list_pod_sandbox(request)
            .await
            .expect("list")
            .into_inner()
            .items;
        assert_eq!(pods.len(), expected, "{case}");
        for pod in pods {
            assert_eq!(pod.annotations["note"], "kept");
        }
    }
    client.end_pod(&labelled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_pods_are_refused_with_a_cause() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let mut nameless = client.pod_config("x");
    nameless.metadata = None;
    assert_fails(
        client.run_pod_with(nameless).await,
        Code::InvalidArgument,
        &["metadata"],
    );
    let pod = client.run_pod("twice").await.expect("run pod");
    assert_fails(
        client.run_pod("twice").await,
        Code::AlreadyExists,
        &["twice", &pod.id],
    );
    assert_fails(
        client.pod_state("0123456789abcdef").await,
        Code::NotFound,
        &["0123456789abcdef"],
    );
    assert_fails(
        client
            .create(
                &pod,
                container("main", "no.such.registry/image:1", &["true"]),
            )
            .await,
        Code::NotFound,
        &["no.such.registry/image:1"],
    );
    client.end_pod(&pod).await;
    client.stop_pod("0123").await.expect("unknown pods stop");
    client.remove_pod("0123").await.expect("unknown pods go");
    assert!(client.pod_ids().await.is_empty());
}
