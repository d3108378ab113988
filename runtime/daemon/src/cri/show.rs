// SPDX-License-Identifier: Apache-2.0
//! Converts our records to CRI's messages.

use bulkhead_proto::cri;

use crate::pod::View;
use crate::pod::life::record::{ContainerRecord, PodRecord};
use crate::pod::life::spec::{
    IdRange, ImageWords, Mount, MountOptions, MountSource, PidMode, Propagation, Resources,
    UserNamespace,
};
use crate::pod::life::state::{ContainerState, PodState};

pub fn pod_state(state: &PodState) -> cri::PodSandboxState {
    match state {
        PodState::Ready => cri::PodSandboxState::SandboxReady,
        PodState::Creating | PodState::Stopping | PodState::NotReady { .. } => {
            cri::PodSandboxState::SandboxNotready
        }
    }
}

pub fn container_state(state: &ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Created => cri::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited(_) => cri::ContainerState::ContainerExited,
    }
}

pub fn pod_metadata(pod: &PodRecord) -> cri::PodSandboxMetadata {
    let name = &pod.spec.name;
    cri::PodSandboxMetadata {
        name: name.name.clone(),
        uid: name.uid.clone(),
        namespace: name.namespace.clone(),
        attempt: name.attempt,
    }
}

/// An item of `ListPodSandbox`.
pub fn pod(pod: &PodRecord) -> cri::PodSandbox {
    cri::PodSandbox {
        id: pod.id.clone(),
        metadata: Some(pod_metadata(pod)),
        state: pod_state(&pod.state).into(),
        created_at: pod.created_at,
        labels: pod.spec.labels.clone().into_iter().collect(),
        annotations: pod.spec.annotations.clone().into_iter().collect(),
        runtime_handler: pod.spec.runtime_handler.clone(),
    }
}

pub fn pod_status(pod: &PodRecord) -> cri::PodSandboxStatus {
    let address = |cidr: &String| cidr.split('/').next().unwrap_or_default().to_owned();
    let mut addresses = pod.held_addresses().iter().map(address);
    let options = cri::NamespaceOption {
        network: cri::NamespaceMode::Pod.into(),
        pid: pid_mode(&pod.spec.pid).into(),
        ipc: cri::NamespaceMode::Pod.into(),
        userns_options: pod.spec.users.map(users),
        ..Default::default()
    };
    cri::PodSandboxStatus {
        id: pod.id.clone(),
        metadata: Some(pod_metadata(pod)),
        state: pod_state(&pod.state).into(),
        created_at: pod.created_at,
        network: Some(cri::PodSandboxNetworkStatus {
            ip: addresses.next().unwrap_or_default(),
            additional_ips: addresses.map(|ip| cri::PodIp { ip }).collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(options),
            }),
        }),
        labels: pod.spec.labels.clone().into_iter().collect(),
        annotations: pod.spec.annotations.clone().into_iter().collect(),
        runtime_handler: pod.spec.runtime_handler.clone(),
    }
}

fn users(users: UserNamespace) -> cri::UserNamespace {
    let mapping = |range: IdRange| cri::IdMapping {
        host_id: range.first,
        container_id: 0,
        length: range.length,
    };
    cri::UserNamespace {
        mode: cri::NamespaceMode::Pod.into(),
        uids: vec![mapping(users.uids)],
        gids: vec![mapping(users.gids)],
    }
}

fn pid_mode(mode: &PidMode) -> cri::NamespaceMode {
    match mode {
        PidMode::Pod => cri::NamespaceMode::Pod,
        PidMode::Container => cri::NamespaceMode::Container,
        PidMode::Node => cri::NamespaceMode::Node,
        PidMode::Target(_) => cri::NamespaceMode::Target,
    }
}

pub fn container_metadata(container: &ContainerRecord) -> cri::ContainerMetadata {
    cri::ContainerMetadata {
        name: container.spec.name.clone(),
        attempt: container.spec.attempt,
    }
}

