// SPDX-License-Identifier: Apache-2.0
//! What controllers make of pods: Jobs, Deployments, StatefulSets, DaemonSets.

use bulkhead_tests::cluster::{Namespace, STAY, object, script, spec, template};
use bulkhead_tests::node::with;
use bulkhead_tests::table::Table;
use serde_json::{Value, json};

fn names(pods: &[Value]) -> Vec<String> {
    let names = pods
        .iter()
        .filter_map(|pod| pod["metadata"]["name"].as_str());
    let mut names: Vec<_> = names.map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn jobs_complete_and_count_failures() {
    let own = Namespace::new("jobs");
    let pods = |line: &str| {
        spec(
            json!([script("main", line, json!({}))]),
            json!({"restartPolicy": "Never"}),
        )
    };
    let indexed = json!({"spec": {
        "completions": 3, "parallelism": 2, "completionMode": "Indexed",
        "template": {"spec": pods("echo index $JOB_COMPLETION_INDEX")},
    }});
    let failing = json!({"spec": {"backoffLimit": 0, "template": {"spec": pods("exit 4")}}});
    own.apply(&[
        object("Job", "indexed", indexed),
        object("Job", "failing", failing),
    ]);
    own.wait("job/indexed", "condition=Complete");
    own.wait("job/failing", "condition=Failed");
    let mut table = Table::new("cluster: Jobs");
    table.equal(
        "completions",
        own.object("job", "indexed")["status"]["succeeded"].clone(),
        json!(3),
    );
    let log = own.get(&["logs", "-l", "job-name=indexed"]);
    let mut lines: Vec<_> = log.lines().collect();
    lines.sort_unstable();
    table.equal(
        "each has its index",
        lines,
        vec!["index 0", "index 1", "index 2"],
    );
    let status = own.object("job", "failing")["status"].clone();
    table.equal("failures", status["failed"].clone(), json!(1));
    table.finish();
}

#[test]
fn a_deployment_rolls_over_and_back() {
    let own = Namespace::new("rollout");
    let version = |version: &str| {
        let line = format!("echo version {version}; {STAY}");
        let pods = spec(json!([script("main", &line, json!({}))]), json!({}));
        let strategy = json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}});
        let fields = json!({"replicas": 2, "strategy": strategy});
        object(
            "Deployment",
            "app",
            json!({"spec": with(template("app", pods), fields)}),
        )
    };
    let rolled = || own.wait_for_rollout("deployment/app");
    let logs = |wanted: &str| {
        // Pods of the version before may still end, and those of this one may not have said it yet.
        let what = format!("two pods say {wanted:?}");
        own.until(&what, || {
            let pods = own.objects("pods", "app=app").len();
            let logs = own.kubectl(&["logs", "-l", "app=app"]).ok()?;
            (pods == 2 && logs == wanted).then_some(logs)
        })
    };
    let mut table = Table::new("cluster: a Deployment");
    own.apply(&[version("one")]);
    rolled();
    let wanted = "version one\nversion one\n";
    table.equal("two pods", logs(wanted).as_str(), wanted);
    let before = names(&own.objects("pods", "app=app"));
    own.apply(&[version("two")]);
    rolled();
    let wanted = "version two\nversion two\n";
    table.equal("rolled over", logs(wanted).as_str(), wanted);
    let after = names(&own.objects("pods", "app=app"));
    let new = before.iter().all(|name| !after.contains(name));
    table.row("the pods are others", new, format!("{after:?}"));
    own.get(&["rollout", "undo", "deployment/app"]);
    rolled();
    let wanted = "version one\nversion one\n";
    table.equal("rolled back", logs(wanted).as_str(), wanted);
    table.finish();
}

#[test]
fn stateful_sets_keep_names_and_daemon_sets_cover_nodes() {
    let own = Namespace::new("sets");
    let pods = || spec(json!([script("main", STAY, json!({}))]), json!({}));
    let headless =
        json!({"spec": {"clusterIP": "None", "selector": {"app": "db"}, "ports": [{"port": 80}]}});
    let db = with(
        template("db", pods()),
        json!({"replicas": 2, "serviceName": "db"}),
    );
    own.apply(&[
        object("Service", "db", headless),
        object("StatefulSet", "db", json!({"spec": db})),
        object(
            "DaemonSet",
            "agent",
            json!({"spec": template("agent", pods())}),
        ),
    ]);
    own.wait_for_rollout("statefulset/db");
    own.wait_for_rollout("daemonset/agent");
    let mut table = Table::new("cluster: a StatefulSet and a DaemonSet");
    let pods = own.objects("pods", "app=db");
    table.equal(
        "stable names",
        names(&pods),
        vec!["db-0".to_owned(), "db-1".to_owned()],
    );
    let started = |name: &str| {
        own.object("pod", name)["status"]["startTime"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    table.row(
        "one after the other",
        started("db-0") < started("db-1"),
        format!("{} {}", started("db-0"), started("db-1")),
    );
    let address = own.object("pod", "db-0")["status"]["podIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let line = "nslookup db-0.db.sets.svc.cluster.local";
    let seen = own.until("db-0 has a name", || {
        let seen = own
            .kubectl(&["exec", "db-1", "--", "sh", "-c", line])
            .ok()?;
        seen.contains(&address).then_some(seen)
    });
    table.row(
        "a pod's own DNS name",
        true,
        seen.lines().last().unwrap_or_default(),
    );
    let uid = own.object("pod", "db-0")["metadata"]["uid"].clone();
    own.get(&["delete", "pod", "db-0"]);
    own.until("db-0 is another pod", || {
        let pod = own.object("pod", "db-0");
        let other = pod["metadata"]["uid"].is_string() && pod["metadata"]["uid"] != uid;
        (other && pod["status"]["phase"] == "Running").then_some(())
    });
    table.row("a deleted pod comes back under its name", true, "db-0");
    let status = own.object("daemonset", "agent")["status"].clone();
    let ready = status["numberReady"].clone();
    let wanted = status["desiredNumberScheduled"].clone();
    table.row(
        "DaemonSet: a pod on each node",
        ready == wanted && ready != json!(0),
        format!("{ready} of {wanted}"),
    );
    table.finish();
}
