// SPDX-License-Identifier: Apache-2.0
//! CRI's messages in our own words. What we cannot do is refused here, by name, never ignored.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use bulkhead_proto::cri;
use bulkhead_proto::cri::security_profile::ProfileType;

use super::limits;
use super::{parse_devices, parse_mounts};
use crate::pod::signal;
use crate::pod::spec::{
    ContainerSpec, Dns, Labels, PidMode, PodName, PodSpec, PortMapping, Protocol, Seccomp,
    Security, User,
};

/// The names under which kubelet may ask for us.
pub const HANDLERS: [&str; 2] = ["", "bulkhead"];
/// The longest host name that Linux takes.
const HOSTNAME_BYTES: usize = 64;
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

/// A request that we do not take.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{what} {value:?} is not possible")]
    Wrong { what: &'static str, value: String },
    #[error(
        "the host's {what} was asked for: a pod has a kernel of its own and cannot share it; schedule it with \
         another RuntimeClass"
    )]
    NotIsolated { what: &'static str },
    #[error("runtime handler {0:?} is not one of this runtime: {HANDLERS:?}")]
    Handler(String),
    #[error("{what} {value:?} is not supported by this version")]
    NotYet { what: &'static str, value: String },
    #[error("read seccomp profile {path}")]
    Profile {
        path: String,
        source: std::io::Error,
    },
}

pub(super) fn wrong(what: &'static str, value: impl ToString) -> ParseError {
    ParseError::Wrong {
        what,
        value: value.to_string(),
    }
}

pub(super) fn not_yet(what: &'static str, value: impl ToString) -> ParseError {
    ParseError::NotYet {
        what,
        value: value.to_string(),
    }
}

/// `RunPodSandbox`.
pub fn pod(config: Option<cri::PodSandboxConfig>, handler: String) -> Result<PodSpec, ParseError> {
    let config = config.ok_or(ParseError::Missing("the pod's config"))?;
    let metadata = config
        .metadata
        .ok_or(ParseError::Missing("the pod's metadata"))?;
    for (what, value) in [
        ("the pod's metadata.name", &metadata.name),
        ("the pod's metadata.namespace", &metadata.namespace),
        ("the pod's metadata.uid", &metadata.uid),
    ] {
        if value.is_empty() {
            return Err(ParseError::Missing(what));
        }
    }
    if !HANDLERS.contains(&handler.as_str()) {
        return Err(ParseError::Handler(handler));
    }
    let linux = config.linux.unwrap_or_default();
    let limits = limits::pod(&linux, &config.annotations)?;
    let context = linux.security_context.unwrap_or_default();
    Ok(PodSpec {
        name: PodName {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            attempt: metadata.attempt,
        },
        hostname: hostname(config.hostname)?,
        log_directory: config.log_directory,
        dns: config.dns_config.map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        port_mappings: config
            .port_mappings
            .into_iter()
            .map(port_mapping)
            .collect::<Result<_, _>>()?,
        labels: labels(config.labels),
        annotations: labels(config.annotations),
        runtime_handler: handler,
        pid: pid_mode(context.namespace_options)?,
        sysctls: labels(linux.sysctls),
        limits,
    })
}

/// `CreateContainer`.
pub fn container(config: Option<cri::ContainerConfig>) -> Result<ContainerSpec, ParseError> {
    let config = config.ok_or(ParseError::Missing("the container's config"))?;
    refuse_what_is_not_there(&config)?;
    let metadata = config
        .metadata
        .ok_or(ParseError::Missing("the container's metadata"))?;
    if metadata.name.is_empty() {
        return Err(ParseError::Missing("the container's metadata.name"));
    }
    let image = config.image.unwrap_or_default();
    if image.image.is_empty() {
        return Err(ParseError::Missing("the container's image"));
    }
    let stop_signal = match cri::Signal::try_from(config.stop_signal) {
        Ok(cri::Signal::RuntimeDefault) => None,
        Ok(signal) => Some(signal_number(signal)?),
        Err(_) => return Err(wrong("stop signal", config.stop_signal)),
    };
    let linux = config.linux.unwrap_or_default();
    let entry = |pair: cri::KeyValue| (pair.key, pair.value);
    Ok(ContainerSpec {
        name: metadata.name,
        attempt: metadata.attempt,
        user_image: image.user_specified_image,
        image: image.image,
        command: config.command,
        args: config.args,
        working_directory: config.working_dir,
        environment: config.envs.into_iter().map(entry).collect(),
        labels: labels(config.labels),
        annotations: labels(config.annotations),
        log_path: config.log_path,
        mounts: parse_mounts::mounts(config.mounts)?,
        devices: parse_devices::devices(config.devices)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        security: security(linux.security_context)?,
        resources: linux.resources.map(limits::resources).unwrap_or_default(),
        stop_signal,
    })
}

fn refuse_what_is_not_there(config: &cri::ContainerConfig) -> Result<(), ParseError> {
    if let Some(device) = config.cdi_devices.first() {
        return Err(not_yet("CDI device", &device.name));
    }
    Ok(())
}

fn security(context: Option<cri::LinuxContainerSecurityContext>) -> Result<Security, ParseError> {
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
            pid: PidMode::Container,
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
        pid: pid_mode(context.namespace_options)?,
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

/// Without options a container has processes of its own. What is shared with the node is refused but for
/// processes: the guest's are meant.
fn pid_mode(options: Option<cri::NamespaceOption>) -> Result<PidMode, ParseError> {
    let Some(options) = options else {
        return Ok(PidMode::Container);
    };
    if options.network() == cri::NamespaceMode::Node {
        return Err(ParseError::NotIsolated { what: "network" });
    }
    if options.ipc() == cri::NamespaceMode::Node {
        return Err(ParseError::NotIsolated { what: "IPC" });
    }
    let users = options.userns_options.as_ref();
    if users.is_some_and(|users| users.mode() != cri::NamespaceMode::Node && !users.uids.is_empty())
    {
        return Err(not_yet("user namespace", "POD"));
    }
    Ok(match options.pid() {
        cri::NamespaceMode::Pod => PidMode::Pod,
        cri::NamespaceMode::Container => PidMode::Container,
        cri::NamespaceMode::Node => PidMode::Node,
        cri::NamespaceMode::Target if options.target_id.is_empty() => {
            return Err(ParseError::Missing("target_id of the namespace options"));
        }
        cri::NamespaceMode::Target => PidMode::Target(options.target_id),
    })
}

fn port_mapping(mapping: cri::PortMapping) -> Result<PortMapping, ParseError> {
    let port = |value: i32| u16::try_from(value).map_err(|_| wrong("port", value));
    Ok(PortMapping {
        protocol: match mapping.protocol() {
            cri::Protocol::Tcp => Protocol::Tcp,
            cri::Protocol::Udp => Protocol::Udp,
            cri::Protocol::Sctp => Protocol::Sctp,
        },
        container_port: port(mapping.container_port)?,
        host_port: port(mapping.host_port)?,
        host_ip: mapping.host_ip,
    })
}

fn hostname(name: String) -> Result<String, ParseError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    if name.len() > HOSTNAME_BYTES || !name.chars().all(allowed) {
        return Err(wrong("hostname", name));
    }
    Ok(name)
}

/// `SIGNAL_SIGRTMINPLUS3` is the name of `SIGRTMIN+3`.
pub fn signal_number(given: cri::Signal) -> Result<i32, ParseError> {
    let name = given.as_str_name().trim_start_matches("SIGNAL_");
    let name = name.replace("PLUS", "+").replace("MINUS", "-");
    signal::parse(&name).ok_or_else(|| wrong("stop signal", name))
}

fn labels(map: HashMap<String, String>) -> Labels {
    map.into_iter().collect()
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