fn image(container: &ContainerRecord) -> cri::ImageSpec {
    let spec = &container.spec;
    image_spec(container.image_name(), &spec.user_image, &spec.image_words)
}

/// An image with what the client said about it.
fn image_spec(image: &str, user_image: &str, words: &ImageWords) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        annotations: words.annotations.clone().into_iter().collect(),
        user_specified_image: user_image.to_owned(),
        runtime_handler: words.runtime_handler.clone(),
        image_ref: String::new(),
    }
}

/// An item of `ListContainers`.
pub fn container(container: &ContainerRecord) -> cri::Container {
    cri::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.pod_id.clone(),
        metadata: Some(container_metadata(container)),
        image: Some(image(container)),
        image_ref: container.image_ref.clone(),
        state: container_state(&container.state).into(),
        created_at: container.created_at,
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
        image_id: container.image_id.clone(),
    }
}

pub fn container_status(container: &ContainerRecord) -> cri::ContainerStatus {
    let mut status = cri::ContainerStatus {
        id: container.id.clone(),
        metadata: Some(container_metadata(container)),
        state: container_state(&container.state).into(),
        created_at: container.created_at,
        image: Some(image(container)),
        image_ref: container.image_ref.clone(),
        image_id: container.image_id.clone(),
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
        log_path: container
            .log_path
            .as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default(),
        resources: Some(cri::ContainerResources {
            linux: Some(resources(&container.spec.resources)),
            windows: None,
        }),
        mounts: container.spec.mounts.iter().map(mount).collect(),
        user: user(container),
        stop_signal: stop_signal(container.stop_signal).into(),
        ..Default::default()
    };
    match &container.state {
        ContainerState::Created => {}
        ContainerState::Running { started_at, .. } => status.started_at = *started_at,
        ContainerState::Exited(exit) => {
            status.started_at = exit.started_at;
            status.finished_at = exit.finished_at;
            status.exit_code = exit.code;
            exit.reason.word().clone_into(&mut status.reason);
            status.message.clone_from(&exit.message);
        }
    }
    status
}

fn mount_options(options: MountOptions) -> Vec<String> {
    let all = [
        (options.no_exec, "noexec"),
        (options.no_suid, "nosuid"),
        (options.no_dev, "nodev"),
    ];
    let wanted = all.into_iter().filter(|(is_set, _)| *is_set);
    wanted.map(|(_, name)| name.to_owned()).collect()
}

/// A mount as the client asked for it. For an image, also the id of the image that was found.
fn mount(mount: &Mount) -> cri::Mount {
    let words = &mount.words;
    let users = mount.users.map(users).unwrap_or_default();
    let asked = Some(&words.container_path).filter(|path| !path.is_empty());
    let mut shown = cri::Mount {
        container_path: asked.unwrap_or(&mount.container_path).clone(),
        selinux_relabel: words.selinux_relabel,
        uid_mappings: users.uids,
        gid_mappings: users.gids,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_readonly,
        propagation: match mount.propagation {
            Propagation::Private => cri::MountPropagation::PropagationPrivate,
            Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        }
        .into(),
        mount_options: mount_options(mount.options),
        ..Default::default()
    };
    match &mount.source {
        MountSource::Host(path) => shown.host_path = path.display().to_string(),
        MountSource::Image {
            image,
            sub_path,
            id,
        } => {
            shown.image = Some(cri::ImageSpec {
                image_ref: id.clone(),
                ..image_spec(image, &words.user_image, &words.image)
            });
            shown.image_sub_path.clone_from(sub_path);
        }
    }
    shown
}

/// The user of a container's process. User names are looked up in the guest at the start, so before that the user is
/// known only if it was given as a number.
fn user(container: &ContainerRecord) -> Option<cri::ContainerUser> {
    if let Some(user) = &container.user {
        return Some(cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user.groups.iter().copied().map(i64::from).collect(),
            }),
        });
    }
    let user = &container.spec.security.user;
    Some(cri::ContainerUser {
        linux: Some(cri::LinuxContainerUser {
            uid: user.uid?,
            gid: user.gid.unwrap_or(0),
            supplemental_groups: user.supplemental_groups.clone(),
        }),
    })
}

