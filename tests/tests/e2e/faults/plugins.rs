// SPDX-License-Identifier: Apache-2.0
//! CNI plugins that die in the middle of their work, and a daemon that dies while one works.

use std::path::PathBuf;

use bulkhead_tests::census::Census;
use bulkhead_tests::client::Client;
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{try_until, until, whether};
use std::time::Duration;

/// Debian's bridge plugin behind a script that dies once before or after its work, or waits there, if a file beside it
/// says so.
const MORTAL: &str = r#"input=$(cat)
at() {
    if [ -e "$0.dies-$1" ]; then rm "$0.dies-$1"; kill -9 $$; fi
    if [ -e "$0.waits-$1" ]; then mv "$0.waits-$1" "$0.waiting"; fi
    while [ -e "$0.waiting" ]; do sleep 0.05; done
}
at "before-$CNI_COMMAND"
printf '%s' "$input" | sed 's/"type":"mortal"/"type":"bridge"/' | /usr/lib/cni/bridge
code=$?
at "after-$CNI_COMMAND"
exit $code"#;

const CONFLIST: &str = r#"{
  "cniVersion": "1.0.0", "name": "bulkhead-mortal",
  "plugins": [{
    "type": "mortal", "bridge": "bulkhead4", "isGateway": true,
    "ipam": { "type": "host-local", "dataDir": "/run/bulkhead-tests-ipam", "subnet": "10.84.0.0/16" }
  }]
}"#;

/// A network whose plugin failed twice is tried again after 15 s.
const SETTLE: Duration = Duration::from_secs(45);

struct Node {
    daemon: Daemon,
    idle: Option<Census>,
}

impl Node {
    fn file(&self, what: &str, moment: &str) -> PathBuf {
        self.daemon.path(&format!("plugins/mortal.{what}{moment}"))
    }

    fn census(&self) -> Census {
        let leases = PathBuf::from("/run/bulkhead-tests-ipam/bulkhead-mortal");
        let [run, state, cni] =
            ["run/pods", "state/pods", "state/cni"].map(|at| self.daemon.path(at));
        let daemon = format!("process {} ", self.daemon.pid().unwrap_or_default());
        let last = format!("file {}/last", leases.display());
        let census = Census::take(&[&run, &state, &cni, &leases]);
        census.without(&daemon).without(&last)
    }

    /// Stops and removes what is listed, as often as that needs, and waits until the node is idle.
    async fn end(&self, client: &mut Client) -> Result<(), String> {
        let mut failed = 0;
        for id in client.pod_ids().await {
            while let Err(error) = client.stop_pod(&id).await {
                failed += 1;
                whether(failed < 3, error)?;
            }
            client
                .remove_pod(&id)
                .await
                .map_err(|error| format!("{error:?}"))?;
        }
        let Some(idle) = &self.idle else {
            return Ok(());
        };
        let settled = try_until("the node is idle", SETTLE, async || {
            self.census().difference(idle).map_or(Ok(()), Err)
        });
        settled.await.map_err(|late| late.seen)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_that_die_and_a_daemon_that_dies_while_they_work_leave_nothing() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    daemon.plugin("mortal", MORTAL);
    daemon.configure_network("10-mortal.conflist", CONFLIST);
    let mut node = Node { daemon, idle: None };
    let mut client = node.daemon.client().await;
    client.run_pod("warm").await.expect("first pod");
    node.end(&mut client).await.expect("end it");
    node.idle = Some(node.census());
    let mut table = Table::new("a CNI plugin dies:");
    for moment in ["before-ADD", "after-ADD"] {
        std::fs::write(node.file("dies-", moment), "").expect("a file");
        let refused = client.run_pod("pod").await;
        table.row(
            &format!("{moment}: the call"),
            refused.is_err(),
            format!("{refused:?}"),
        );
        let listed = client.pod_ids().await;
        table.equal(&format!("{moment}: pods"), listed, Vec::new());
        let ended = node.end(&mut client).await;
        table.row(
            &format!("{moment}: the census"),
            ended.is_ok(),
            format!("{ended:?}"),
        );
    }
    for moment in ["before-DEL", "after-DEL"] {
        let pod = client.run_pod("pod").await.expect("run pod");
        std::fs::write(node.file("dies-", moment), "").expect("a file");
        let refused = client.stop_pod(&pod.id).await;
        table.row(
            &format!("{moment}: the call"),
            refused.is_err(),
            format!("{refused:?}"),
        );
        let ended = node.end(&mut client).await;
        table.row(
            &format!("{moment}: the census"),
            ended.is_ok(),
            format!("{ended:?}"),
        );
    }
    // A boot whose network cannot be undone at once.
    for moment in ["after-ADD", "before-DEL"] {
        std::fs::write(node.file("dies-", moment), "").expect("a file");
    }
    let refused = client.run_pod("pod").await;
    table.row(
        "after-ADD and before-DEL: the call",
        refused.is_err(),
        format!("{refused:?}"),
    );
    let ended = node.end(&mut client).await;
    table.row(
        "after-ADD and before-DEL: the census",
        ended.is_ok(),
        format!("{ended:?}"),
    );
    for moment in ["before-ADD", "after-ADD", "before-DEL", "after-DEL"] {
        let case = format!("{moment}: the daemon dies meanwhile");
        let mut caller = client.clone();
        let pod = match moment.ends_with("DEL") {
            true => Some(client.run_pod("pod").await.expect("run pod")),
            false => None,
        };
        std::fs::write(node.file("waits-", moment), "").expect("a file");
        let call = tokio::spawn(async move {
            match pod {
                Some(pod) => caller.stop_pod(&pod.id).await,
                None => caller.run_pod("pod").await.map(drop),
            }
        });
        let waiting = node.file("waiting", "");
        until("the plugin waits", async || {
            whether(waiting.exists(), &waiting)
        })
        .await;
        node.daemon.kill();
        let answer = call.await.expect("the call's task");
        table.row(&case, answer.is_err(), format!("{answer:?}"));
        std::fs::remove_file(&waiting).expect("let the plugin go on");
        node.daemon.restart().await;
        client = node.daemon.client().await;
        let ended = node.end(&mut client).await;
        table.row(
            &format!("{case}: the census"),
            ended.is_ok(),
            format!("{ended:?}"),
        );
    }
    client.run_pod("healthy").await.expect("a healthy pod");
    node.end(&mut client).await.expect("end it");
    table.finish();
}
