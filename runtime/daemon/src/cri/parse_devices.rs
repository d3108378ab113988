// SPDX-License-Identifier: Apache-2.0
//! Parses CRI's devices. A pod has its own kernel, so character devices are limited to those that every kernel has; the
//! container gets the guest's. Of the host's devices, a container can have only block devices.

use std::path::{Component, Path, PathBuf};

use bulkhead_proto::cri;

use super::parse_mounts::container_path;
use super::refusal::{ParseError, wrong};
use crate::pod::life::spec::{BlockDevice, Device, NodeOwner};

/// Their paths, which are the same on the host and in the guest, and their numbers.
const IN_EVERY_KERNEL: [(&str, u32, u32); 8] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/fuse", 10, 229),
    ("/dev/net/tun", 10, 200),
];
const ALL_ACCESS: &str = "rwm";

/// Returns the guest's devices and the host's devices, which must be block devices.
pub fn devices(given: Vec<cri::Device>) -> Result<(Vec<Device>, Vec<BlockDevice>), ParseError> {
    let (mut of_guest, mut of_host) = (Vec::new(), Vec::new());
    for one in given {
        if number_in_every_kernel(&one.host_path).is_some() {
            of_guest.push(device(one)?);
        } else {
            of_host.push(block_device(one)?);
        }
    }
    Ok((of_guest, of_host))
}

/// The numbers of a character device that every kernel has. `None`: not every kernel has it.
pub(super) fn number_in_every_kernel(path: &str) -> Option<(u32, u32)> {
    let mut known = IN_EVERY_KERNEL.iter();
    known.find_map(|(name, major, minor)| (*name == path).then_some((*major, *minor)))
}

fn device(given: cri::Device) -> Result<Device, ParseError> {
    Ok(Device {
        container_path: place(&given)?,
        permissions: permissions(&given)?,
        owner: NodeOwner::default(),
        guest_path: given.host_path,
    })
}

fn block_device(given: cri::Device) -> Result<BlockDevice, ParseError> {
    Ok(BlockDevice {
        container_path: place(&given)?,
        permissions: permissions(&given)?,
        path: host_path(&given.host_path)?,
        owner: NodeOwner::default(),
        number: None,
    })
}

/// Checks only the path. Whether it is a block device is checked when the container is created.
pub(super) fn host_path(given: &str) -> Result<PathBuf, ParseError> {
    let path = Path::new(given);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || !path.components().all(plain) || given.contains('\0') {
        return Err(wrong("path of a device on the host", given));
    }
    Ok(path.to_owned())
}

fn place(given: &cri::Device) -> Result<String, ParseError> {
    container_path(match given.container_path.as_str() {
        "" => given.host_path.as_str(),
        path => path,
    })
}

fn permissions(given: &cri::Device) -> Result<String, ParseError> {
    let known = |access: char| ALL_ACCESS.contains(access);
    match given.permissions.as_str() {
        "" => Ok(ALL_ACCESS.to_owned()),
        some if some.chars().all(known) => Ok(some.to_owned()),
        other => Err(wrong("permissions of a device", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(host_path: &str, container_path: &str, permissions: &str) -> cri::Device {
        cri::Device {
            host_path: host_path.into(),
            container_path: container_path.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn what_every_kernel_has_is_the_guests_and_all_else_a_block_device_of_the_host() {
        let fuse = device(given("/dev/fuse", "", "")).unwrap();
        assert_eq!(fuse.container_path, "/dev/fuse");
        assert_eq!(fuse.permissions, "rwm");
        let tun = device(given("/dev/net/tun", "/dev/mine", "rw")).unwrap();
        assert_eq!(
            (tun.guest_path.as_str(), tun.permissions.as_str()),
            ("/dev/net/tun", "rw")
        );
        assert_eq!(tun.container_path, "/dev/mine");
        let block = block_device(given(
            "/var/lib/kubelet/pods/p/volumeDevices/v",
            "/dev/xvda",
            "r",
        ));
        let block = block.unwrap();
        assert_eq!(
            (block.container_path.as_str(), block.writes()),
            ("/dev/xvda", false)
        );
        assert!(block_device(given("/dev/loop0", "", "")).unwrap().writes());
        for path in ["", "dev/sda", "/dev/../etc", "/dev/a\0b"] {
            assert!(block_device(given(path, "/dev/x", "rw")).is_err(), "{path}");
        }
        let mixed = vec![given("/dev/null", "", ""), given("/dev/sda", "", "")];
        let (of_guest, of_host) = devices(mixed).unwrap();
        assert_eq!((of_guest.len(), of_host.len()), (1, 1));
        assert!(device(given("/dev/null", "/dev/x", "rx")).is_err());
        assert!(device(given("/dev/null", "/dev/../..", "r")).is_err());
    }
}
