// SPDX-License-Identifier: Apache-2.0
//! Tests of [`super`]: what is refused, and what the defaults are.

use bulkhead_proto::cri::security_profile::ProfileType;

use super::*;
use crate::cri::parse_security::{check_privileged, check_users};
use crate::pod::life::spec::{PidMode, Seccomp};

fn pod_config() -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "pod".into(),
            uid: "uid".into(),
            namespace: "ns".into(),
            attempt: 0,
        }),
        ..Default::default()
    }
}

fn container_config() -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "main".into(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: "busybox".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn with_context(
    change: impl FnOnce(&mut cri::LinuxContainerSecurityContext),
) -> Result<ContainerSpec, ParseError> {
    let mut context = cri::LinuxContainerSecurityContext::default();
    change(&mut context);
    let mut config = container_config();
    config.linux = Some(cri::LinuxContainerConfig {
        security_context: Some(context),
        ..Default::default()
    });
    container(Some(config))
}

#[test]
fn an_apparmor_profile_is_refused_only_if_it_was_asked_for_by_name() {
    let kinds = [ProfileType::RuntimeDefault, ProfileType::Unconfined];
    for kind in kinds {
        let profile = cri::SecurityProfile {
            profile_type: kind.into(),
            ..Default::default()
        };
        assert!(
            with_context(|c| c.apparmor = Some(profile)).is_ok(),
            "{kind:?}"
        );
    }
    let named = |name: &str| with_context(|c| c.apparmor_profile = name.into());
    for name in ["", "runtime/default", "unconfined"] {
        assert!(named(name).is_ok(), "{name}");
    }
    let error = named("localhost/strict").unwrap_err();
    assert!(matches!(error, ParseError::NotYet { .. }), "{error}");
    for name in ["strict", "docker/default"] {
        let error = named(name).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let profile = cri::SecurityProfile {
        profile_type: 7,
        ..Default::default()
    };
    let error = with_context(|c| c.apparmor = Some(profile)).unwrap_err();
    assert!(matches!(error, ParseError::Wrong { .. }), "{error}");
}

#[test]
fn a_pod_needs_its_name_namespace_and_uid() {
    type Change = fn(&mut cri::PodSandboxMetadata);
    let changes: [Change; 3] = [
        |m| m.name.clear(),
        |m| m.namespace.clear(),
        |m| m.uid.clear(),
    ];
    for change in changes {
        let mut config = pod_config();
        change(config.metadata.as_mut().unwrap());
        let error = pod(Some(config), String::new()).unwrap_err();
        assert!(error.to_string().contains("metadata"), "{error}");
    }
    assert!(pod(None, String::new()).is_err());
    assert!(pod(Some(pod_config()), "bulkhead".into()).is_ok());
    assert!(matches!(
        pod(Some(pod_config()), "runc".into()),
        Err(ParseError::Handler(_))
    ));
}

#[test]
fn the_hosts_network_and_ipc_are_refused_for_pods_and_containers() {
    let node = cri::NamespaceMode::Node.into();
    for options in [
        cri::NamespaceOption {
            network: node,
            ..Default::default()
        },
        cri::NamespaceOption {
            ipc: node,
            ..Default::default()
        },
    ] {
        let mut config = pod_config();
        config.linux = Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(options.clone()),
                ..Default::default()
            }),
            ..Default::default()
        });
        let refused = pod(Some(config), String::new());
        assert!(matches!(refused, Err(ParseError::NotIsolated { .. })));
        let refused = with_context(|context| context.namespace_options = Some(options));
        assert!(matches!(refused, Err(ParseError::NotIsolated { .. })));
    }
}

#[test]
fn absent_namespace_options_mean_those_of_the_pod() {
    let bare = |context| {
        let mut config = pod_config();
        config.linux = Some(cri::LinuxPodSandboxConfig {
            security_context: context,
            ..Default::default()
        });
        pod(Some(config), String::new()).unwrap()
    };
    let absent = [None, Some(cri::LinuxSandboxSecurityContext::default())];
    for context in absent {
        let spec = bare(context);
        assert_eq!((spec.pid, spec.users), (PidMode::Pod, None));
    }
    assert_eq!(
        pod(Some(pod_config()), String::new()).unwrap().pid,
        PidMode::Pod
    );
    let spec = container(Some(container_config())).unwrap();
    assert_eq!(spec.security.pid, PidMode::Pod);
    let spec = with_context(|_| {}).unwrap();
    assert_eq!(spec.security.pid, PidMode::Pod);
    let options = cri::NamespaceOption {
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    };
    let spec = with_context(|context| context.namespace_options = Some(options)).unwrap();
    assert_eq!(spec.security.pid, PidMode::Container);
}

