// SPDX-License-Identifier: Apache-2.0
//! Tests of the network without namespaces: configuration, readiness, records.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Map;

use crate::cni::{Invocation, Selection};
use crate::record::AttachedRecord;
use crate::{AttachRequest, Network, NetworkConfig, NetworkRecord, PortMapping, Protocol};

struct Fixture {
    network: Network,
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let network = Network::new(&NetworkConfig {
            conf_dir: path("conf"),
            bin_dirs: vec![path("bin")],
            cache_dir: path("cache"),
            netns_dir: path("netns"),
            plugin_timeout: Duration::from_secs(5),
            ip_ranges: Vec::new(),
            in_advance: false,
        })
        .unwrap();
        std::fs::create_dir(path("conf")).unwrap();
        std::fs::create_dir(path("bin")).unwrap();
        Self { network, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn configure(&self, name: &str, text: &str) {
        std::fs::write(self.path("conf").join(name), text).unwrap();
    }

    fn plugin(&self, name: &str, body: &str) {
        let path = self.path("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    async fn not_ready(&self) -> String {
        self.network.ready().await.unwrap_err().cause
    }

    fn record(&self, pod_id: &str) -> NetworkRecord {
        let request = AttachRequest {
            pod_id: pod_id.into(),
            ..Default::default()
        };
        let netns = self.path("netns").join(pod_id);
        let selection = Selection::look(&self.path("conf")).unwrap();
        NetworkRecord {
            pod_id: pod_id.into(),
            attached: Some(AttachedRecord {
                invocation: Invocation::new(&request, Map::new(), &netns),
                netns,
                conflist: selection.network.unwrap(),
                result: Some("{}".into()),
            }),
        }
    }
}

const ONE: &str = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"one"}]}"#;

#[tokio::test]
async fn without_a_configuration_there_is_loopback_only_and_readiness_says_why() {
    let fixture = Fixture::new();
    let why = fixture.not_ready().await;
    assert!(why.contains("no CNI configuration"), "{why}");
    let request = AttachRequest {
        pod_id: "p".into(),
        ..Default::default()
    };
    let planned = fixture.network.plan(request.clone()).await.unwrap();
    let attachment = fixture.network.attach(planned, None).await.unwrap();
    assert!(attachment.tap.is_none() && attachment.addresses.is_empty());
    fixture.network.detach(&attachment.record).await.unwrap();
    fixture.configure("1.conflist", "{");
    let error = fixture.network.plan(request).await.unwrap_err();
    assert!(bulkhead_text::chain(&error).contains("1.conflist"));
    assert!(fixture.not_ready().await.contains("1.conflist"));
}

#[tokio::test]
async fn readiness_follows_the_directory_and_what_the_plugin_says() {
    let fixture = Fixture::new();
    fixture.configure("5.conflist", ONE);
    let why = fixture.not_ready().await;
    assert!(why.contains("one is in none of"), "{why}");
    fixture.plugin(
        "one",
        r#"echo x >>"$0.calls"; echo '{"code":50,"msg":"no agent"}'; exit 1"#,
    );
    for _ in 0..3 {
        let why = fixture.not_ready().await;
        assert!(
            why.contains("one of network n failed STATUS: code 50: no agent"),
            "{why}"
        );
    }
    let calls = std::fs::read_to_string(fixture.path("bin/one.calls")).unwrap();
    assert_eq!(calls, "x\n", "asked once");
    // For another network, the plugins are asked again.
    fixture.plugin("one", "exit 0");
    fixture.configure("5.conflist", &ONE.replace("\"n\"", "\"m\""));
    assert_eq!(fixture.network.ready().await.unwrap(), "");
    fixture.configure("1.conflist", "[]");
    let remark = fixture.network.ready().await.unwrap();
    assert!(
        remark.contains("skipped") && remark.contains("1.conflist"),
        "{remark}"
    );
}

