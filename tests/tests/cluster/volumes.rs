// SPDX-License-Identifier: Apache-2.0
//! Volumes that need an API server: configMaps and Secrets that change, the downward API, tokens, local volumes.

use bulkhead_tests::cluster::{
    NODE, Namespace, apply_all, cluster, object, on_node, pod, with_input,
};
use bulkhead_tests::table::Table;
use serde_json::{Value, json};

const UPDATES: &str = "updates";
const CLAIMS: &str = "claims";

fn data(kind: &str, value: &str) -> Value {
    let field = if kind == "Secret" {
        "stringData"
    } else {
        "data"
    };
    object(kind, "some", json!({field: {"key": value}}))
}

/// A pod that prints what its volumes say, whenever that changes.
fn reader() -> Value {
    let line = "while :; do
            now=\"config=$(cat /config/key) secret=$(cat /secret/key) label=$(cat /down/colour) sub=$(cat /sub) env=$FROM_ENV\"
            [ \"$now\" = \"$was\" ] || echo \"$now\"
            was=$now; sleep 0.5
        done";
    let mounts = json!({
        "env": [{"name": "FROM_ENV", "valueFrom": {"configMapKeyRef": {"name": "some", "key": "key"}}}],
        "volumeMounts": [
            {"name": "config", "mountPath": "/config"},
            {"name": "config", "mountPath": "/sub", "subPath": "key"},
            {"name": "secret", "mountPath": "/secret"},
            {"name": "down", "mountPath": "/down"},
            {"name": "token", "mountPath": "/token"},
        ],
    });
    let colour =
        json!([{"path": "colour", "fieldRef": {"fieldPath": "metadata.labels['colour']"}}]);
    let token = json!([{"serviceAccountToken": {"path": "token", "audience": "tests", "expirationSeconds": 600}}]);
    let volumes = json!({"volumes": [
        {"name": "config", "configMap": {"name": "some"}},
        {"name": "secret", "secret": {"secretName": "some"}},
        {"name": "down", "downwardAPI": {"items": colour}},
        {"name": "token", "projected": {"sources": token}},
    ]});
    let mut pod = pod("reader", line, mounts, volumes);
    pod["metadata"]["labels"]["colour"] = "red".into();
    pod
}

/// Asks the API server what a token is worth.
fn review(token: &str) -> Value {
    let review = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": ["tests"]},
    });
    let mut kubectl = std::process::Command::new("kubectl");
    let output = with_input(
        kubectl.args(["create", "-f", "-", "-o", "json"]),
        &review.to_string(),
    );
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    answer["status"].clone()
}

#[test]
fn config_maps_secrets_and_labels_change_in_a_running_pod() {
    let own = Namespace::new(UPDATES);
    own.apply(&[data("ConfigMap", "one"), data("Secret", "eins"), reader()]);
    let mut table = Table::new("cluster: configMaps, Secrets, labels and tokens");
    let first = "config=one secret=eins label=red sub=one env=one";
    own.until_logged("reader", first);
    table.row("first", true, first);
    own.apply(&[data("ConfigMap", "two"), data("Secret", "zwei")]);
    own.get(&["label", "pod", "reader", "colour=blue", "--overwrite"]);
    let log = own.until_logged("reader", "config=two secret=zwei label=blue");
    let last = log.lines().last().unwrap_or_default();
    table.row("changed: configMap, Secret, label", true, last);
    let kept = last.ends_with("sub=one env=one");
    table.row("not changed: a subPath, a variable", kept, last);

    let token = own.get(&["exec", "reader", "--", "cat", "/token/token"]);
    let status = review(&token);
    let user = &status["user"]["username"];
    let known = status["authenticated"] == true && status["audiences"] == json!(["tests"]);
    let right = known && *user == format!("system:serviceaccount:{UPDATES}:default");
    table.row("a projected token", right, user);
    let bound = &status["user"]["extra"]["authentication.kubernetes.io/pod-name"];
    table.equal("it is bound to the pod", bound.clone(), json!(["reader"]));
    let automatic = "ls /var/run/secrets/kubernetes.io/serviceaccount";
    let seen = own.kubectl(&["exec", "reader", "--", "sh", "-c", automatic]);
    let right = seen.as_ref().is_ok_and(|files| {
        files
            .split_whitespace()
            .eq(["ca.crt", "namespace", "token"])
    });
    table.row(
        "the service account's own files",
        right,
        format!("{seen:?}"),
    );
    table.finish();
}

fn user_of_claim(name: &str, line: &str) -> Value {
    let volumes = json!({
        "restartPolicy": "Never",
        "securityContext": {"fsGroup": 2000},
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    });
    let mounts = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    pod(name, line, mounts, volumes)
}

#[test]
fn a_local_volume_outlives_its_pods() {
    let own = Namespace::new(CLAIMS);
    let path = "/var/lib/local/claims";
    on_node(&format!("mkdir -p {path}")).expect("a directory of the node");
    let terms = json!([{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}]}]);
    apply_all(&[object(
        "PersistentVolume",
        "claims",
        json!({"spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "local",
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": path},
            "nodeAffinity": {"required": {"nodeSelectorTerms": terms}},
        }}),
    )]);
    let claim = json!({"spec": {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "local",
        "resources": {"requests": {"storage": "1Gi"}},
    }});
    own.apply(&[object("PersistentVolumeClaim", "data", claim)]);
    let mut table = Table::new("cluster: a local PersistentVolume");
    let phase = own.object("pvc", "data")["status"]["phase"].clone();
    table.equal("unbound until a pod wants it", phase, json!("Pending"));
    own.apply(&[user_of_claim(
        "writer",
        "echo kept >/data/file; stat -c %g /data",
    )]);
    own.until_phase("writer", "Succeeded");
    let phase = own.object("pvc", "data")["status"]["phase"].clone();
    table.equal("bound", phase, json!("Bound"));
    let group = own.get(&["logs", "writer"]);
    table.equal("fsGroup", group.trim(), "2000");
    own.get(&["delete", "pod", "writer"]);
    own.apply(&[user_of_claim("reader", "cat /data/file")]);
    own.until_phase("reader", "Succeeded");
    table.equal(
        "the next pod reads it",
        own.get(&["logs", "reader"]).trim(),
        "kept",
    );
    let seen = on_node(&format!("cat {path}/file"));
    table.equal("the node sees it", seen, Ok("kept\n".into()));
    // So that a later run may bind the volume again.
    own.get(&["delete", "pod,pvc", "--all"]);
    let _ = cluster(&["delete", "pv", "claims", "--wait=false"]);
    table.finish();
}
