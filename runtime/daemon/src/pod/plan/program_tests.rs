// SPDX-License-Identifier: Apache-2.0
//! Tests of [`super`]: what Kubernetes' tables of command, arguments, users and variables say.

use super::*;

fn spec() -> ContainerSpec {
    crate::pod::fixtures::container_spec()
}

fn image() -> ImageDefaults {
    ImageDefaults {
        entrypoint: vec!["entry".into()],
        cmd: vec!["cmd".into()],
        env: vec!["FROM_IMAGE=yes".into(), "PATH=/image".into()],
        working_dir: "/image".into(),
        user: "www-data:1004".into(),
        ..ImageDefaults::default()
    }
}

fn process(spec: &ContainerSpec) -> protocol::Process {
    describe("id", spec, &image(), "host")
        .unwrap()
        .process
        .unwrap()
}

#[test]
fn command_and_args_replace_entrypoint_and_cmd_as_kubernetes_says() {
    for (command, args, expected) in [
        (&[][..], &[][..], &["entry", "cmd"][..]),
        (&[], &["a"], &["entry", "a"]),
        (&["c"], &[], &["c"]),
        (&["c"], &["a"], &["c", "a"]),
    ] {
        let mut spec = spec();
        spec.command = command.iter().map(ToString::to_string).collect();
        spec.args = args.iter().map(ToString::to_string).collect();
        assert_eq!(process(&spec).args, expected, "{command:?} {args:?}");
    }
    let nothing = describe("id", &spec(), &ImageDefaults::default(), "host");
    assert!(matches!(nothing, Err(ProgramError::NoCommand(_))));
}

#[test]
fn the_containers_variables_win_over_the_images_by_name() {
    let mut spec = spec();
    spec.environment = vec![
        ("FROM_IMAGE".into(), b"no".to_vec()),
        ("BYTES".into(), vec![0xff, b'=']),
    ];
    let env: Vec<Vec<u8>> = process(&spec)
        .env
        .iter()
        .map(|line| line.to_vec())
        .collect();
    assert_eq!(
        env,
        [
            b"PATH=/image".to_vec(),
            b"HOSTNAME=host".to_vec(),
            b"FROM_IMAGE=no".to_vec(),
            b"BYTES=\xff=".to_vec(),
        ]
    );
    for bad in [("", &b"x"[..]), ("A=B", b"x"), ("A", b"x\0")] {
        spec.environment = vec![(bad.0.into(), bad.1.to_vec())];
        assert!(describe("id", &spec, &image(), "host").is_err(), "{bad:?}");
    }
}

/// Issue 13, point 5: with a search for each variable this takes hours, so it never passes.
#[test]
fn the_work_for_a_million_variables_is_linear() {
    let mut image = image();
    image.env = (0..1_000_000).map(|number| format!("V{number}=")).collect();
    let mut spec = spec();
    spec.environment = vec![("V999999".into(), b"last".to_vec())];
    let env = environment(&spec, &image, "host").unwrap();
    // PATH and HOSTNAME are before them.
    assert_eq!(env.len(), 1_000_002);
    assert_eq!(env.last().unwrap().as_ref(), b"V999999=last");
}

#[test]
fn a_users_number_wins_over_names_and_a_group_alone_keeps_the_images_user() {
    for (uid, gid, name, expected) in [
        (None, None, "", "www-data:1004"),
        (None, Some(5), "", "www-data:1004"),
        (Some(7), None, "", ""),
        (None, None, "nobody", "nobody"),
    ] {
        let mut spec = spec();
        spec.security.user.uid = uid;
        spec.security.user.gid = gid;
        spec.security.user.name = name.to_owned();
        let user = process(&spec).user.unwrap();
        assert_eq!(
            (user.name.as_str(), user.uid, user.gid),
            (expected, uid, gid)
        );
    }
}

#[test]
fn the_working_directory_is_the_images_unless_given() {
    assert_eq!(process(&spec()).cwd, "/image");
    let mut spec = spec();
    spec.working_directory = "/own".into();
    assert_eq!(process(&spec).cwd, "/own");
}

#[test]
fn a_privileged_container_has_all_capabilities_and_no_filter() {
    let mut spec = spec();
    spec.security.privileged = true;
    let request = describe("id", &spec, &image(), "host").unwrap();
    assert_eq!(request.process.unwrap().capabilities.len(), 41);
    assert_eq!(
        request.seccomp.unwrap().kind(),
        protocol::seccomp::Kind::Unconfined
    );
}

#[test]
fn an_ambient_capability_is_among_the_others_too() {
    let mut spec = spec();
    spec.security.ambient_capabilities = vec!["NET_ADMIN".into()];
    let process = process(&spec);
    assert_eq!(process.ambient_capabilities, ["CAP_NET_ADMIN"]);
    assert!(process.capabilities.contains(&"CAP_NET_ADMIN".to_owned()));
}

#[test]
fn negative_limits_of_memory_and_quota_mean_none_and_others_are_refused() {
    let mut limits = Resources {
        cpu_quota_us: -1,
        ..Default::default()
    };
    assert!(resources(&limits).is_ok());
    // kubelet subtracts the overhead even from -1, which means "no limit".
    limits.memory_limit_bytes = -1 - (180 << 20);
    assert_eq!(resources(&limits).unwrap().memory_limit_bytes, -1);
    limits.cpu_shares = -1;
    assert!(resources(&limits).is_err());
}

#[test]
fn hooks_and_owners_of_devices_are_passed_on_and_owners_only_if_something_is_set() {
    let mut spec = spec();
    let device = |owner| Device {
        container_path: "/dev/x".into(),
        guest_path: "/dev/null".into(),
        permissions: "r".into(),
        owner,
    };
    let group = NodeOwner {
        gid: Some(5),
        ..NodeOwner::default()
    };
    spec.devices = vec![device(NodeOwner::default()), device(group)];
    let hook = |timeout| StartHook {
        path: "/h".into(),
        args: vec!["h".into()],
        environment: vec!["A=b".into()],
        timeout,
    };
    let seconds = |seconds| Some(std::time::Duration::from_secs(seconds));
    spec.start_hooks = vec![hook(None), hook(seconds(2)), hook(seconds(u64::MAX))];
    let request = describe("id", &spec, &image(), "host").unwrap();
    let ownership = protocol::Ownership {
        mode: 0o666,
        uid: 0,
        gid: 5,
    };
    let owners: Vec<_> = request.devices.iter().map(|one| one.ownership).collect();
    assert_eq!(owners, [None, Some(ownership)]);
    let timeouts: Vec<_> = request
        .start_hooks
        .iter()
        .map(|hook| hook.timeout_milliseconds)
        .collect();
    assert_eq!(timeouts, [0, 2000, u32::MAX]);
    assert_eq!(request.start_hooks[0].env, ["A=b"]);
}
