// SPDX-License-Identifier: Apache-2.0
//! Examples for tests.

use super::life::record::{ContainerRecord, PodRecord};
use super::life::signal::SIGTERM;
use super::life::spec::{
    ContainerSpec, Labels, Mount, MountOptions, MountSource, MountWords, PidMode, PodName, PodSpec,
    Propagation, Resources, Seccomp, Security, User,
};
use super::life::state::{ContainerState, PodState};

pub fn container_spec() -> ContainerSpec {
    ContainerSpec {
        name: "main".into(),
        attempt: 0,
        image: "example/image".into(),
        user_image: String::new(),
        image_words: Default::default(),
        command: Vec::new(),
        args: Vec::new(),
        working_directory: String::new(),
        environment: Vec::new(),
        labels: Labels::new(),
        annotations: Labels::new(),
        log_path: String::new(),
        mounts: Vec::new(),
        devices: Vec::new(),
        block_devices: Vec::new(),
        cdi_devices: Vec::new(),
        start_hooks: Vec::new(),
        stdin: false,
        stdin_once: false,
        tty: false,
        security: Security {
            privileged: false,
            add_capabilities: Vec::new(),
            drop_capabilities: Vec::new(),
            ambient_capabilities: Vec::new(),
            user: User::default(),
            no_new_privileges: false,
            readonly_root: false,
            masked_paths: Vec::new(),
            readonly_paths: Vec::new(),
            seccomp: Seccomp::RuntimeDefault,
            pid: PidMode::Container,
            users: None,
        },
        resources: Resources::default(),
        stop_signal: None,
    }
}

/// A mount of a host path at `container_path`.
pub fn mount(container_path: &str) -> Mount {
    Mount {
        container_path: container_path.into(),
        source: MountSource::Host("/srv".into()),
        readonly: false,
        recursive_readonly: false,
        propagation: Propagation::Private,
        options: MountOptions::default(),
        users: None,
        words: MountWords::default(),
    }
}

pub fn pod_spec() -> PodSpec {
    PodSpec {
        name: PodName {
            name: "pod".into(),
            namespace: "tests".into(),
            uid: "uid".into(),
            attempt: 0,
        },
        hostname: "host".into(),
        log_directory: String::new(),
        dns: None,
        port_mappings: Vec::new(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        annotations: Labels::new(),
        runtime_handler: String::new(),
        pid: PidMode::Container,
        privileged: false,
        users: None,
        sysctls: std::collections::BTreeMap::new(),
        limits: super::life::spec::PodLimits::default(),
    }
}

/// A pod that is ready and holds nothing.
pub fn pod_record() -> PodRecord {
    PodRecord {
        state: PodState::Ready,
        ..PodRecord::new("pod".into(), 1, pod_spec())
    }
}

/// A container of [`pod_record`] that has not been started.
pub fn container_record() -> ContainerRecord {
    ContainerRecord {
        id: "container".into(),
        pod_id: "pod".into(),
        spec: container_spec(),
        state: ContainerState::Created,
        created_at: 1,
        image_id: String::new(),
        image_name: String::new(),
        image_ref: String::new(),
        stop_signal: SIGTERM,
        log_path: None,
        user: None,
        first_id: None,
        is_waiting: false,
        termination_log: None,
        empty_dirs: std::collections::BTreeMap::new(),
        volumes: std::collections::BTreeMap::new(),
    }
}
