// SPDX-License-Identifier: Apache-2.0
//! CDI devices: their names in a container's configuration, and what they add to it.
//!
//! Files that describe devices are written for containers that share the host's kernel. What a pod can have of them is
//! added to the container here, as CRI could have asked for it; the rest is refused by name. docs/containers.md has the
//! table.

use std::collections::HashMap;
use std::time::Duration;

use bulkhead_cdi::{
    DeviceName, DeviceNode, Directories, Edits, Hook, HookKind, Mount as CdiMount, NodeKind,
};
use bulkhead_proto::cri;

use super::parse_devices;
use super::parse_mounts::{self, container_path};
use super::refusal::{ParseError, not_yet, wrong};
use crate::pod::life::spec::{
    BlockDevice, ContainerSpec, Device, Mount, MountOptions, NodeOwner, StartHook, UserNamespace,
};

/// kubelet and device plugins name devices in annotations that begin so.
const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";
const MOST_DEVICES: usize = 256;
const MOST_HOOKS: usize = 64;

/// The names of all devices that a container asks for: those of CRI's field, then those of annotations. A device is
/// often in both, and counts once.
pub fn names(
    field: &[cri::CdiDevice],
    annotations: &HashMap<String, String>,
) -> Result<Vec<String>, ParseError> {
    let mut annotated: Vec<_> = annotations
        .iter()
        .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
        .collect();
    annotated.sort_unstable();
    let annotated = annotated.iter().flat_map(|(_, value)| value.split(','));
    let mut names = Vec::new();
    for name in field.iter().map(|one| one.name.as_str()).chain(annotated) {
        let name = DeviceName::parse(name)?.to_string();
        if !names.contains(&name) {
            names.push(name);
        }
        if names.len() > MOST_DEVICES {
            return Err(wrong(
                "a container with more CDI devices than",
                MOST_DEVICES,
            ));
        }
    }
    Ok(names)
}

/// Adds to a container what its devices need. `users` is the pod's user namespace. Blocks, because it reads files.
pub fn add(
    spec: &mut ContainerSpec,
    users: Option<UserNamespace>,
    directories: &Directories,
) -> Result<(), ParseError> {
    if spec.cdi_devices.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = spec
        .cdi_devices
        .iter()
        .map(|name| DeviceName::parse(name))
        .collect::<Result<_, _>>()?;
    let found = directories.find(&names)?;
    for skipped in &found.skipped {
        tracing::warn!("{}", bulkhead_text::chain(skipped));
    }
    for part in found.parts {
        add_edits(spec, users, part.edits).map_err(|source| ParseError::CdiEdit {
            of: part.of,
            source: Box::new(source),
        })?;
    }
    Ok(())
}

fn add_edits(
    spec: &mut ContainerSpec,
    users: Option<UserNamespace>,
    edits: Edits,
) -> Result<(), ParseError> {
    if edits.intel_rdt.is_some() {
        return Err(wrong(
            "edit (a container's processes are in the pod's VM and cannot have a class of the host's caches)",
            "intelRdt",
        ));
    }
    if let Some(device) = edits.net_devices.first() {
        return Err(wrong(
            "network interface of the host (a pod's VM has its own)",
            &device.host_interface_name,
        ));
    }
    for variable in edits.env {
        let (name, value) = variable.split_once('=').unwrap_or((&variable, ""));
        let variable = (name.to_owned(), value.as_bytes().to_vec());
        spec.environment.push(variable);
    }
    for node in &edits.device_nodes {
        add_device(spec, node)?;
    }
    for given in edits.mounts {
        let mount = mount(given, users)?;
        let place = &mount.container_path;
        spec.mounts.retain(|one| one.container_path != *place);
        spec.mounts.push(mount);
    }
    for given in edits.hooks {
        spec.start_hooks.push(start_hook(given)?);
    }
    if spec.start_hooks.len() > MOST_HOOKS {
        return Err(wrong("a container with more hooks than", MOST_HOOKS));
    }
    let groups = &mut spec.security.user.supplemental_groups;
    for gid in edits.additional_gids {
        // As in CDI's library: 0 counts as not set.
        if gid != 0 && !groups.contains(&gid.into()) {
            groups.push(gid.into());
        }
    }
    Ok(())
}

