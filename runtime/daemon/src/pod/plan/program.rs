// SPDX-License-Identifier: Apache-2.0
//! What a container runs: the image's configuration and the container's, merged by Kubernetes' rules into a request to
//! the agent. Pure.

use std::collections::HashMap;

use bulkhead_guest::protocol;
use bulkhead_image::ImageDefaults;

use super::capabilities::{self, UnknownCapability};
use super::declared::{self, BadVolume};
use super::io;
use crate::pod::life::spec::{
    ContainerSpec, Device, NodeOwner, PidMode, Resources, Seccomp, Security, StartHook,
};

/// The PATH of a container if neither the image nor the pod sets one.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The mode of the devices of a guest that all may use, if nothing else is said.
const DEVICE_MODE: u32 = 0o666;

/// Why the settings of a container cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("neither the container nor its image {0} says what to run")]
    NoCommand(String),
    #[error("{0:?} is not the name of an environment variable")]
    Environment(String),
    #[error("a NUL byte in {0}")]
    Nul(&'static str),
    #[error(transparent)]
    Capability(#[from] UnknownCapability),
    #[error("{name} {list:?} is not among those of this host: {online}")]
    Placement {
        name: &'static str,
        list: String,
        online: String,
    },
    #[error(transparent)]
    DeclaredVolume(#[from] BadVolume),
    #[error("resource {name} is {value}: it must not be negative")]
    Resource { name: &'static str, value: i64 },
    #[error(
        "{name} is {value:?}: it must have lines like \"8:0 rbps=1048576 wiops=max\", with numbers of devices of the host"
    )]
    IoMax { name: &'static str, value: String },
}

/// Makes the request to the agent. Its layers, mounts, block devices and annotations are filled in later.
pub fn describe(
    id: &str,
    spec: &ContainerSpec,
    image: &ImageDefaults,
    hostname: &str,
) -> Result<protocol::CreateContainerRequest, ProgramError> {
    let args = arguments(spec, image);
    if args.is_empty() {
        return Err(ProgramError::NoCommand(spec.image.clone()));
    }
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err(ProgramError::Nul("the command"));
    }
    let security = &spec.security;
    let (pid_namespace, pid_target) = pid_namespace(&security.pid);
    let directory = if spec.working_directory.is_empty() {
        &image.working_dir
    } else {
        &spec.working_directory
    };
    Ok(protocol::CreateContainerRequest {
        id: id.to_owned(),
        layers: Vec::new(),
        process: Some(protocol::Process {
            args,
            env: environment(spec, image, hostname)?,
            cwd: directory.clone(),
            terminal: spec.tty,
            stdin: spec.stdin,
            user: Some(user(security, image)),
            capabilities: capabilities::resolve(
                security.privileged,
                &security.add_capabilities,
                &security.drop_capabilities,
            )?
            .into_iter()
            .chain(capabilities::normalize(&security.ambient_capabilities)?)
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect(),
            ambient_capabilities: capabilities::normalize(&security.ambient_capabilities)?,
            no_new_privileges: security.no_new_privileges,
            rlimits: Vec::new(),
            oom_score_adj: oom_score_adj(&spec.resources),
        }),
        readonly_rootfs: security.readonly_root,
        pid_namespace: pid_namespace.into(),
        pid_target,
        resources: Some(resources(&spec.resources)?),
        masked_paths: security.masked_paths.clone(),
        readonly_paths: security.readonly_paths.clone(),
        privileged: security.privileged,
        seccomp: Some(seccomp(security)),
        mounts: Vec::new(),
        devices: spec.devices.iter().map(device).collect(),
        block_devices: Vec::new(),
        declared_volumes: declared::volumes(image, &spec.mounts)?,
        start_hooks: spec.start_hooks.iter().map(start_hook).collect(),
        annotations: HashMap::new(),
    })
}

fn device(device: &Device) -> protocol::Device {
    protocol::Device {
        container_path: device.container_path.clone(),
        guest_path: device.guest_path.clone(),
        permissions: device.permissions.clone(),
        ownership: ownership(device.owner),
    }
}

/// Absent if nothing is set: then the agent decides.
fn ownership(owner: NodeOwner) -> Option<protocol::Ownership> {
    (owner != NodeOwner::default()).then(|| protocol::Ownership {
        mode: owner.mode.unwrap_or(DEVICE_MODE),
        uid: owner.uid.unwrap_or(0),
        gid: owner.gid.unwrap_or(0),
    })
}

fn start_hook(hook: &StartHook) -> protocol::StartHook {
    protocol::StartHook {
        path: hook.path.clone(),
        args: hook.args.clone(),
        env: hook.environment.clone(),
        timeout_milliseconds: hook.timeout.map_or(0, |timeout| {
            timeout.as_millis().try_into().unwrap_or(u32::MAX)
        }),
    }
}

/// A command replaces both the image's entry point and its arguments; arguments alone replace only the image's
/// arguments.
fn arguments(spec: &ContainerSpec, image: &ImageDefaults) -> Vec<String> {
    let (program, args) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (false, _) => (&spec.command, &spec.args),
        (true, false) => (&image.entrypoint, &spec.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    program.iter().chain(args).cloned().collect()
}

/// Defaults, then the image's variables, then the container's. Of variables with the same name the last one is used.
fn environment(
    spec: &ContainerSpec,
    image: &ImageDefaults,
    hostname: &str,
) -> Result<Vec<prost::bytes::Bytes>, ProgramError> {
    let mut variables = Variables::default();
    if let Some((name, value)) = PATH.split_once('=') {
        variables.set(name, value.as_bytes());
    }
    variables.set("HOSTNAME", hostname.as_bytes());
    if spec.tty {
        variables.set("TERM", b"xterm");
    }
    for line in &image.env {
        let (name, value) = line.split_once('=').unwrap_or((line, ""));
        variables.set(name, value.as_bytes());
    }
    for (name, value) in &spec.environment {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(ProgramError::Environment(name.clone()));
        }
        variables.set(name, value);
    }
    if variables.values.iter().any(|(_, value)| value.contains(&0)) {
        return Err(ProgramError::Nul("an environment variable"));
    }
    let join = |(name, value): (&str, &[u8])| [name.as_bytes(), b"=", value].concat().into();
    Ok(variables.values.into_iter().map(join).collect())
}

/// Variables in the order in which their names came first. An image has many of them if its author wants to, so each is
/// found by its hash and not by a search.
#[derive(Default)]
struct Variables<'a> {
    values: Vec<(&'a str, &'a [u8])>,
    places: HashMap<&'a str, usize>,
}

