// SPDX-License-Identifier: Apache-2.0
//! Files as vendors write them, and files that are not valid.

use super::*;
use crate::edits::{HookKind, NodeKind};

/// In the form that nvidia-ctk writes.
const YAML: &str = r#"---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
              hostPath: /run/nvidia/driver/dev/nvidia0
              type: c
              major: 195
              fileMode: 0666
              permissions: rw
    - name: all
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
containerEdits:
    env:
        - NVIDIA_VISIBLE_DEVICES=void
    deviceNodes: null
    hooks:
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args:
            - nvidia-cdi-hook
            - update-ldcache
            - --folder
            - /usr/lib64
    mounts:
        - hostPath: /usr/bin/nvidia-smi
          containerPath: /usr/bin/nvidia-smi
          options:
            - ro
            - nosuid
            - nodev
            - bind
"#;

fn parse(text: &str, format: Format) -> Result<Specification, String> {
    Specification::parse(Path::new("/etc/cdi/file"), text, format)
}

#[test]
fn a_file_of_a_vendor_is_read() {
    let found = parse(YAML, Format::Yaml).unwrap();
    assert_eq!(found.kind, "nvidia.com/gpu");
    assert_eq!(found.devices.keys().collect::<Vec<_>>(), ["0", "all"]);
    let node = &found.devices["0"].device_nodes[0];
    assert_eq!(node.source(), "/run/nvidia/driver/dev/nvidia0");
    assert_eq!(
        (node.kind, node.number()),
        (NodeKind::Character, Some((195, 0)))
    );
    assert_eq!((node.file_mode, node.access()), (Some(0o666), "rw"));
    let plain = &found.devices["all"].device_nodes[0];
    assert_eq!((plain.source(), plain.access()), ("/dev/nvidia0", "rwm"));
    assert_eq!((plain.kind, plain.number()), (NodeKind::AsOnHost, None));
    assert_eq!(found.edits.env, ["NVIDIA_VISIBLE_DEVICES=void"]);
    assert_eq!(found.edits.hooks[0].kind, HookKind::CreateContainer);
    assert_eq!(found.edits.hooks[0].args.len(), 4);
    assert_eq!(
        found.edits.mounts[0].options,
        ["ro", "nosuid", "nodev", "bind"]
    );
}

#[test]
fn json_and_yaml_say_the_same() {
    let text = r#"{"cdiVersion": "v1.1.0", "kind": "v.com/c.x", "annotations": {"a": "b"}, "devices": [
        {"name": "d", "containerEdits": {"netDevices": [{"hostInterfaceName": "eth1", "name": "net1"}],
        "intelRdt": {"closID": "x", "schemata": []}, "additionalGids": [5],
        "deviceNodes": [{"path": "/dev/x", "permissions": "none", "type": "u", "fileMode": 438}],
        "hooks": [{"hookName": "startContainer", "path": "/h", "timeout": 3}]}}]}"#;
    let (json, yaml) = (parse(text, Format::Json), parse(text, Format::Yaml));
    let (json, yaml) = (json.unwrap(), yaml.unwrap());
    assert_eq!(json.devices, yaml.devices);
    let edits = &json.devices["d"];
    assert!(edits.intel_rdt.is_some());
    assert_eq!(edits.device_nodes[0].access(), "");
    assert_eq!(edits.hooks[0].timeout.map(u32::from), Some(3));
}

