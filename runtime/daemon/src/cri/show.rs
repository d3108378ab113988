// SPDX-License-Identifier: Apache-2.0
//! Our records in CRI's messages.

use bulkhead_proto::cri;

use crate::pod::View;
use crate::pod::record::{ContainerRecord, PodRecord};
use crate::pod::spec::{
    IdRange, Mount, MountSource, PidMode, Propagation, Resources, UserNamespace,
};
use crate::pod::state::{ContainerState, PodState};

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

/// A row of `ListPodSandbox`.
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
    cri::ImageSpec {
        image: container.spec.image.clone(),
        user_specified_image: container.spec.user_image.clone(),
        ..Default::default()
    }
}

/// A row of `ListContainers`.
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

fn mount(mount: &Mount) -> cri::Mount {
    let mut shown = cri::Mount {
        container_path: mount.container_path.clone(),
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_readonly,
        propagation: match mount.propagation {
            Propagation::Private => cri::MountPropagation::PropagationPrivate,
            Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        }
        .into(),
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
                image: image.clone(),
                image_ref: id.clone(),
                ..Default::default()
            });
            shown.image_sub_path.clone_from(sub_path);
        }
    }
    shown
}

/// Names are looked up in the guest: before the start it is known only where the pod said it in numbers.
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
