// SPDX-License-Identifier: Apache-2.0
//! The devices that a container is given beside the usual ones: those of this guest, found when it is created.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

use bulkhead_proto::agent::Device;
use rustix::fs::{major, minor};

use super::ContainerError;
use crate::cgroup::devices::{ACCESS_READ, ACCESS_WRITE, Rule};
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
    let may = |letter, bit| {
        if wanted.permissions.contains(letter) {
            bit
        } else {
            0
        }
    };
    Ok(GivenDevice {
        path: wanted.container_path.clone(),
        major: major(number),
        minor: minor(number),
        access: may('r', ACCESS_READ) | may('w', ACCESS_WRITE),
    })
}

/// What the cgroup is to allow for it. Nodes may be made of any device, as with runc.
pub fn rule(device: &GivenDevice) -> Rule {
    Rule {
        major: device.major,
        minor: device.minor,
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
