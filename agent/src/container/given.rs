// SPDX-License-Identifier: Apache-2.0
//! The devices that a container is given beside the usual ones, found when it is created: those of this guest, and
//! block devices of the host that are ranges of the volume disk.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

use bulkhead_proto::agent::{BlockDevice, Device, Ownership};
use rustix::fs::{major, minor};

use super::ContainerError;
use crate::cgroup::devices::{ACCESS_READ, ACCESS_WRITE, Rule};
use crate::disk::blocks::{Blocks, MappedBlock};
use crate::disk::window::{Access, Range};
use crate::init::config::GivenDevice;

const MAX_DEVICES: usize = 64;
const DEVICES: &str = "/dev";

pub fn find(wanted: &[Device]) -> Result<Vec<GivenDevice>, ContainerError> {
    if wanted.len() > MAX_DEVICES {
        return Err(ContainerError::TooMany("devices"));
    }
    wanted.iter().map(find_one).collect()
}

fn find_one(wanted: &Device) -> Result<GivenDevice, ContainerError> {
    let invalid = |what: &str| ContainerError::Invalid(format!("device {}", what.to_owned()));
    let path = Path::new(&wanted.guest_path);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.starts_with(DEVICES) || !path.components().all(plain) {
        return Err(invalid(&format!("{path:?} is not one of the guest's")));
    }
    if !Path::new(&wanted.container_path).is_absolute() {
        return Err(invalid(&format!("{path:?} has no place")));
    }
    let found = fs::symlink_metadata(path).and_then(|metadata| {
        match metadata.file_type().is_char_device() {
            true => Ok(metadata.rdev()),
            false => Err(io::Error::other("not a character device")),
        }
    });
    let number = found.map_err(|e| invalid(&format!("{path:?} of this guest: {e}")))?;
    Ok(GivenDevice {
        path: wanted.container_path.clone(),
        major: major(number),
        minor: minor(number),
        access: access(&wanted.permissions),
        block: false,
        mode: 0o666,
        uid: 0,
        gid: 0,
    })
}

/// Makes devices of the guest's of what the host put on the volume disk; they live as long as the second result.
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
            let text = format!("block device {:?} has no place", device.container_path);
            return Err(ContainerError::Invalid(text));
        }
        let range = Range {
            first: device.first_sector,
            sectors: device.sectors,
        };
        let how = match device.readonly {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let block = blocks.acquire(range, how)?;
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
        });
        mapped.push(block);
    }
    Ok((devices, mapped))
}

fn access(permissions: &str) -> u32 {
    let may = |letter, bit| if permissions.contains(letter) { bit } else { 0 };
    may('r', ACCESS_READ) | may('w', ACCESS_WRITE)
}

/// What the cgroup is to allow for it. Nodes may be made of any device, as with runc.
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
        };
        let null = find(&[device("/dev/null", "r")]).unwrap();
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
            assert!(find(&[device(path, "rw")]).is_err(), "{path}");
        }
        assert!(find(&vec![device("/dev/null", "rw"); 65]).is_err());
    }
}
