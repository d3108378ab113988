// SPDX-License-Identifier: Apache-2.0
//! Parses CRI's security contexts.
//!
//! A guest has neither AppArmor nor SELinux. AppArmor's default profile is ignored. But a profile that is given by name
//! is refused, because the user relies on it, and so is an SELinux label that names a policy. A label's level alone is
//! accepted: it separates pods from each other, and the VM does that.

use std::io::Read;
use std::path::Path;

use bulkhead_proto::cri;
use bulkhead_proto::cri::security_profile::ProfileType;

use super::refusal::{ParseError, not_yet, wrong};
use crate::pod::life::spec::{
    ContainerSpec, IdRange, PidMode, PodSpec, Seccomp, Security, User, UserNamespace,
};

const PROFILE_BYTES: u64 = 1 << 20;
/// The type of a container that SELinux does not confine.
const SELINUX_UNCONFINED: &str = "spc_t";

/// The paths that are hidden from a container without a security context, as in other runtimes.
pub const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
pub const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

pub fn security(
    context: Option<cri::LinuxContainerSecurityContext>,
) -> Result<Security, ParseError> {
    let strings = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
    let Some(context) = context else {
        return Ok(Security {
            privileged: false,
            add_capabilities: Vec::new(),
            drop_capabilities: Vec::new(),
            ambient_capabilities: Vec::new(),
            user: User::default(),
            no_new_privileges: false,
            readonly_root: false,
            masked_paths: strings(&MASKED_PATHS),
            readonly_paths: strings(&READONLY_PATHS),
            seccomp: Seccomp::Unconfined,
            pid: PidMode::Pod,
            users: None,
        });
    };
    if let Some(name) = apparmor_profile(&context)? {
        return Err(not_yet("AppArmor profile", name));
    }
    if let Some(label) = context.selinux_options.as_ref().and_then(selinux_label) {
        return Err(not_yet("SELinux label", &label));
    }
    if context.run_as_user.is_some() && !context.run_as_username.is_empty() {
        return Err(wrong("a user by number and name", &context.run_as_username));
    }
    let strict = context.supplemental_groups_policy() == cri::SupplementalGroupsPolicy::Strict;
    let user = User {
        uid: context.run_as_user.map(|value| value.value),
        gid: context.run_as_group.map(|value| value.value),
        strict_groups: strict,
        name: context.run_as_username,
        supplemental_groups: context.supplemental_groups,
    };
    check_user(&user)?;
    let namespaces = namespaces(context.namespace_options)?;
    let capabilities = context.capabilities.unwrap_or_default();
    let privileged = context.privileged;
    Ok(Security {
        privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        ambient_capabilities: capabilities.add_ambient_capabilities,
        user,
        no_new_privileges: context.no_new_privs,
        readonly_root: context.readonly_rootfs,
        // As in containerd: the lists as CRI gives them, and empty ones for a privileged container.
        masked_paths: if privileged {
            Vec::new()
        } else {
            context.masked_paths
        },
        readonly_paths: if privileged {
            Vec::new()
        } else {
            context.readonly_paths
        },
        seccomp: seccomp(context.seccomp, &context.seccomp_profile_path)?,
        pid: namespaces.pid,
        users: namespaces.users,
    })
}

/// Checks that a group comes with a user, and that all ids are valid on Linux.
fn check_user(user: &User) -> Result<(), ParseError> {
    if user.gid.is_some() && user.uid.is_none() && user.name.is_empty() {
        return Err(ParseError::Missing(
            "run_as_user, which run_as_group needs,",
        ));
    }
    let numbers = user
        .uid
        .iter()
        .chain(&user.gid)
        .chain(&user.supplemental_groups);
    for number in numbers {
        if u32::try_from(*number).is_err() {
            return Err(wrong("user or group", number));
        }
    }
    Ok(())
}

/// Checks the user of the sandbox's own processes. A pod here has no such process except the pause process, which
/// belongs to the guest. So a valid user has no effect, but what CRI forbids is refused all the same.
pub fn check_sandbox_user(context: &cri::LinuxSandboxSecurityContext) -> Result<(), ParseError> {
    check_user(&User {
        uid: context.run_as_user.map(|user| user.value),
        gid: context.run_as_group.map(|group| group.value),
        supplemental_groups: context.supplemental_groups.clone(),
        ..User::default()
    })
}

/// The AppArmor profile, if one is given by name.
fn apparmor_profile(
    context: &cri::LinuxContainerSecurityContext,
) -> Result<Option<&str>, ParseError> {
    if let Some(profile) = &context.apparmor {
        return match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::Localhost) => Ok(Some(&profile.localhost_ref)),
            Ok(ProfileType::RuntimeDefault | ProfileType::Unconfined) => Ok(None),
            Err(_) => Err(wrong("type of an AppArmor profile", profile.profile_type)),
        };
    }
    // Older kubelets set only this field.
    match context.apparmor_profile.as_str() {
        "" | "runtime/default" | "unconfined" => Ok(None),
        other => match other.strip_prefix("localhost/") {
            Some(name) => Ok(Some(name)),
            None => Err(wrong("AppArmor profile", other)),
        },
    }
}