#[test]
fn what_is_not_valid_is_refused_with_the_reason() {
    let whole = |version: &str, kind: &str, devices: &str, rest: &str| {
        format!(r#"{{"cdiVersion": "{version}", "kind": "{kind}", "devices": [{devices}]{rest}}}"#)
    };
    let edits = |edits: &str| {
        let device = format!(r#"{{"name": "d", "containerEdits": {{{edits}}}}}"#);
        whole("0.3.0", "v.com/c", &device, "")
    };
    let good = r#"{"name": "d", "containerEdits": {"env": ["A=b"]}}"#;
    assert!(parse(&whole("0.3.0", "v.com/c", good, ""), Format::Json).is_ok());
    let twice = format!("{good}, {good}");
    let table = [
        (whole("0.2.0", "v.com/c", good, ""), "known are 0.3.0"),
        (whole("2.0.0", "v.com/c", good, ""), "known are 0.3.0"),
        (whole("0.5.0", "v.com/c.d", good, ""), "0.6.0"),
        (whole("0.5.0", "v.com", good, ""), "VENDOR/CLASS"),
        (whole("0.5.0", "v.com/1", good, ""), "begin with a letter"),
        (whole("0.5.0", "v.com/c", "", ""), "no devices"),
        (
            whole("0.5.0", "v.com/c", &twice, ""),
            "two devices are called \"d\"",
        ),
        (
            whole("0.5.0", "v.com/c", good, r#", "more": 1"#),
            "unknown field `more`",
        ),
        (
            whole("0.5.0", "v.com/c", good, r#", "annotations": {"a": "b"}"#),
            "0.6.0",
        ),
        (
            whole(
                "0.5.0",
                "v.com/c",
                good,
                r#", "containerEdits": {"env": ["=x"]}"#,
            ),
            "\"=x\"",
        ),
        (edits(""), "no edits"),
        (edits(r#""env": ["A"]"#), "\"A\" is not a variable"),
        (edits(r#""additionalGids": [1]"#), "0.7.0"),
        (edits(r#""deviceNodes": [{"path": ""}]"#), "no path"),
        (
            edits(r#""deviceNodes": [{"path": "/d", "type": "x"}]"#),
            "unknown variant `x`",
        ),
        (
            edits(r#""deviceNodes": [{"path": "/d", "permissions": "rx"}]"#),
            "\"rx\"",
        ),
        (
            edits(r#""deviceNodes": [{"path": "/d", "hostPath": "/e"}]"#),
            "0.5.0",
        ),
        (
            edits(r#""deviceNodes": [{"path": "/d", "major": -1}]"#),
            "-1",
        ),
        (
            edits(r#""deviceNodes": [{"path": "/d", "fileMode": 65535}]"#),
            "fileMode",
        ),
        (
            edits(r#""hooks": [{"hookName": "startContainer", "path": ""}]"#),
            "startContainer hook",
        ),
        (
            edits(r#""hooks": [{"hookName": "preStart", "path": "/h"}]"#),
            "unknown variant `preStart`",
        ),
        (
            edits(r#""hooks": [{"hookName": "prestart", "path": "/h", "timeout": 0}]"#),
            "nonzero",
        ),
        (
            edits(r#""mounts": [{"hostPath": "", "containerPath": "/c"}]"#),
            "no hostPath",
        ),
        (
            edits(r#""mounts": [{"hostPath": "/h", "containerPath": "/c", "type": "bind"}]"#),
            "0.4.0",
        ),
        (edits(r#""mounts": [{"hostPath": "/h"}]"#), "containerPath"),
        ("[]".to_owned(), ""),
        (String::new(), ""),
    ];
    for (text, word) in table {
        let error = parse(&text, Format::Json).unwrap_err();
        assert!(error.contains(word), "{text}: {error}");
        assert!(parse(&text, Format::Yaml).is_err(), "{text}");
    }
}

#[test]
fn yaml_that_grows_beyond_its_size_is_refused_on_one_line() {
    let mut text = "cdiVersion: 0.6.0\nkind: v.com/c\nannotations:\n".to_owned();
    text.push_str("  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..9 {
        let below = format!("*a{}", level - 1);
        let list = vec![below; 10].join(", ");
        text.push_str(&format!("  a{level}: &a{level} [{list}]\n"));
    }
    let deep = "[".repeat(1 << 20);
    for text in [text.as_str(), deep.as_str(), "a: b: c", "kind: \"", "%"] {
        let error = parse(text, Format::Yaml).unwrap_err();
        assert!(!error.contains('\n') && error.len() < 1000, "{error}");
    }
}
