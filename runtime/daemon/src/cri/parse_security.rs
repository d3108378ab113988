// SPDX-License-Identifier: Apache-2.0
//! CRI's security contexts in our own words.
//!
//! A guest has neither AppArmor nor SELinux. SELinux labels are ignored, as by every runtime on a host without it; so is
//! AppArmor's default, but a profile by name is refused: whoever asks for one counts on it.

use std::io::Read;
use std::path::Path;

use bulkhead_proto::cri;
use bulkhead_proto::cri::security_profile::ProfileType;

use super::refusal::{ParseError, not_yet, wrong};
use crate::pod::life::spec::{
    ContainerSpec, IdRange, PidMode, PodSpec, Seccomp, Security, User, UserNamespace,
};

const PROFILE_BYTES: u64 = 1 << 20;

/// What a container without a security context may not see, as other runtimes have it.
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
    if let Some(name) = apparmor_profile(&context) {
        return Err(not_yet("AppArmor profile", name));
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
        // As containerd: the lists as they are, and none for a privileged container.
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

/// A group needs a user, and all are numbers that Linux has.
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

/// Who a sandbox's own processes are. A pod has none but its pause process, which is the guest's: what CRI forbids is
/// refused all the same, and the rest has nothing to act on.
pub fn check_sandbox_user(context: &cri::LinuxSandboxSecurityContext) -> Result<(), ParseError> {
    check_user(&User {
        uid: context.run_as_user.map(|user| user.value),
        gid: context.run_as_group.map(|group| group.value),
        supplemental_groups: context.supplemental_groups.clone(),
        ..User::default()
    })
}

/// The profile that is asked for by name. A guest has no AppArmor: the default is none, as on hosts without it.
fn apparmor_profile(context: &cri::LinuxContainerSecurityContext) -> Option<&str> {
    if let Some(profile) = &context.apparmor {
        let by_name = profile.profile_type() == ProfileType::Localhost;
        return by_name.then_some(&profile.localhost_ref);
    }
    // Older kubelets say it this way only.
    context.apparmor_profile.strip_prefix("localhost/")
}

/// A profile of the host's is read here and goes into the guest as text.
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
        // Nothing said is unconfined, as with other runtimes: kubelet always says what it wants.
        "" | "unconfined" => Ok(Seccomp::Unconfined),
        other => match other.strip_prefix("localhost/") {
            Some(path) => read_profile(path),
            None => Err(wrong("seccomp profile", other)),
        },
    }
}

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
            "seccomp profile without a JSON object, or too long:",
            path,
        ));
    }
    Ok(Seccomp::Profile(text))
}

/// The namespaces that are for the pod's author to choose.
pub struct Namespaces {
    pub pid: PidMode,
    pub users: Option<UserNamespace>,
}

/// Without options all is the pod's, as CRI's default is. What is shared with the node is refused but for
/// processes: the guest's are meant.
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
            return Err(wrong("processes of the NODE with users of the", "POD"));
        }
        cri::NamespaceMode::Node => PidMode::Node,
        cri::NamespaceMode::Target if options.target_id.is_empty() => {
            return Err(ParseError::Missing("target_id of the namespace options"));
        }
        cri::NamespaceMode::Target => PidMode::Target(options.target_id),
    };
    Ok(Namespaces { pid, users })
}

/// As CRI has it: one mapping for users and one for groups, from 0.
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
            "number of mappings of users or groups (one is)",
            mappings.len(),
        ));
    };
    // The last number means "no change" to system calls.
    let end = mapping.host_id.checked_add(mapping.length);
    if mapping.container_id != 0 || mapping.length == 0 || end.is_none() {
        return Err(wrong("mapping of users or groups", format!("{mapping:?}")));
    }
    Ok(IdRange {
        first: mapping.host_id,
        length: mapping.length,
    })
}

/// Only a pod that said so may have a privileged container; kubelet says it if any of its containers is.
pub fn check_privileged(pod: &PodSpec, container: &ContainerSpec) -> Result<(), ParseError> {
    if container.security.privileged && !pod.privileged {
        return Err(wrong(
            "in a pod sandbox whose security context is not privileged, the privileged container",
            &container.name,
        ));
    }
    Ok(())
}

/// A container's users, and those of what it mounts, are its pod's.
pub fn check_users(pod: &PodSpec, container: &ContainerSpec) -> Result<(), ParseError> {
    // Kubernetes has no such pods: with any runtime the device's owner would be nobody, and nobody could open it.
    let block = container.block_devices.first();
    if let Some(block) = block.filter(|_| pod.users.is_some()) {
        return Err(not_yet(
            "a pod with users of its own and the block device",
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