fn resources(limits: &Resources) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: limits.cpu_period_us,
        cpu_quota: limits.cpu_quota_us,
        cpu_shares: limits.cpu_shares,
        memory_limit_in_bytes: limits.memory_limit_bytes,
        oom_score_adj: limits.oom_score_adj,
        cpuset_cpus: limits.cpuset_cpus.clone(),
        cpuset_mems: limits.cpuset_mems.clone(),
        hugepage_limits: limits
            .hugepage_limits
            .iter()
            .map(|(page_size, limit)| cri::HugepageLimit {
                page_size: page_size.clone(),
                limit: *limit,
            })
            .collect(),
        unified: limits.unified.clone().into_iter().collect(),
        memory_swap_limit_in_bytes: limits.memory_swap_limit_bytes,
    }
}

fn stop_signal(number: i32) -> cri::Signal {
    (1..=65)
        .filter_map(|value| cri::Signal::try_from(value).ok())
        .find(|signal| super::parse::signal_number(*signal).ok() == Some(number))
        .unwrap_or(cri::Signal::RuntimeDefault)
}

/// All containers of a pod.
pub fn container_statuses(view: &View) -> Vec<cri::ContainerStatus> {
    view.containers.values().map(container_status).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::parse_mounts::mounts;
    use crate::pod::fixtures;

    #[test]
    fn mounts_are_shown_as_they_were_asked_for() {
        let mapping = || {
            vec![cri::IdMapping {
                host_id: 65536,
                container_id: 0,
                length: 65536,
            }]
        };
        let plain = cri::Mount {
            container_path: "data//x/".into(),
            host_path: "/srv".into(),
            readonly: true,
            selinux_relabel: true,
            propagation: cri::MountPropagation::PropagationHostToContainer.into(),
            uid_mappings: mapping(),
            gid_mappings: mapping(),
            ..Default::default()
        };
        let recursive = cri::Mount {
            container_path: "/r".into(),
            host_path: "/srv/..".into(),
            readonly: true,
            recursive_read_only: true,
            ..Default::default()
        };
        let image = cri::Mount {
            container_path: "/image".into(),
            readonly: true,
            image: Some(cri::ImageSpec {
                image: "sha256:1".into(),
                annotations: [("a".to_owned(), "b".to_owned())].into(),
                user_specified_image: "busybox".into(),
                runtime_handler: "bulkhead".into(),
                image_ref: String::new(),
            }),
            image_sub_path: "etc".into(),
            ..Default::default()
        };
        let asked = vec![plain, recursive, image];
        let parsed = mounts(asked.clone()).unwrap();
        // Nothing may get lost when a record is stored and loaded.
        let json = serde_json::to_string(&parsed).unwrap();
        let kept: Vec<Mount> = serde_json::from_str(&json).unwrap();
        let shown: Vec<_> = kept.iter().map(mount).collect();
        assert_eq!(shown, asked);
    }

    #[test]
    fn a_containers_image_is_shown_as_it_was_asked_for() {
        let mut record = fixtures::container_record();
        record.spec.image_words.runtime_handler = "bulkhead".into();
        record.spec.image_words.annotations = [("a".to_owned(), "b".to_owned())].into();
        record.spec.user_image = "busybox".into();
        let image = container_status(&record).image.unwrap();
        assert_eq!(image.image, record.spec.image, "in a record without a name");
        assert_eq!(image.user_specified_image, "busybox");
        assert_eq!(image.runtime_handler, "bulkhead");
        assert_eq!(image.annotations["a"], "b");
        assert_eq!(container(&record).image, Some(image));
        record.image_name = "docker.io/library/busybox:latest".into();
        assert_eq!(container(&record).image.unwrap().image, record.image_name);
    }
}