/// Adds a device node in place of one at the same path.
fn add_device(spec: &mut ContainerSpec, node: &DeviceNode) -> Result<(), ParseError> {
    let source = node.source();
    let container_path = container_path(&node.path)?;
    let permissions = node.access().to_owned();
    let owner = owner(node, spec);
    let is_elsewhere = |path: &String| *path != container_path;
    spec.devices.retain(|one| is_elsewhere(&one.container_path));
    let blocks = &mut spec.block_devices;
    blocks.retain(|one| is_elsewhere(&one.container_path));
    match (parse_devices::number_in_every_kernel(source), node.kind) {
        (Some(number), NodeKind::AsOnHost | NodeKind::Character) => {
            if node.number().is_some_and(|given| given != number) {
                let (major, minor) = number;
                return Err(wrong(
                    "device node with other numbers than in every kernel",
                    format!("{source}, which is {major}:{minor}"),
                ));
            }
            spec.devices.push(Device {
                container_path,
                guest_path: source.to_owned(),
                permissions,
                owner,
            });
        }
        (Some(_), _) => return Err(wrong("device node (it is a character device)", source)),
        (None, NodeKind::Character) => {
            return Err(not_yet(
                "character device of the host (a pod has its own kernel, which does not have it)",
                source,
            ));
        }
        (None, NodeKind::Pipe) => return Err(wrong("named pipe of the host", source)),
        (None, NodeKind::AsOnHost | NodeKind::Block) => spec.block_devices.push(BlockDevice {
            path: parse_devices::host_path(source)?,
            container_path,
            permissions,
            owner,
            number: node.number(),
        }),
    }
    Ok(())
}

/// What the file says, else the user and group of the container if CRI names them by number.
fn owner(node: &DeviceNode, spec: &ContainerSpec) -> NodeOwner {
    let user = &spec.security.user;
    let of_user = |id: Option<i64>| u32::try_from(id?).ok().filter(|id| *id > 0);
    NodeOwner {
        mode: node.file_mode,
        uid: node.uid.or_else(|| of_user(user.uid)),
        gid: node.gid.or_else(|| of_user(user.gid)),
    }
}

/// Reads a mount's options as mount(8) has them: of two that contradict each other the later one counts.
fn mount(given: CdiMount, users: Option<UserNamespace>) -> Result<Mount, ParseError> {
    if !matches!(given.kind.as_str(), "" | "bind" | "none") {
        return Err(not_yet(
            "mount that is not of files of the host, but of type",
            given.kind,
        ));
    }
    let mut mount = cri::Mount {
        container_path: given.container_path,
        host_path: given.host_path,
        ..Default::default()
    };
    let mut options = MountOptions::default();
    for option in given.options {
        match option.as_str() {
            // What is mounted below the source comes along in any case, as in every mount of CRI.
            "bind" | "rbind" => {}
            "ro" => (mount.readonly, mount.recursive_read_only) = (true, false),
            "rro" => (mount.readonly, mount.recursive_read_only) = (true, true),
            "rw" => (mount.readonly, mount.recursive_read_only) = (false, false),
            "private" | "rprivate" => {
                mount.set_propagation(cri::MountPropagation::PropagationPrivate);
            }
            "slave" | "rslave" => {
                mount.set_propagation(cri::MountPropagation::PropagationHostToContainer);
            }
            "shared" | "rshared" => {
                mount.set_propagation(cri::MountPropagation::PropagationBidirectional);
            }
            "nosuid" | "suid" => options.no_suid = option == "nosuid",
            "nodev" | "dev" => options.no_dev = option == "nodev",
            "noexec" | "exec" => options.no_exec = option == "noexec",
            _ => return Err(not_yet("mount option", option)),
        }
    }
    Ok(Mount {
        users,
        options,
        ..parse_mounts::mount(mount)?
    })
}

/// Of all hooks only this kind runs where the container is. The others are programs of the host, whose namespaces do
/// not have the container's files and processes.
fn start_hook(given: Hook) -> Result<StartHook, ParseError> {
    if given.kind != HookKind::StartContainer {
        return Err(wrong(
            "hook (it is a program of the host, and the container's files and processes are in the pod's VM)",
            format!("{} {}", given.kind.name(), given.path),
        ));
    }
    let has_nul = |texts: &[String]| texts.iter().any(|text| text.contains('\0'));
    let is_plain = given.path.starts_with('/') && !given.path.contains('\0');
    if !is_plain || has_nul(&given.args) || has_nul(&given.env) {
        return Err(wrong("hook startContainer", given.path));
    }
    Ok(StartHook {
        path: given.path,
        args: given.args,
        environment: given.env,
        timeout: given
            .timeout
            .map(|seconds| Duration::from_secs(seconds.get().into())),
    })
}

#[cfg(test)]
#[path = "parse_cdi_tests.rs"]
mod tests;