impl<'a> Variables<'a> {
    fn set(&mut self, name: &'a str, value: &'a [u8]) {
        let place = *self.places.entry(name).or_insert(self.values.len());
        match self.values.get_mut(place) {
            Some((_, old)) => *old = value,
            None => self.values.push((name, value)),
        }
    }
}

/// The user that CRI asks for, else the image's. If CRI sets only a group, the image's user stays.
fn user(security: &Security, image: &ImageDefaults) -> protocol::User {
    let wanted = &security.user;
    let name = match (&wanted.uid, wanted.name.as_str()) {
        (None, "") => image.user.clone(),
        (Some(_), _) => String::new(),
        (None, name) => name.to_owned(),
    };
    protocol::User {
        name,
        uid: wanted.uid,
        gid: wanted.gid,
        supplemental_groups: wanted.supplemental_groups.clone(),
        strict_groups: wanted.strict_groups,
    }
}

fn pid_namespace(mode: &PidMode) -> (protocol::PidNamespace, String) {
    use protocol::PidNamespace;
    match mode {
        PidMode::Pod => (PidNamespace::Pod, String::new()),
        PidMode::Container => (PidNamespace::Container, String::new()),
        PidMode::Node => (PidNamespace::Guest, String::new()),
        PidMode::Target(id) => (PidNamespace::Target, id.clone()),
    }
}

/// A privileged container runs without seccomp, as in other container runtimes.
fn seccomp(security: &Security) -> protocol::Seccomp {
    use protocol::seccomp::Kind;
    let (kind, profile) = match &security.seccomp {
        _ if security.privileged => (Kind::Unconfined, Vec::new()),
        Seccomp::RuntimeDefault => (Kind::RuntimeDefault, Vec::new()),
        Seccomp::Unconfined => (Kind::Unconfined, Vec::new()),
        Seccomp::Profile(text) => (Kind::Profile, text.clone()),
    };
    protocol::Seccomp {
        kind: kind.into(),
        profile_json: profile.into(),
    }
}

/// The OOM score adjustment, clamped to the kernel's range.
pub fn oom_score_adj(limits: &Resources) -> i32 {
    i32::try_from(limits.oom_score_adj.clamp(-1000, 1000)).unwrap_or(0)
}

/// Converts limits to the agent's message.
pub fn resources(limits: &Resources) -> Result<protocol::Resources, ProgramError> {
    for (name, value) in [
        ("cpu_period", limits.cpu_period_us),
        ("cpu_shares", limits.cpu_shares),
    ] {
        if value < 0 {
            return Err(ProgramError::Resource { name, value });
        }
    }
    let mut unified = limits.unified.clone();
    // This too applies to the whole VM.
    if let Some(value) = unified.remove(io::KEY).filter(|value| !io::is_valid(value)) {
        let name = io::KEY;
        return Err(ProgramError::IoMax { name, value });
    }
    Ok(protocol::Resources {
        // kubelet may send any number below 0 for "no limit", because it does arithmetic with -1.
        memory_limit_bytes: limits.memory_limit_bytes.max(-1),
        cpu_quota_us: limits.cpu_quota_us,
        cpu_period_us: limits.cpu_period_us,
        cpu_shares: limits.cpu_shares,
        pids_limit: 0,
        // These are numbers of the host, and apply to the whole VM: see `limits`.
        cpuset_cpus: String::new(),
        cpuset_mems: String::new(),
        memory_swap_limit_bytes: limits.memory_swap_limit_bytes.max(0),
        unified: unified.into_iter().collect(),
        hugepage_limits: limits
            .hugepage_limits
            .iter()
            .map(|(page_size, limit)| protocol::HugepageLimit {
                page_size: page_size.clone(),
                limit_bytes: *limit,
            })
            .collect(),
    })
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
