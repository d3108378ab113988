// SPDX-License-Identifier: Apache-2.0
//! What CDI devices add to a container, and what they cannot add.

use super::*;
use crate::pod::fixtures::container_spec;
use crate::pod::life::spec::{IdRange, MountSource, Propagation};

/// Adds a device with these edits, in JSON, to a container.
fn with(edits: &str, mut spec: ContainerSpec) -> Result<ContainerSpec, ParseError> {
    let directory = tempfile::tempdir().unwrap();
    let text = format!(
        r#"{{"cdiVersion": "1.1.0", "kind": "v.com/c",
        "devices": [{{"name": "d", "containerEdits": {{{edits}}}}}]}}"#
    );
    std::fs::write(directory.path().join("v.json"), text).unwrap();
    spec.cdi_devices = vec!["v.com/c=d".into()];
    let directories = Directories::new(vec![directory.path().to_owned()]);
    add(&mut spec, None, &directories)?;
    Ok(spec)
}

#[test]
fn names_of_the_field_come_first_and_each_counts_once() {
    let field = ["v.com/c=field", "v.com/c=both"].map(|name| cri::CdiDevice { name: name.into() });
    let annotations = |pairs: &[(&str, &str)]| {
        let pairs = pairs
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()));
        pairs.collect::<HashMap<_, _>>()
    };
    let found = annotations(&[
        ("cdi.k8s.io/b", "v.com/c=last"),
        ("cdi.k8s.io/a", "v.com/c=both,v.com/c=first"),
        ("cdi.k8s.io.other/a", "no name"),
        ("other", "no name"),
    ]);
    assert_eq!(
        names(&field, &found).unwrap(),
        [
            "v.com/c=field",
            "v.com/c=both",
            "v.com/c=first",
            "v.com/c=last"
        ]
    );
    for value in ["", "gpu0", "v.com/c=a,", "v.com/c=a, v.com/c=b", "v.com/c"] {
        let error = names(&[], &annotations(&[("cdi.k8s.io/x", value)])).unwrap_err();
        assert!(matches!(error, ParseError::CdiName(_)), "{value}: {error}");
    }
    let many: Vec<_> = (0..=MOST_DEVICES).map(|n| format!("v.com/c={n}")).collect();
    assert!(names(&[], &annotations(&[("cdi.k8s.io/x", &many.join(","))])).is_err());
}

#[test]
fn a_device_adds_what_a_pod_can_have() {
    let mut spec = container_spec();
    spec.environment = vec![
        ("KEPT".into(), b"1".to_vec()),
        ("SET".into(), b"1".to_vec()),
    ];
    spec.security.user.uid = Some(1000);
    spec.security.user.supplemental_groups = vec![7];
    let spec = with(
        r#""env": ["SET=2=3", "EMPTY="], "additionalGids": [0, 7, 8],
        "deviceNodes": [
            {"path": "/dev/fuse", "fileMode": 384, "gid": 5},
            {"path": "/dev/mine", "hostPath": "/dev/null", "type": "c", "major": 1, "minor": 3, "permissions": "r"},
            {"path": "/dev/disk", "hostPath": "/dev/loop0", "type": "b", "major": 7, "uid": 3, "permissions": "rw"},
            {"path": "/dev/mine", "hostPath": "/dev/zero", "permissions": "none"}],
        "hooks": [{"hookName": "startContainer", "path": "/bin/h", "args": ["h", "-x"],
            "env": ["A=b"], "timeout": 2}]"#,
        spec,
    )
    .unwrap();
    let set: Vec<_> = spec
        .environment
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(set, ["KEPT", "SET", "SET", "EMPTY"]);
    assert_eq!(spec.environment[2].1, b"2=3");
    assert_eq!(spec.security.user.supplemental_groups, [7, 8]);
    let devices: Vec<_> = spec
        .devices
        .iter()
        .map(|one| {
            (
                one.container_path.as_str(),
                one.guest_path.as_str(),
                one.permissions.as_str(),
            )
        })
        .collect();
    assert_eq!(
        devices,
        [
            ("/dev/fuse", "/dev/fuse", "rwm"),
            ("/dev/mine", "/dev/zero", "")
        ]
    );
    let owner = NodeOwner {
        mode: Some(0o600),
        uid: Some(1000),
        gid: Some(5),
    };
    assert_eq!(spec.devices[0].owner, owner);
    let block = &spec.block_devices[0];
    assert_eq!(
        (block.path.to_str(), block.number),
        (Some("/dev/loop0"), Some((7, 0)))
    );
    assert_eq!((block.owner.uid, block.writes()), (Some(3), true));
    let hook = StartHook {
        path: "/bin/h".into(),
        args: vec!["h".into(), "-x".into()],
        environment: vec!["A=b".into()],
        timeout: Some(Duration::from_secs(2)),
    };
    assert_eq!(spec.start_hooks, [hook]);
}