#[tokio::test]
async fn a_network_that_a_plugin_does_not_take_down_is_kept_for_another_try() {
    let fixture = Fixture::new();
    fixture.configure("5.conflist", ONE);
    fixture.plugin("one", r#"[ -e "$0.broken" ] && exit 1; cat >"$0.DEL""#);
    std::fs::write(fixture.path("bin/one.broken"), "").unwrap();
    let record = fixture.record("gone");
    let cache = fixture.path("cache");
    record.write(&cache).unwrap();
    fixture.record("lives").write(&cache).unwrap();
    let live = [fixture.record("lives")];
    fixture.network.sweep(&live).await;
    assert!(fixture.path("cache/gone.json").exists());
    std::fs::remove_file(fixture.path("bin/one.broken")).unwrap();
    fixture.network.sweep(&live).await;
    assert!(!fixture.path("cache/gone.json").exists());
    assert!(fixture.path("cache/lives.json").exists());
    assert!(fixture.path("bin/one.DEL").exists());
}

#[tokio::test]
async fn a_network_whose_record_cannot_be_read_is_taken_down_as_it_would_be_made_now() {
    let fixture = Fixture::new();
    fixture.configure("5.conflist", ONE);
    fixture.plugin("one", r#"echo "$CNI_CONTAINERID" >>"$0.$CNI_COMMAND""#);
    let id = |digit: &str| digit.repeat(64);
    let file = |id: &str| fixture.path("cache").join(format!("{id}.json"));
    let (empty, garbled, bare, live) = (id("0"), id("1"), id("2"), id("3"));
    std::fs::write(file(&empty), "").unwrap();
    std::fs::write(file(&garbled), "{\"pod_id\": 7}").unwrap();
    for netns in [&empty, &bare, &live] {
        std::fs::write(fixture.path("netns").join(netns), "").unwrap();
    }
    std::fs::write(fixture.path("netns/of somebody else"), "").unwrap();
    std::fs::write(fixture.path("cache/of somebody else.json"), "").unwrap();
    std::fs::write(file(&live), "garbage").unwrap();
    let unfinished = file(&id("4")).with_extension("new");
    std::fs::write(unfinished, "{").unwrap();
    let record = fixture.record(&live);
    fixture.network.sweep(std::slice::from_ref(&record)).await;
    let deleted = std::fs::read_to_string(fixture.path("bin/one.DEL")).unwrap();
    let deleted: Vec<&str> = deleted.lines().collect();
    assert_eq!(deleted, [&empty, &garbled, &bare]);
    let text = std::fs::read(file(&live)).unwrap();
    let mended: NetworkRecord = serde_json::from_slice(&text).unwrap();
    assert_eq!(mended, record);
    let left = |name: &str| {
        let entries = std::fs::read_dir(fixture.path(name)).unwrap();
        entries.count()
    };
    assert_eq!((left("cache"), left("netns")), (2, 2));
    // Without a configuration, at least the namespace goes.
    std::fs::remove_file(fixture.path("conf/5.conflist")).unwrap();
    std::fs::write(fixture.path("netns").join(&bare), "").unwrap();
    fixture.network.sweep(std::slice::from_ref(&record)).await;
    assert_eq!(left("netns"), 2);
}

#[tokio::test]
async fn what_is_planned_takes_nothing_and_is_enough_to_take_down_what_comes_of_it() {
    let fixture = Fixture::new();
    fixture.configure("5.conflist", ONE);
    fixture.plugin("one", r#"echo "$CNI_CONTAINERID" >"$0.$CNI_COMMAND""#);
    let request = AttachRequest {
        pod_id: "p".into(),
        ..Default::default()
    };
    let planned = fixture.network.plan(request).await.unwrap();
    assert!(!fixture.path("bin/one.ADD").exists());
    assert!(!fixture.path("cache/p.json").exists() && !fixture.path("netns/p").exists());
    std::fs::remove_file(fixture.path("conf/5.conflist")).unwrap();
    fixture.network.detach(&planned).await.unwrap();
    let deleted = std::fs::read_to_string(fixture.path("bin/one.DEL")).unwrap();
    assert_eq!(deleted.trim(), "p");
}

#[tokio::test]
async fn garbage_is_collected_with_a_list_of_what_lives_and_nothing_is_attached_meanwhile() {
    let fixture = Fixture::new();
    fixture.configure("5.conflist", ONE);
    fixture.plugin("one", r#"cat >"$0.$CNI_COMMAND"; exit 1"#);
    let request = AttachRequest {
        pod_id: "new".into(),
        ..Default::default()
    };
    let planned = fixture.network.plan(request).await.unwrap();
    let collection = fixture
        .network
        .garbage_collection(vec![fixture.record("lives")])
        .await;
    let attaching = fixture.network.attach(planned, None);
    let early = tokio::time::timeout(Duration::from_millis(50), attaching).await;
    assert!(early.is_err(), "attached while garbage is collected");
    collection.await;
    let input = std::fs::read(fixture.path("bin/one.GC")).unwrap();
    let input: serde_json::Value = serde_json::from_slice(&input).unwrap();
    assert_eq!(
        input["cni.dev/valid-attachments"],
        serde_json::json!([{"containerID": "lives", "ifname": "eth0"}])
    );
    assert!(fixture.network.gate.try_read().is_ok());
}

#[tokio::test]
async fn a_network_serves_another_pod_if_its_plugins_would_get_the_same() {
    let fixture = Fixture::new();
    let configure = |capability: &str| {
        let plugin = format!(r#"{{"type":"one","capabilities":{{"{capability}":true}}}}"#);
        let list = format!(r#"{{"cniVersion":"1.1.0","name":"n","plugins":[{plugin}]}}"#);
        fixture.configure("5.conflist", &list);
    };
    let request = |name: &str, annotations: &[&str]| AttachRequest {
        pod_id: name.into(),
        name: name.into(),
        annotations: annotations
            .iter()
            .map(|key| ((*key).to_owned(), "1".to_owned()))
            .collect(),
        ..Default::default()
    };
    let plan = async |name: &str, annotations: &[&str]| {
        let planned = fixture.network.plan(request(name, annotations)).await;
        planned.unwrap()
    };
    let none = plan("none", &[]).await;
    configure("portMappings");
    let made = plan("", &[]).await;
    assert!(made.serves(&plan("web", &[]).await));
    assert!(made.serves(&plan("web", &["not for this plugin"]).await));
    let mapping = PortMapping {
        protocol: Protocol::Tcp,
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    };
    let published = AttachRequest {
        port_mappings: vec![mapping],
        ..request("web", &[])
    };
    assert!(!made.serves(&fixture.network.plan(published).await.unwrap()));
    assert!(!made.serves(&none) && !none.serves(&made) && none.serves(&none));
    configure("io.kubernetes.cri.pod-annotations");
    assert!(
        !made.serves(&plan("web", &[]).await),
        "the configuration is another"
    );
    let made = plan("", &[]).await;
    assert!(made.serves(&plan("web", &[]).await));
    assert!(!made.serves(&plan("web", &["for this plugin"]).await));
}

#[tokio::test]
async fn ahead_of_a_pod_plugins_are_asked_only_if_they_may_be() {
    let mut fixture = Fixture::new();
    let ahead = fixture.network.plan_ahead("id").await.unwrap();
    let loopback = fixture.network.make_ahead(ahead).await.unwrap();
    assert!(loopback.tap.is_none() && !loopback.is_blank());
    fixture.configure("5.conflist", ONE);
    let ahead = fixture.network.plan_ahead("id").await.unwrap();
    assert!(!ahead.record.has_interface());
    let namespace = fixture.network.namespace(&ahead.record);
    assert_eq!(namespace, fixture.path("netns/id"));
    let request = AttachRequest {
        pod_id: "pod".into(),
        name: "web".into(),
        ..Default::default()
    };
    let planned = fixture.network.plan(request).await.unwrap();
    let moved = planned.clone().moved_to(&namespace);
    assert_eq!(fixture.network.namespace(&moved), namespace);
    assert!(planned.serves(&moved) && !loopback.serves(&planned));
    fixture.network.config.in_advance = true;
    let ahead = fixture.network.plan_ahead("id").await.unwrap();
    assert!(ahead.record.serves(&planned));
}