/// The SELinux label, if it names a policy that is to confine the container.
fn selinux_label(label: &cri::SeLinuxOption) -> Option<String> {
    let is_unconfined = label.r#type == SELINUX_UNCONFINED;
    let kind = if is_unconfined { "" } else { &label.r#type };
    let parts = [label.user.as_str(), &label.role, kind];
    parts
        .iter()
        .any(|part| !part.is_empty())
        .then(|| format!("{}:{}:{kind}:{}", label.user, label.role, label.level))
}

/// The seccomp profile. One that is a file on the host is read here, and its content goes into the guest.
fn seccomp(profile: Option<cri::SecurityProfile>, old: &str) -> Result<Seccomp, ParseError> {
    if let Some(profile) = profile {
        return match profile.profile_type() {
            ProfileType::RuntimeDefault => Ok(Seccomp::RuntimeDefault),
            ProfileType::Unconfined => Ok(Seccomp::Unconfined),
            ProfileType::Localhost => read_profile(&profile.localhost_ref),
        };
    }
    match old {
        "runtime/default" | "docker/default" => Ok(Seccomp::RuntimeDefault),
        // No profile means unconfined, as in other runtimes. kubelet always sets one.
        "" | "unconfined" => Ok(Seccomp::Unconfined),
        other => match other.strip_prefix("localhost/") {
            Some(path) => read_profile(path),
            None => Err(wrong("seccomp profile", other)),
        },
    }
}

/// Reads a seccomp profile from the host. Checks only its size and that it is a JSON object; the agent checks the rest.
fn read_profile(path: &str) -> Result<Seccomp, ParseError> {
    if !Path::new(path).is_absolute() {
        return Err(wrong("seccomp profile path", path));
    }
    let failed = |source| ParseError::Profile {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = Vec::new();
    file.take(PROFILE_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    let is_json = serde_json::from_slice::<serde_json::Value>(&text).is_ok_and(|v| v.is_object());
    if text.len() as u64 > PROFILE_BYTES || !is_json {
        return Err(wrong(
            "seccomp profile that is no JSON object or too long:",
            path,
        ));
    }
    Ok(Seccomp::Profile(text))
}

/// The namespaces that the pod's author can choose.
pub struct Namespaces {
    pub pid: PidMode,
    pub users: Option<UserNamespace>,
}

/// Parses the namespace options. Without options, all namespaces are the pod's, which is CRI's default. Namespaces of
/// the node are refused, except the PID namespace: there the guest's is used.
pub fn namespaces(options: Option<cri::NamespaceOption>) -> Result<Namespaces, ParseError> {
    let options = options.unwrap_or_default();
    if options.network() == cri::NamespaceMode::Node {
        return Err(ParseError::NotIsolated { what: "network" });
    }
    if options.ipc() == cri::NamespaceMode::Node {
        return Err(ParseError::NotIsolated { what: "IPC" });
    }
    let users = options.userns_options.as_ref().map(users).transpose()?;
    let users = users.flatten();
    let pid = match options.pid() {
        cri::NamespaceMode::Pod => PidMode::Pod,
        cri::NamespaceMode::Container => PidMode::Container,
        cri::NamespaceMode::Node if users.is_some() => {
            return Err(wrong("PID namespace NODE with user namespace", "POD"));
        }
        cri::NamespaceMode::Node => PidMode::Node,
        cri::NamespaceMode::Target if options.target_id.is_empty() => {
            return Err(ParseError::Missing("target_id of the namespace options"));
        }
        cri::NamespaceMode::Target => PidMode::Target(options.target_id),
    };
    Ok(Namespaces { pid, users })
}

/// Parses the user namespace. CRI allows one mapping for users and one for groups, both from id 0.
fn users(options: &cri::UserNamespace) -> Result<Option<UserNamespace>, ParseError> {
    match options.mode() {
        cri::NamespaceMode::Node if options.uids.is_empty() && options.gids.is_empty() => Ok(None),
        cri::NamespaceMode::Pod => Ok(Some(UserNamespace {
            uids: id_range(&options.uids)?,
            gids: id_range(&options.gids)?,
        })),
        mode => Err(wrong("user namespace", mode.as_str_name())),
    }
}

pub(super) fn id_range(mappings: &[cri::IdMapping]) -> Result<IdRange, ParseError> {
    let [mapping] = mappings else {
        return Err(wrong(
            "number of ID mappings (it must be 1)",
            mappings.len(),
        ));
    };
    // The range must not include u32::MAX, which means "no change" in system calls.
    let end = mapping.host_id.checked_add(mapping.length);
    if mapping.container_id != 0 || mapping.length == 0 || end.is_none() {
        return Err(wrong("ID mapping", format!("{mapping:?}")));
    }
    Ok(IdRange {
        first: mapping.host_id,
        length: mapping.length,
    })
}

/// Only a privileged pod may have a privileged container. kubelet makes a pod privileged if any of its containers is.
pub fn check_privileged(pod: &PodSpec, container: &ContainerSpec) -> Result<(), ParseError> {
    if container.security.privileged && !pod.privileged {
        return Err(wrong(
            "in a pod sandbox whose security context is not privileged, the privileged container",
            &container.name,
        ));
    }
    Ok(())
}

/// Checks that the user namespace of a container, and the ID mappings of its mounts, are those of its pod.
pub fn check_users(pod: &PodSpec, container: &ContainerSpec) -> Result<(), ParseError> {
    // Kubernetes refuses such pods too: the device's owner would not be mapped, so nobody in the pod could open it.
    let block = container.block_devices.first();
    if let Some(block) = block.filter(|_| pod.users.is_some()) {
        return Err(not_yet(
            "a pod with a user namespace and the block device",
            block.path.display(),
        ));
    }
    let of_mounts = container.mounts.iter().map(|mount| &mount.users);
    let mut asked = of_mounts.chain([&container.security.users]).flatten();
    match asked.find(|users| Some(*users) != pod.users.as_ref()) {
        None => Ok(()),
        Some(users) => Err(wrong(
            "user namespace that is not the pod's,",
            format!("{users:?}"),
        )),
    }
}