fn with_sandbox_context(
    change: impl FnOnce(&mut cri::LinuxSandboxSecurityContext),
) -> Result<PodSpec, ParseError> {
    let mut context = cri::LinuxSandboxSecurityContext::default();
    change(&mut context);
    let mut config = pod_config();
    config.linux = Some(cri::LinuxPodSandboxConfig {
        security_context: Some(context),
        ..Default::default()
    });
    pod(Some(config), String::new())
}

#[test]
fn a_sandboxs_group_needs_a_user() {
    let value = |value| Some(cri::Int64Value { value });
    let error = with_sandbox_context(|context| context.run_as_group = value(5)).unwrap_err();
    assert!(error.to_string().contains("run_as_user"), "{error}");
    assert!(with_sandbox_context(|context| context.run_as_user = value(-1)).is_err());
    assert!(with_sandbox_context(|context| context.supplemental_groups = vec![1 << 32]).is_err());
    assert!(
        with_sandbox_context(|context| {
            context.run_as_user = value(0);
            context.run_as_group = value(5);
        })
        .is_ok()
    );
}

#[test]
fn a_privileged_container_needs_a_privileged_sandbox() {
    let plain = with_sandbox_context(|_| {}).unwrap();
    let privileged = with_sandbox_context(|context| context.privileged = true).unwrap();
    let container = |wanted| with_context(|context| context.privileged = wanted).unwrap();
    for (pod, wanted, taken) in [
        (&plain, false, true),
        (&plain, true, false),
        (&privileged, false, true),
        (&privileged, true, true),
    ] {
        assert_eq!(check_privileged(pod, &container(wanted)).is_ok(), taken);
    }
    let error = check_privileged(&plain, &container(true)).unwrap_err();
    assert!(error.to_string().contains("\"main\""), "{error}");
    // Records of an earlier version lack the field. Those pods may have privileged containers.
    let mut stored = serde_json::to_value(&plain).unwrap();
    stored.as_object_mut().unwrap().remove("privileged");
    let stored: PodSpec = serde_json::from_value(stored).unwrap();
    assert!(stored.privileged);
}

#[test]
fn a_containers_image_is_for_a_handler_that_is_there() {
    for (handler, taken) in [("", true), ("bulkhead", true), ("runc", false)] {
        let mut config = container_config();
        config.image.as_mut().unwrap().runtime_handler = handler.into();
        let parsed = container(Some(config));
        assert_eq!(parsed.is_ok(), taken, "{handler}");
        if let Ok(spec) = parsed {
            assert_eq!(spec.image_words.runtime_handler, handler);
        }
    }
}

