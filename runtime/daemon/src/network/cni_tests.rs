// SPDX-License-Identifier: Apache-2.0
//! CNI against plugins that are shell scripts: good, garbage, failing, hanging.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// A plugin that notes how it was called and answers.
const GOOD: &str = r#"echo "$CNI_COMMAND $CNI_IFNAME $CNI_ARGS" >>"$0.calls"; cat >"$0.$CNI_COMMAND"
[ "$CNI_COMMAND" = DEL ] || echo '{"cniVersion":"1.0.0",
  "interfaces":[{"name":"br"},{"name":"eth0","sandbox":"/n"}],
  "ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1","interface":1},{"address":"10.9.9.9/24","interface":0},
         {"address":"fd00::5/64","gateway":"fd00::1"}],
  "routes":[{"dst":"0.0.0.0/0"},{"dst":"10.2.0.0/16","gw":"10.1.0.9"},{"dst":"::/0"}],
  "dns":{"nameservers":["10.1.0.53"],"search":["cluster.local"]}}'"#;

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
            timeout: Duration::from_millis(500),
        }
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(name)).unwrap()
    }
}

fn chain(plugins: &str) -> Conflist {
    Conflist::parse(&format!(
        r#"{{"cniVersion":"1.0.0","name":"net","plugins":[{plugins}]}}"#
    ))
    .unwrap()
}

fn invocation() -> Invocation {
    let request = AttachRequest {
        pod_id: "pod".into(),
        name: "web;x".into(),
        namespace: "default".into(),
        port_mappings: vec![PortMapping {
            protocol: super::super::Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: String::new(),
        }],
        ..Default::default()
    };
    Invocation::new(&request, Path::new("/netns"))
}

#[tokio::test]
async fn a_chain_passes_results_on_and_deletes_in_reverse() {
    let fixture = Fixture::new(&[
        ("one", GOOD),
        (
            "two",
            r#"echo "$CNI_COMMAND" >>"$0.calls"; tee "$0.$CNI_COMMAND" | sed 's/.*"prevResult"://; s/,"runtimeConfig".*//; s/,"type":.*//'"#,
        ),
    ]);
    let chain = chain(r#"{"type":"one"},{"type":"two","capabilities":{"portMappings":true}}"#);
    let result = chain.add(&invocation(), &fixture.plugins()).await.unwrap();
    assert_eq!(result.addresses, ["10.1.0.5/16", "fd00::5/64"]);
    let routes = [
        ("0.0.0.0/0", "10.1.0.1"),
        ("10.2.0.0/16", "10.1.0.9"),
        ("::/0", "fd00::1"),
    ];
    assert_eq!(
        result.routes,
        routes.map(|(to, via)| (to.to_owned(), via.to_owned()))
    );
    assert_eq!(result.dns.servers, ["10.1.0.53"]);
    let second: serde_json::Value = serde_json::from_str(&fixture.read("two.ADD")).unwrap();
    let mapping =
        serde_json::json!({"protocol": "tcp", "containerPort": 80, "hostPort": 8080, "hostIP": ""});
    assert_eq!(second["runtimeConfig"]["portMappings"][0], mapping);
    assert!(second.get("capabilities").is_none(), "{second}");
    chain
        .delete(&invocation(), Some(&result.text), &fixture.plugins())
        .await
        .unwrap();
    assert!(fixture.read("one.DEL").contains("prevResult"));
    let calls = fixture.read("one.calls");
    assert!(
        calls.contains("ADD eth0 IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web_x;"),
        "{calls}"
    );
    assert!(calls.contains("DEL"));
}

#[tokio::test]
async fn what_plugins_do_wrong_is_told() {
    let fixture = Fixture::new(&[
        ("garbage", "echo not json"),
        (
            "bad-address",
            r#"echo '{"ips":[{"address":"10.0.0.300/8"}]}'"#,
        ),
        (
            "failing",
            r#"echo '{"code":11,"msg":"no room","details":"pool is empty"}'; echo complaint >&2; exit 1"#,
        ),
        ("silent", "exit 3"),
        ("hanging", "sleep 60"),
        ("endless", "yes"),
    ]);
    let table = [
        ("garbage", "not json"),
        ("bad-address", "10.0.0.300/8"),
        ("failing", "failed ADD: no room: pool is empty: complaint"),
        ("silent", "exit status: 3"),
        ("hanging", "did not finish ADD"),
        ("endless", "endless"),
        ("nowhere", "nowhere is in none"),
    ];
    for (program, word) in table {
        let chain = chain(&format!(r#"{{"type":"{program}"}}"#));
        let error = chain
            .add(&invocation(), &fixture.plugins())
            .await
            .unwrap_err();
        let text = crate::chain(&error);
        assert!(text.contains(word), "{program}: {text}");
    }
}

#[tokio::test]
async fn every_plugin_is_deleted_though_one_fails() {
    let fixture = Fixture::new(&[("one", GOOD), ("failing", "exit 1")]);
    let chain = chain(r#"{"type":"one"},{"type":"failing"}"#);
    let deleted = chain.delete(&invocation(), None, &fixture.plugins()).await;
    assert!(deleted.is_err());
    assert!(fixture.read("one.calls").contains("DEL"));
}

#[test]
fn the_first_valid_file_by_name_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(
        Conflist::load(&directory.path().join("none")).unwrap(),
        None
    );
    assert_eq!(Conflist::load(directory.path()).unwrap(), None);
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("00.txt", "not looked at");
    write("10.conflist", "broken");
    assert!(Conflist::load(directory.path()).is_err());
    write("30.conf", r#"{"name":"later","type":"bridge"}"#);
    write(
        "20.conflist",
        r#"{"name":"first","cniVersion":"1.1.0","plugins":[{"type":"bridge"}]}"#,
    );
    let found = Conflist::load(directory.path()).unwrap().unwrap();
    assert_eq!(
        (found.name.as_str(), found.version.as_str()),
        ("first", "1.1.0")
    );
}

#[test]
fn configurations_that_would_run_something_else_are_refused() {
    for text in [
        r#"{"plugins":[{"type":"x"}]}"#,
        r#"{"name":"n","plugins":[]}"#,
        r#"{"name":"n","plugins":[{"type":"../../bin/sh"}]}"#,
        r#"{"name":"n","plugins":[{}]}"#,
        r#"{"name":"n","plugins":[3]}"#,
        r#"{"name":"n","plugins":3}"#,
    ] {
        assert!(Conflist::parse(text).is_err(), "{text}");
    }
}
