// SPDX-License-Identifier: Apache-2.0
//! Tests of CNI with plugins that are shell scripts: good ones, and ones that write garbage, fail or hang.

use std::collections::BTreeMap;
use std::time::Instant;

use super::*;
use crate::capabilities;
use crate::request::{AttachRequest, Dns, PortMapping, Protocol};

/// A plugin that records how it was called, and answers.
const GOOD: &str = r#"echo "$CNI_COMMAND $CNI_IFNAME netns=$CNI_NETNS $CNI_ARGS" >>"$0.calls"; cat >"$0.$CNI_COMMAND"
case "$CNI_COMMAND" in
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0","7.0.0"]}';;
ADD) echo '{"cniVersion":"1.0.0",
  "interfaces":[{"name":"br"},{"name":"eth0","sandbox":"/n"}],
  "ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1","interface":1}],
  "routes":[{"dst":"0.0.0.0/0"}],"dns":{"nameservers":["10.1.0.53"]}}';;
esac"#;

struct Fixture {
    directory: tempfile::TempDir,
    directories: Vec<PathBuf>,
}

impl Fixture {
    fn new(scripts: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, body) in scripts {
            let path = directory.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self {
            directories: vec!["/nonexistent".into(), directory.path().to_owned()],
            directory,
        }
    }

    fn plugins(&self) -> Plugins<'_> {
        Plugins {
            directories: &self.directories,
            limit: Duration::from_secs(10),
        }
    }

    /// For plugins that never end.
    fn impatient(&self) -> Plugins<'_> {
        Plugins {
            limit: Duration::from_millis(300),
            ..self.plugins()
        }
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(name)).unwrap_or_default()
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }
}

fn chain(version: &str, plugins: &str) -> Conflist {
    Conflist::parse(&format!(
        r#"{{"cniVersion":"{version}","name":"net","plugins":[{plugins}]}}"#
    ))
    .unwrap()
}

fn invocation() -> Invocation {
    let annotation = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let request = AttachRequest {
        pod_id: "pod".into(),
        name: "web;x".into(),
        namespace: "default".into(),
        port_mappings: vec![
            PortMapping {
                protocol: Protocol::Tcp,
                container_port: 80,
                host_port: 8080,
                host_ip: "127.0.0.1".into(),
            },
            PortMapping {
                protocol: Protocol::Tcp,
                container_port: 81,
                host_port: 0,
                host_ip: String::new(),
            },
        ],
        annotations: BTreeMap::from([annotation("kubernetes.io/ingress-bandwidth", "1M")]),
        dns: Some(Dns {
            servers: vec!["10.0.0.10".into()],
            ..Dns::default()
        }),
        ..Default::default()
    };
    let capabilities = capabilities::of_request(&request, &["10.9.0.0/24".into()]).unwrap();
    Invocation::new(&request, capabilities, Path::new("/netns"))
}

#[tokio::test]
async fn a_chain_passes_results_on_and_deletes_in_reverse() {
    let pass_on = r#"echo "$CNI_COMMAND" >>"$0.calls"
tee "$0.$CNI_COMMAND" | sed 's/.*"prevResult"://; s/,"runtimeConfig".*//; s/,"type":.*//'"#;
    let fixture = Fixture::new(&[("one", GOOD), ("two", pass_on)]);
    let chain = chain(
        "1.0.0",
        r#"{"type":"one"},{"type":"two","capabilities":{"portMappings":true,"dns":false}}"#,
    );
    let result = chain.add(&invocation(), &fixture.plugins()).await.unwrap();
    assert_eq!(result.addresses, ["10.1.0.5/16"]);
    assert_eq!(result.dns.servers, ["10.1.0.53"]);
    let second = fixture.json("two.ADD");
    assert!(second.get("capabilities").is_none(), "{second}");
    assert!(fixture.json("one.ADD").get("runtimeConfig").is_none());
    let text = Some(result.text.as_str());
    chain
        .check(&invocation(), text, &fixture.plugins())
        .await
        .unwrap();
    assert_eq!(
        fixture.json("one.CHECK")["prevResult"],
        fixture.json("two.CHECK")["prevResult"]
    );
    chain
        .delete(&invocation(), None, text, &fixture.plugins())
        .await
        .unwrap();
    assert!(fixture.read("one.DEL").contains("prevResult"));
    let calls = fixture.read("one.calls");
    assert!(
        calls.contains(
            "ADD eth0 netns=/netns IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web_x;"
        ),
        "{calls}"
    );
    assert!(calls.contains("DEL eth0 netns= Ign"), "{calls}");
}