#[test]
fn a_mount_has_its_options_and_replaces_one_at_the_same_path() {
    let given = |host_path: &str, options: &[&str]| CdiMount {
        host_path: host_path.into(),
        container_path: "/data/".into(),
        options: options.iter().map(ToString::to_string).collect(),
        kind: String::new(),
    };
    let range = IdRange {
        first: 1,
        length: 2,
    };
    let users = UserNamespace {
        uids: range,
        gids: range,
    };
    let found = mount(
        given("/srv", &["ro", "nosuid", "nodev", "rbind", "rslave"]),
        Some(users),
    )
    .unwrap();
    assert_eq!(found.source, MountSource::Host("/srv".into()));
    assert_eq!(
        (found.container_path.as_str(), found.users),
        ("/data", Some(users))
    );
    assert_eq!((found.readonly, found.recursive_readonly), (true, false));
    assert_eq!(found.propagation, Propagation::HostToContainer);
    let options = MountOptions {
        no_suid: true,
        no_dev: true,
        no_exec: false,
    };
    assert_eq!(found.options, options);
    let later = mount(
        given("/srv", &["rro", "noexec", "exec", "rw", "bind", "rprivate"]),
        None,
    )
    .unwrap();
    assert_eq!(
        (later.readonly, later.options),
        (false, MountOptions::default())
    );
    assert!(
        mount(given("/srv", &["rro"]), None)
            .unwrap()
            .recursive_readonly
    );

    let mut spec = container_spec();
    spec.mounts = vec![mount(given("/old", &[]), None).unwrap()];
    let edits = r#""mounts": [{"hostPath": "/new", "containerPath": "/data"}]"#;
    let spec = with(edits, spec).unwrap();
    assert_eq!(spec.mounts.len(), 1);
    assert_eq!(spec.mounts[0].source, MountSource::Host("/new".into()));
}

#[test]
fn what_a_pod_cannot_have_is_refused_by_the_devices_name_and_its_own() {
    let table = [
        (r#""intelRdt": {"closID": "x"}"#, "intelRdt"),
        (
            r#""netDevices": [{"hostInterfaceName": "eth7", "name": "n"}]"#,
            "eth7",
        ),
        (
            r#""hooks": [{"hookName": "createContainer", "path": "/usr/bin/ctk"}]"#,
            "createContainer /usr/bin/ctk",
        ),
        (
            r#""hooks": [{"hookName": "poststop", "path": "/h"}]"#,
            "poststop /h",
        ),
        (
            r#""hooks": [{"hookName": "startContainer", "path": "h"}]"#,
            "startContainer",
        ),
        (
            r#""deviceNodes": [{"path": "/dev/nvidia0", "type": "c", "major": 195}]"#,
            "/dev/nvidia0",
        ),
        (
            r#""deviceNodes": [{"path": "/dev/x", "type": "p"}]"#,
            "named pipe",
        ),
        (
            r#""deviceNodes": [{"path": "/dev/null", "type": "b"}]"#,
            "/dev/null",
        ),
        (
            r#""deviceNodes": [{"path": "/dev/null", "major": 1, "minor": 5}]"#,
            "1:3",
        ),
        (
            r#""deviceNodes": [{"path": "/dev/../x"}]"#,
            "container_path",
        ),
        (
            r#""deviceNodes": [{"path": "/dev/x", "hostPath": "/dev/../x"}]"#,
            "/dev/../x",
        ),
        (
            r#""mounts": [{"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs"}]"#,
            "tmpfs",
        ),
        (
            r#""mounts": [{"hostPath": "a", "containerPath": "/t"}]"#,
            "host_path",
        ),
        (
            r#""mounts": [{"hostPath": "/a", "containerPath": "/proc"}]"#,
            "/proc",
        ),
        (
            r#""mounts": [{"hostPath": "/a", "containerPath": "/t", "options": ["rshared"]}]"#,
            "bidirectional",
        ),
        (
            r#""mounts": [{"hostPath": "/a", "containerPath": "/t", "options": ["noatime"]}]"#,
            "noatime",
        ),
    ];
    for (edits, word) in table {
        let error = with(edits, container_spec()).unwrap_err();
        let text = bulkhead_text::chain(&error);
        assert!(text.starts_with("CDI device v.com/c=d: "), "{text}");
        assert!(text.contains(word), "{word}: {text}");
    }
}
