// SPDX-License-Identifier: Apache-2.0
//! The devices that a container gets in addition to the default ones. They are found when the container is created:
//! devices of this guest, and block devices of the host, which are extents of the volume disk.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path};

use bulkhead_proto::agent::{BlockDevice, Device, Ownership};
use rustix::fs::{major, minor};

use super::ContainerError;
use crate::cgroup::devices::{ACCESS_READ, ACCESS_WRITE, Rule};
use crate::disk::blocks::{Blocks, MappedBlock};
use crate::disk::dm::Access;
use crate::init::config::GivenDevice;
use crate::users::PodUsers;

const MAX_DEVICES: usize = 64;
const DEVICES: &str = "/dev";
/// The mode of a device of the guest if nothing else is asked for. The cgroup decides who may use it.
const MODE: u32 = 0o666;

/// Finds devices of the guest. In a pod with a user namespace the container gets the guest's own node, because root
/// there may not create device nodes. That node belongs to the guest's root, so it is opened to all users.
pub fn find(wanted: &[Device], users: &PodUsers) -> Result<Vec<GivenDevice>, ContainerError> {
    if wanted.len() > MAX_DEVICES {
        return Err(ContainerError::TooMany("devices"));
    }
    let mut found: Vec<_> = wanted.iter().map(find_one).collect::<Result<_, _>>()?;
    if users.namespace().is_some() {
        for device in &mut found {
            device.mode = MODE;
            open_to_all(device)?;
        }
    }
    Ok(found)
}

/// Gives the guest's own node the mode that a node created for a container would have.
fn open_to_all(device: &GivenDevice) -> Result<(), ContainerError> {
    let permissions = fs::Permissions::from_mode(device.mode);
    fs::set_permissions(&device.guest_path, permissions).map_err(|e| {
        let path = &device.guest_path;
        ContainerError::Invalid(format!("open device {path:?} to the pod's users: {e}"))
    })
}

/// Checks a requested device: a character device below `/dev`, by a path without `..`.
fn find_one(wanted: &Device) -> Result<GivenDevice, ContainerError> {
    let invalid = |what: &str| ContainerError::Invalid(format!("device {}", what.to_owned()));
    let path = Path::new(&wanted.guest_path);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.starts_with(DEVICES) || !path.components().all(plain) {
        return Err(invalid(&format!("{path:?} is not a device of the guest")));
    }
    if !Path::new(&wanted.container_path).is_absolute() {
        return Err(invalid(&format!(
            "{path:?} has no absolute path in the container"
        )));
    }
    let found = fs::symlink_metadata(path).and_then(|metadata| {
        match metadata.file_type().is_char_device() {
            true => Ok(metadata.rdev()),
            false => Err(io::Error::other("not a character device")),
        }
    });
    let number = found.map_err(|e| invalid(&format!("{path:?} of this guest: {e}")))?;
    let owner = wanted.ownership.unwrap_or(Ownership {
        mode: MODE,
        uid: 0,
        gid: 0,
    });
    Ok(GivenDevice {
        path: wanted.container_path.clone(),
        major: major(number),
        minor: minor(number),
        access: access(&wanted.permissions),
        block: false,
        mode: owner.mode,
        uid: owner.uid,
        gid: owner.gid,
        guest_path: wanted.guest_path.clone(),
    })
}

/// Creates devices for extents of the volume disk. They exist as long as the second result.
pub fn map(
    blocks: &Blocks,
    wanted: &[BlockDevice],
) -> Result<(Vec<GivenDevice>, Vec<MappedBlock>), ContainerError> {
    if wanted.len() > MAX_DEVICES {
        return Err(ContainerError::TooMany("block devices"));
    }
    let (mut devices, mut mapped) = (Vec::new(), Vec::new());
    for device in wanted {
        if !Path::new(&device.container_path).is_absolute() {
            let text = format!(
                "block device {:?} has no absolute path in the container",
                device.container_path
            );
            return Err(ContainerError::Invalid(text));
        }
        let how = match device.readonly {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let block = blocks.acquire(device.extent.unwrap_or_default(), how)?;
        let Ownership { mode, uid, gid } = device.ownership.unwrap_or_default();
        devices.push(GivenDevice {
            path: device.container_path.clone(),
            major: major(block.number),
            minor: minor(block.number),
            access: access(&device.permissions),
            block: true,
            mode,
            uid,
            gid,
            guest_path: String::new(),
        });
        mapped.push(block);
    }
    Ok((devices, mapped))
}

fn access(permissions: &str) -> u32 {
    let may = |letter, bit| if permissions.contains(letter) { bit } else { 0 };
    may('r', ACCESS_READ) | may('w', ACCESS_WRITE)
}

/// The access that the cgroup has to allow. Nodes may be created for any device, as with runc.
pub fn rule(device: &GivenDevice) -> Rule {
    Rule {
        major: device.major,
        minor: device.minor,
        block: device.block,
        access: device.access,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_character_devices_below_dev_are_given() {
        let device = |guest_path: &str, permissions: &str| Device {
            container_path: "/dev/x".into(),
            guest_path: guest_path.into(),
            permissions: permissions.into(),
            ownership: None,
        };
        let users = PodUsers::default();
        let null = find(&[device("/dev/null", "r")], &users).unwrap();
        assert_eq!(
            rule(&null[0]),
            Rule {
                major: 1,
                minor: 3,
                block: false,
                access: ACCESS_READ
            }
        );
        for path in [
            "/dev/no-such",
            "/dev",
            "/dev/../dev/null",
            "/etc/passwd",
            "null",
        ] {
            assert!(find(&[device(path, "rw")], &users).is_err(), "{path}");
        }
        assert!(find(&vec![device("/dev/null", "rw"); 65], &users).is_err());
    }
}