#[tokio::test]
async fn a_plugin_gets_the_capabilities_that_it_declares() {
    let fixture = Fixture::new(&[("one", GOOD)]);
    let all = r#"{"type":"one","capabilities":{"portMappings":true,"bandwidth":true,"ipRanges":true,"dns":true,
        "io.kubernetes.cri.pod-annotations":true,"mac":true}}"#;
    chain("0.4.0", all)
        .add(&invocation(), &fixture.plugins())
        .await
        .unwrap();
    let expected = json!({
        "portMappings": [{"protocol": "tcp", "containerPort": 80, "hostPort": 8080, "hostIP": "127.0.0.1"}],
        "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 4_294_967_295_u64, "egressRate": 0, "egressBurst": 0},
        "ipRanges": [[{"subnet": "10.9.0.0/24"}]],
        "dns": {"servers": ["10.0.0.10"], "searches": [], "options": []},
        "io.kubernetes.cri.pod-annotations": {"kubernetes.io/ingress-bandwidth": "1M"},
    });
    assert_eq!(fixture.json("one.ADD")["runtimeConfig"], expected);
}

#[tokio::test]
async fn what_plugins_do_wrong_is_told_with_their_names() {
    let fixture = Fixture::new(&[
        ("garbage", r"printf 'not \033[31m json'"),
        (
            "bad-address",
            r#"echo '{"ips":[{"address":"10.0.0.300/8"}]}'"#,
        ),
        (
            "failing",
            r#"echo '{"code":11,"msg":"no room","details":"pool is empty"}'; echo complaint >&2; exit 1"#,
        ),
        ("babbling", "echo hello; exit 2"),
        ("silent", "exit 3"),
        ("hanging", "sleep 60 & sleep 61"),
        ("endless", "yes"),
        ("complaining", "yes >&2"),
    ]);
    let table = [
        ("garbage", "not JSON"),
        ("bad-address", "10.0.0.300/8"),
        (
            "failing",
            "failed ADD: code 11: no room: pool is empty: complaint",
        ),
        ("babbling", "failed ADD: hello"),
        ("silent", "exit status: 3"),
        ("hanging", "did not finish ADD"),
        ("endless", "more than"),
        ("complaining", "did not finish ADD"),
        ("nowhere", "nowhere of network net is in none"),
    ];
    for (program, word) in table {
        let plugins = match program {
            "hanging" | "complaining" => fixture.impatient(),
            _ => fixture.plugins(),
        };
        let chain = chain("1.0.0", &format!(r#"{{"type":"{program}"}}"#));
        let started = Instant::now();
        let error = chain.add(&invocation(), &plugins).await.unwrap_err();
        let text = bulkhead_text::chain(&error);
        assert!(text.contains(word), "{program}: {text}");
        assert!(
            text.contains(program) && text.contains("network net"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'), "{text:?}");
        assert_eq!(error.is_passing(), program == "failing", "{text}");
        assert!(started.elapsed() < Duration::from_secs(9), "{program}");
    }
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_its_children() {
    let fixture = Fixture::new(&[("hanging", r#"sleep 60 & echo $! >"$0.child"; wait"#)]);
    let chain = chain("1.0.0", r#"{"type":"hanging"}"#);
    chain
        .add(&invocation(), &fixture.impatient())
        .await
        .unwrap_err();
    let child = fixture.read("hanging.child");
    let status = PathBuf::from(format!("/proc/{}/stat", child.trim()));
    let gone = || {
        let stat = std::fs::read_to_string(&status).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    let started = Instant::now();
    while !gone() {
        assert!(started.elapsed() < Duration::from_secs(5), "child lives");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn every_plugin_is_deleted_though_one_fails() {
    let fixture = Fixture::new(&[("one", GOOD), ("failing", "exit 1")]);
    let chain = chain("1.0.0", r#"{"type":"one"},{"type":"failing"}"#);
    let deleted = chain
        .delete(&invocation(), None, None, &fixture.plugins())
        .await;
    assert!(deleted.is_err());
    assert!(fixture.read("one.calls").contains("DEL"));
}

#[tokio::test]
async fn the_newest_version_that_all_plugins_know_is_spoken() {
    let old = r#"echo x >>"$0.calls"; [ $CNI_COMMAND = VERSION ] && echo '{"supportedVersions":["0.3.1","1.0.0"]}'"#;
    let fixture = Fixture::new(&[("new", GOOD), ("old", old), ("mute", "echo '{}'")]);
    let known = KnownVersions::default();
    let several = |plugins: &str| {
        let text = format!(
            r#"{{"cniVersion":"0.4.0","cniVersions":["1.0.0","1.1.0"],"name":"net","plugins":[{plugins}]}}"#
        );
        Conflist::parse(&text).unwrap()
    };
    let mut both = several(r#"{"type":"new"},{"type":"old"}"#);
    both.settle(&known, &fixture.plugins()).await.unwrap();
    assert_eq!(both.version, Version::V1_0_0);
    let mut new = several(r#"{"type":"new"}"#);
    new.settle(&known, &fixture.plugins()).await.unwrap();
    assert_eq!(new.version, Version::V1_1_0);
    several(r#"{"type":"old"}"#)
        .settle(&known, &fixture.plugins())
        .await
        .unwrap();
    assert_eq!(fixture.read("old.calls"), "x\n", "asked once");
    let error = several(r#"{"type":"mute"}"#)
        .settle(&known, &fixture.plugins())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("mute"), "{error}");
    // A single version is not checked first: a plugin that does not support it will fail.
    let mut one = chain("1.1.0", r#"{"type":"mute"}"#);
    one.settle(&known, &fixture.plugins()).await.unwrap();
    assert_eq!(one.version, Version::V1_1_0);
}

#[tokio::test]
async fn commands_that_a_version_does_not_have_are_not_run() {
    let fixture = Fixture::new(&[("one", GOOD)]);
    let plugins = fixture.plugins();
    let plugin = r#"{"type":"one"}"#;
    let valid = [invocation().attachment()];
    let result = Some("{}");
    let old = chain("0.3.1", plugin);
    old.check(&invocation(), result, &plugins).await.unwrap();
    old.status(&plugins).await.unwrap();
    assert!(old.collect_garbage(&valid, &plugins).await.is_empty());
    assert_eq!(fixture.read("one.calls"), "");
    old.delete(&invocation(), None, result, &plugins)
        .await
        .unwrap();
    assert!(!fixture.read("one.DEL").contains("prevResult"));

    let new = chain("1.1.0", plugin);
    new.status(&plugins).await.unwrap();
    assert!(new.collect_garbage(&valid, &plugins).await.is_empty());
    let expected = json!([{"containerID": "pod", "ifname": "eth0"}]);
    assert_eq!(
        fixture.json("one.GC")["cni.dev/valid-attachments"],
        expected
    );
    assert!(fixture.read("one.calls").contains("STATUS  netns= \n"));
    let forbidden = r#"{"cniVersion":"1.1.0","name":"net","disableGC":true,"disableCheck":true,
        "plugins":[{"type":"nowhere"}]}"#;
    let forbidden = Conflist::parse(forbidden).unwrap();
    assert!(forbidden.collect_garbage(&valid, &plugins).await.is_empty());
    forbidden
        .check(&invocation(), result, &plugins)
        .await
        .unwrap();
}
