// SPDX-License-Identifier: Apache-2.0
//! CNI plugins and configurations, good and bad. Their faults are reported, bounded and cleaned up.

use bulkhead_proto::cri::{PodSandboxStatusRequest, RuntimeCondition, StatusRequest};
use bulkhead_tests::client::{Client, assert_fails};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

use crate::network::addresses;

/// Debian's bridge plugin behind a script that speaks CNI 1.1, records each call, and fails a command if a file beside
/// the script says so.
const WRAPPED: &str = r#"input=$(cat)
printf '%s %s\n' "$CNI_COMMAND" "$input" >>"$0.calls"
[ ! -e "$0.fails-$CNI_COMMAND" ] || { echo '{"code":50,"msg":"not now","details":"the agent is away"}'; exit 1; }
case $CNI_COMMAND in
STATUS | GC) ;;
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}' ;;
*) printf '%s' "$input" | sed 's/"1\.1\.0"/"1.0.0"/g; s/"type":"wrapped"/"type":"bridge"/' | /usr/lib/cni/bridge ;;
esac"#;

const WRAPPED_CONFLIST: &str = r#"{
  "cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "bulkhead-wrapped",
  "plugins": [{
    "type": "wrapped", "bridge": "bulkhead0", "isGateway": true,
    "ipam": { "type": "host-local", "dataDir": "/run/bulkhead-tests-ipam", "subnet": "10.88.0.0/16" }
  }]
}"#;

