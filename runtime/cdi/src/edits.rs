// SPDX-License-Identifier: Apache-2.0
//! What a device adds to a container, in the words of the specification.
//!
//! An unknown field is an error, as everywhere: it may be what the device does not work without. A field that is `null`
//! counts as absent.

use std::num::NonZeroU32;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};

const ALL_ACCESS: &str = "rwm";
/// The word for permissions without any access; no word at all means all access.
const NO_ACCESS: &str = "none";
const MODE_BITS: u32 = 0o7777;

/// The edits of one device, or of all devices of a file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Edits {
    /// `NAME=value`.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub device_nodes: Vec<DeviceNode>,
    #[serde(deserialize_with = "or_default")]
    pub net_devices: Vec<NetDevice>,
    #[serde(deserialize_with = "or_default")]
    pub hooks: Vec<Hook>,
    #[serde(deserialize_with = "or_default")]
    pub mounts: Vec<Mount>,
    pub intel_rdt: Option<IgnoredAny>,
    #[serde(deserialize_with = "or_default")]
    pub additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DeviceNode {
    /// In the container.
    pub path: String,
    /// On the host; empty: the same.
    #[serde(default, deserialize_with = "or_default")]
    pub host_path: String,
    #[serde(default, rename = "type", deserialize_with = "or_default")]
    pub kind: NodeKind,
    #[serde(default)]
    pub major: u32,
    #[serde(default)]
    pub minor: u32,
    pub file_mode: Option<u32>,
    #[serde(default, deserialize_with = "or_default")]
    permissions: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum NodeKind {
    /// Whatever the path on the host is.
    #[default]
    #[serde(rename = "")]
    AsOnHost,
    #[serde(rename = "b")]
    Block,
    #[serde(rename = "c", alias = "u")]
    Character,
    #[serde(rename = "p")]
    Pipe,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NetDevice {
    pub host_interface_name: String,
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Hook {
    #[serde(rename = "hookName")]
    pub kind: HookKind,
    pub path: String,
    /// With the name of the program, as `execve` takes them. Empty: only the path.
    #[serde(default, deserialize_with = "or_default")]
    pub args: Vec<String>,
    /// `NAME=value`.
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// In seconds.
    pub timeout: Option<NonZeroU32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HookKind {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Mount {
    pub host_path: String,
    pub container_path: String,
    #[serde(default, deserialize_with = "or_default")]
    pub options: Vec<String>,
    #[serde(default, rename = "type", deserialize_with = "or_default")]
    pub kind: String,
}

impl Edits {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks what the types do not say. The error is a reason.
    pub(crate) fn check(&self) -> Result<(), String> {
        check_variables(&self.env)?;
        for node in &self.device_nodes {
            let path = &node.path;
            let known = |access: char| ALL_ACCESS.contains(access);
            match node {
                _ if path.is_empty() => return Err("a device node has no path".to_owned()),
                _ if node.permissions != NO_ACCESS && !node.permissions.chars().all(known) => {
                    let found = &node.permissions;
                    return Err(format!("device node {path:?} has permissions {found:?}"));
                }
                _ if node.file_mode.is_some_and(|mode| mode > MODE_BITS) => {
                    return Err(format!("device node {path:?} has a fileMode above 07777"));
                }
                _ => {}
            }
        }
        for hook in &self.hooks {
            if hook.path.is_empty() {
                return Err(format!("a {} hook has no path", hook.kind.name()));
            }
            check_variables(&hook.env)?;
        }
        for mount in &self.mounts {
            if mount.host_path.is_empty() || mount.container_path.is_empty() {
                return Err("a mount has no hostPath or no containerPath".to_owned());
            }
        }
        for device in &self.net_devices {
            if device.host_interface_name.is_empty() || device.name.is_empty() {
                return Err("a network device has no hostInterfaceName or no name".to_owned());
            }
        }
        Ok(())
    }
}

impl DeviceNode {
    /// Some of `r`, `w`, `m`.
    pub fn access(&self) -> &str {
        match self.permissions.as_str() {
            "" => ALL_ACCESS,
            NO_ACCESS => "",
            some => some,
        }
    }

    /// The path on the host.
    pub fn source(&self) -> &str {
        match self.host_path.as_str() {
            "" => &self.path,
            path => path,
        }
    }

    /// Major and minor number, if the file names them.
    pub fn number(&self) -> Option<(u32, u32)> {
        (self.major != 0).then_some((self.major, self.minor))
    }
}

impl HookKind {
    /// As the specification calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }
}

fn check_variables(variables: &[String]) -> Result<(), String> {
    let is_named = |variable: &&String| variable.find('=').is_some_and(|at| at > 0);
    match variables.iter().find(|one| !is_named(one)) {
        None => Ok(()),
        Some(variable) => Err(format!("{variable:?} is not a variable, NAME=value")),
    }
}

fn or_default<'de, T, D>(from: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    Ok(Option::deserialize(from)?.unwrap_or_default())
}