fn with_users(change: impl FnOnce(&mut cri::UserNamespace)) -> Result<PodSpec, ParseError> {
    let mapping = cri::IdMapping {
        host_id: 65536,
        container_id: 0,
        length: 65536,
    };
    let mut users = cri::UserNamespace {
        mode: cri::NamespaceMode::Pod.into(),
        uids: vec![mapping],
        gids: vec![mapping],
    };
    change(&mut users);
    let mut config = pod_config();
    config.linux = Some(cri::LinuxPodSandboxConfig {
        security_context: Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(cri::NamespaceOption {
                userns_options: Some(users),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    pod(Some(config), String::new())
}

#[test]
fn users_of_a_pod_are_one_range_from_zero_and_its_containers_are_theirs() {
    let spec = with_users(|_| {}).unwrap();
    assert_eq!(spec.users.unwrap().gids.first, 65536);
    let node = with_users(|users| {
        *users = cri::UserNamespace {
            mode: cri::NamespaceMode::Node.into(),
            ..Default::default()
        };
    });
    assert_eq!(node.unwrap().users, None);
    type Change = fn(&mut cri::UserNamespace);
    let changes: [Change; 7] = [
        |users| users.uids.clear(),
        |users| users.gids.extend_from_within(..),
        |users| users.uids[0].container_id = 1,
        |users| users.uids[0].length = 0,
        |users| users.gids[0].length = u32::MAX,
        |users| users.mode = cri::NamespaceMode::Container.into(),
        |users| users.mode = cri::NamespaceMode::Target.into(),
    ];
    for change in changes {
        assert!(matches!(with_users(change), Err(ParseError::Wrong { .. })));
    }

    let mut container = container(Some(container_config())).unwrap();
    check_users(&spec, &container).unwrap();
    container.security.users = spec.users;
    check_users(&spec, &container).unwrap();
    let other = pod(Some(pod_config()), String::new()).unwrap();
    assert!(check_users(&other, &container).is_err());

    container.security.users = None;
    container
        .block_devices
        .push(crate::pod::life::spec::BlockDevice {
            path: "/dev/sdx".into(),
            container_path: "/dev/x".into(),
            permissions: "rw".into(),
            owner: Default::default(),
            number: None,
        });
    check_users(&other, &container).unwrap();
    let refused = check_users(&spec, &container).unwrap_err().to_string();
    assert!(refused.contains("/dev/sdx"), "{refused}");
}

#[test]
fn cdi_devices_are_named_in_the_field_and_in_annotations() {
    let mut config = container_config();
    config.cdi_devices = vec![cri::CdiDevice {
        name: "vendor.com/gpu=0".into(),
    }];
    let annotation = ("cdi.k8s.io/x".to_owned(), "vendor.com/gpu=1".to_owned());
    config.annotations.extend([annotation]);
    let spec = container(Some(config)).unwrap();
    assert_eq!(spec.cdi_devices, ["vendor.com/gpu=0", "vendor.com/gpu=1"]);
    assert!(spec.annotations.contains_key("cdi.k8s.io/x"));
}

#[test]
fn without_a_security_context_the_usual_paths_are_hidden_and_with_one_the_given() {
    let spec = container(Some(container_config())).unwrap();
    assert!(
        spec.security
            .masked_paths
            .contains(&"/proc/kcore".to_owned())
    );
    assert!(
        spec.security
            .readonly_paths
            .contains(&"/proc/sys".to_owned())
    );
    let given = with_context(|context| context.masked_paths = vec!["/x".into()]).unwrap();
    assert_eq!(given.security.masked_paths, ["/x"]);
    let privileged = with_context(|context| {
        context.privileged = true;
        context.masked_paths = vec!["/x".into()];
    });
    assert!(privileged.unwrap().security.masked_paths.is_empty());
}

#[test]
fn users_are_numbers_that_fit_and_a_group_needs_a_user() {
    let value = |value| Some(cri::Int64Value { value });
    assert!(with_context(|context| context.run_as_user = value(-1)).is_err());
    assert!(with_context(|context| context.run_as_user = value(1 << 32)).is_err());
    assert!(with_context(|context| context.run_as_group = value(5)).is_err());
    assert!(
        with_context(|context| {
            context.run_as_user = value(0);
            context.run_as_group = value(5);
        })
        .is_ok()
    );
}

#[test]
fn seccomp_profiles_are_read_from_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("profile.json");
    std::fs::write(&path, r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
    let path = path.to_str().unwrap();
    let localhost = |path: &str| cri::SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: path.into(),
    };
    let read = with_context(|context| context.seccomp = Some(localhost(path))).unwrap();
    assert!(matches!(read.security.seccomp, Seccomp::Profile(_)));
    let old = with_context(|context| context.seccomp_profile_path = format!("localhost/{path}"));
    assert!(matches!(old.unwrap().security.seccomp, Seccomp::Profile(_)));
    for bad in ["relative.json", "/no/such/profile", "/etc/hostname"] {
        assert!(
            with_context(|context| context.seccomp = Some(localhost(bad))).is_err(),
            "{bad}"
        );
    }
}

#[test]
fn an_selinux_label_that_names_a_policy_is_refused() {
    for (user, role, kind, level, is_refused) in [
        ("", "", "", "", false),
        ("", "", "", "s0:c1,c2", false),
        ("", "", "spc_t", "s0", false),
        ("", "", "strict_t", "", true),
        ("system_u", "", "", "", true),
        ("", "system_r", "spc_t", "", true),
    ] {
        let parsed = with_context(|context| {
            context.selinux_options = Some(cri::SeLinuxOption {
                user: user.into(),
                role: role.into(),
                r#type: kind.into(),
                level: level.into(),
            });
        });
        assert_eq!(parsed.is_err(), is_refused, "{user}:{role}:{kind}:{level}");
        if let Err(error) = parsed {
            assert!(error.to_string().contains("SELinux"), "{error}");
        }
    }
}

#[test]
fn every_signal_of_cri_has_a_number() {
    for value in 1..=65 {
        let signal = cri::Signal::try_from(value).unwrap();
        let number = signal_number(signal).unwrap();
        assert!((1..=64).contains(&number), "{}", signal.as_str_name());
    }
    assert_eq!(signal_number(cri::Signal::Sigrtminplus3).unwrap(), 37);
    assert_eq!(signal_number(cri::Signal::Sigrtmaxminus1).unwrap(), 63);
}

#[test]
fn host_names_that_linux_would_refuse_are_refused() {
    for (name, good) in [
        ("web-0.example", true),
        ("", true),
        ("a b", false),
        ("a/b", false),
    ] {
        assert_eq!(hostname(name.to_owned()).is_ok(), good, "{name}");
    }
    assert!(hostname("x".repeat(65)).is_err());
}