async fn network_condition(client: &mut Client) -> RuntimeCondition {
    let answer = client
        .runtime
        .status(StatusRequest { verbose: false })
        .await;
    let status = answer
        .expect("status")
        .into_inner()
        .status
        .expect("a status");
    let mut conditions = status.conditions.into_iter();
    conditions
        .find(|condition| condition.r#type == "NetworkReady")
        .expect("the condition NetworkReady")
}

/// Waits until the condition NetworkReady has the status `ready` and its message contains all of `words`.
async fn becomes(client: &mut Client, ready: bool, words: &[&str]) {
    let what = format!("NetworkReady is {ready} and says {words:?}");
    until(&what, async || {
        let condition = network_condition(client).await;
        let told = words.iter().all(|word| condition.message.contains(word));
        whether(condition.status == ready && told, condition)
    })
    .await;
}

fn leases(network: &str) -> Vec<String> {
    let directory = format!("/run/bulkhead-tests-ipam/{network}");
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("10.")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_plugins_are_reported_and_leave_nothing_behind() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let other = client.run_pod("other").await.expect("run pod");
    let id = client
        .run_script(&other, "main", &busybox, "exec sleep 1000")
        .await;
    let before = daemon.census();

    let bad = [
        (
            "garbage",
            "echo this is not json",
            Code::Internal,
            "not JSON",
        ),
        (
            "failing",
            r#"[ $CNI_COMMAND = DEL ] || { echo '{"code":7,"msg":"bad subnet","details":"10.0.0.300"}'; exit 1; }"#,
            Code::Internal,
            "code 7: bad subnet: 10.0.0.300",
        ),
        (
            "busy",
            r#"[ $CNI_COMMAND = DEL ] || { echo '{"code":11,"msg":"no address is free"}'; exit 1; }"#,
            Code::Unavailable,
            "no address is free",
        ),
        (
            "endless",
            "[ $CNI_COMMAND = DEL ] || exec yes",
            Code::Internal,
            "more than 1048576 bytes",
        ),
        (
            "hanging",
            "[ $CNI_COMMAND = DEL ] || { sleep 70001 & sleep 70002; }",
            Code::DeadlineExceeded,
            "did not finish ADD in 15s and was killed",
        ),
    ];
    for (name, script, code, word) in bad {
        daemon.plugin(name, script);
        // A good plugin comes first in the chain; its work must be undone.
        let conflist = format!(
            r#"{{"cniVersion":"1.0.0","name":"bulkhead-bad","plugins":[
                {{"type":"bridge","bridge":"bulkhead0","ipam":{{"type":"host-local",
                  "dataDir":"/run/bulkhead-tests-ipam","subnet":"10.86.0.0/16"}}}},
                {{"type":"{name}"}}]}}"#
        );
        daemon.configure_network("05-bad.conflist", &conflist);
        let refused = client.run_pod(name).await;
        assert_fails(refused, code, &[name, "bulkhead-bad", "ADD", word]);
        assert_eq!(client.pod_ids().await, [other.id.as_str()]);
        assert_eq!(leases("bulkhead-bad"), Vec::<String>::new(), "{name}");
        daemon.census().assert_equals(&before);
    }
    let sleepers = std::process::Command::new("pgrep")
        .args(["-f", "sleep 7000[12]$"])
        .output();
    let sleepers = String::from_utf8_lossy(&sleepers.expect("pgrep").stdout).into_owned();
    assert_eq!(sleepers.lines().count(), 0, "{sleepers}");
    let answer = client.shell(&id, "ping -c 1 -W 10 10.88.0.1").await;
    assert!(answer.contains(" 0% packet loss"), "{answer}");
    client.end_pod(&other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_a_plugin_works_takes_the_network_down_when_it_comes_back() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    let held = daemon.path("plugins/held");
    daemon.plugin(
        "slow",
        r#"echo >"$0.$CNI_COMMAND"
while [ "$CNI_COMMAND" = ADD ] && [ -e "${0%/*}/held" ]; do sleep 0.1; done
[ "$CNI_COMMAND" = DEL ]"#,
    );
    std::fs::write(&held, "").expect("hold the plugin");
    let conflist = |more: &str| {
        format!(
            r#"{{"cniVersion":"1.0.0","name":"bulkhead-slow","plugins":[
                {{"type":"bridge","bridge":"bulkhead5","ipam":{{"type":"host-local",
                  "dataDir":"/run/bulkhead-tests-ipam","subnet":"10.85.0.0/16"}}}}{more}]}}"#
        )
    };
    let mut client = daemon.client().await;
    daemon.configure_network("10-slow.conflist", &conflist(""));
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();
    daemon.configure_network("10-slow.conflist", &conflist(r#",{"type":"slow"}"#));
    let call = tokio::spawn(async move { client.run_pod("half").await });
    let (added, deleted) = (
        daemon.path("plugins/slow.ADD"),
        daemon.path("plugins/slow.DEL"),
    );
    until("the plugin is asked", async || {
        whether(added.exists(), &added)
    })
    .await;
    assert_eq!(leases("bulkhead-slow").len(), 1);
    daemon.kill();
    call.await
        .expect("the call's task")
        .expect_err("its daemon died");
    std::fs::remove_file(&held).expect("let the plugin go on");
    std::fs::remove_file(daemon.path("cni/10-slow.conflist")).expect("remove the configuration");
    daemon.restart().await;
    assert!(deleted.exists(), "the plugin was asked to take it down");
    assert_eq!(leases("bulkhead-slow"), Vec::<String>::new());
    daemon.census().assert_equals_but_for_processes(&before);
    let mut client = daemon.client().await;
    assert_eq!(client.pod_ids().await, Vec::<String>::new());
    let again = client.run_pod("half").await.expect("the name is free");
    client.end_pod(&again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_whose_teardown_failed_is_taken_down_the_next_time() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    daemon.plugin("wrapped", WRAPPED);
    daemon.configure_network("10-wrapped.conflist", WRAPPED_CONFLIST);
    let mut client = daemon.client().await;
    let warm = client.run_pod("warm").await.expect("first pod");
    client.end_pod(&warm).await;
    let before = daemon.census();
    let held = leases("bulkhead-wrapped").len();
    let pod = client.run_pod("stays").await.expect("run pod");
    let fails = daemon.path("plugins/wrapped.fails-DEL");
    std::fs::write(&fails, "").expect("make it fail");
    for _ in 0..2 {
        let refused = client.stop_pod(&pod.id).await;
        let words = [
            "wrapped of network bulkhead-wrapped failed DEL",
            "not now",
            "the agent is away",
        ];
        assert_fails(refused, Code::Internal, &words);
    }
    assert_fails(
        client.remove_pod(&pod.id).await,
        Code::Internal,
        &["failed DEL"],
    );
    assert_eq!(client.pod_ids().await, [pod.id.as_str()]);
    assert_eq!(leases("bulkhead-wrapped").len(), held + 1);
    std::fs::remove_file(&fails).expect("mend it");
    client.end_pod(&pod).await;
    daemon.census().assert_equals(&before);
    assert_eq!(leases("bulkhead-wrapped").len(), held);
}

#[tokio::test(flavor = "multi_thread")]
async fn network_ready_follows_configuration_and_plugins_and_pods_keep_their_configuration() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    becomes(&mut client, false, &["no CNI configuration"]).await;
    daemon.configure_network("10-wrapped.conflist", WRAPPED_CONFLIST);
    becomes(&mut client, false, &["wrapped", "none of"]).await;
    daemon.plugin("wrapped", WRAPPED);
    becomes(&mut client, true, &[]).await;
    let fails = daemon.path("plugins/wrapped.fails-STATUS");
    std::fs::write(&fails, "").expect("make it fail");
    becomes(
        &mut client,
        false,
        &["wrapped", "STATUS", "code 50", "the agent is away"],
    )
    .await;
    std::fs::remove_file(&fails).expect("mend it");
    becomes(&mut client, true, &[]).await;
    daemon.configure_network("05-broken.conflist", "{");
    becomes(&mut client, true, &["skipped", "05-broken.conflist"]).await;

    let stays = client.run_pod("stays").await.expect("run pod");
    let goes = client.run_pod("goes").await.expect("run pod");
    assert!(
        addresses(&mut client, &stays.id)
            .await
            .ip
            .starts_with("10.88.")
    );
    client.end_pod(&goes).await;
    daemon.kill();
    let calls = daemon.path("plugins/wrapped.calls");
    std::fs::remove_file(&calls).expect("forget the calls");
    daemon.restart().await;
    let mut client = daemon.client().await;
    let line = |command: &str| {
        let text = std::fs::read_to_string(&calls).unwrap_or_default();
        let mut lines = text.lines().map(str::to_owned);
        lines.find(|line| line.starts_with(command))
    };
    let [collected, checked] = until("the plugin is asked for GC and CHECK", async || {
        match (line("GC"), line("CHECK")) {
            (Some(collected), Some(checked)) => Ok([collected, checked]),
            seen => Err(format!("{seen:?}")),
        }
    })
    .await;
    assert!(
        collected.contains(&stays.id) && !collected.contains(&goes.id),
        "{collected}"
    );
    assert!(checked.contains(r#""prevResult""#), "{checked}");
    until("the pod shows its check", async || {
        let shown = info(&mut client, &stays.id).await;
        whether(shown.contains(r#""check":"ok""#), shown)
    })
    .await;
    for name in ["10-wrapped.conflist", "05-broken.conflist"] {
        std::fs::remove_file(daemon.path("cni").join(name)).expect("remove the configuration");
    }
    becomes(&mut client, false, &["no CNI configuration"]).await;
    client.end_pod(&stays).await;
    assert!(line("DEL").is_some_and(|line| line.contains(r#""prevResult""#)));
    assert_eq!(leases("bulkhead-wrapped"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_namespace_is_gone_gives_its_address_back() {
    let mut daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let held = leases("bulkhead-tests").len();
    let pod = client.run_pod("rebooted").await.expect("run pod");
    assert_eq!(leases("bulkhead-tests").len(), held + 1);
    // After a reboot there are records, but no VMs and no network namespaces.
    daemon.kill();
    for pid in daemon.vmm_pids() {
        let killed = std::process::Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status();
        assert!(killed.expect("kill").success());
    }
    let netns = daemon.path("run/netns").join(&pod.id);
    let unmounted = std::process::Command::new("umount").arg(&netns).status();
    assert!(unmounted.expect("umount").success());
    daemon.restart().await;
    let mut client = daemon.client().await;
    client.end_pod(&pod).await;
    assert_eq!(leases("bulkhead-tests").len(), held);
    assert!(!netns.exists());
}

async fn info(client: &mut Client, id: &str) -> String {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: id.into(),
        verbose: true,
    };
    let answer = client.runtime.pod_sandbox_status(request).await;
    let info = answer.expect("status").into_inner().info;
    info["info"].clone()
}
