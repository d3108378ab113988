// SPDX-License-Identifier: Apache-2.0
//! CRI's devices in our own words. A pod has a kernel of its own: only those that mean the same in every kernel can be
//! given to a container, and they are the guest's.

use bulkhead_proto::cri;

use super::parse::{ParseError, not_yet, wrong};
use super::parse_mounts::container_path;
use crate::pod::spec::Device;

/// By their paths on the host, which are those in the guest.
const IN_EVERY_KERNEL: [&str; 8] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/fuse",
    "/dev/net/tun",
];
const ALL_ACCESS: &str = "rwm";

pub fn devices(given: Vec<cri::Device>) -> Result<Vec<Device>, ParseError> {
    given.into_iter().map(device).collect()
}

fn device(given: cri::Device) -> Result<Device, ParseError> {
    if !IN_EVERY_KERNEL.contains(&given.host_path.as_str()) {
        return Err(not_yet("device of the host", given.host_path));
    }
    let known = |access: char| ALL_ACCESS.contains(access);
    if !given.permissions.chars().all(known) {
        return Err(wrong("permissions of a device", given.permissions));
    }
    let place = match given.container_path.as_str() {
        "" => given.host_path.as_str(),
        path => path,
    };
    Ok(Device {
        container_path: container_path(place)?,
        guest_path: given.host_path,
        permissions: match given.permissions.as_str() {
            "" => ALL_ACCESS.to_owned(),
            _ => given.permissions,
        },
    })
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
    fn what_every_kernel_has_is_given_and_all_else_refused_by_name() {
        let fuse = device(given("/dev/fuse", "", "")).unwrap();
        assert_eq!(fuse.container_path, "/dev/fuse");
        assert_eq!(fuse.permissions, "rwm");
        let tun = device(given("/dev/net/tun", "/dev/mine", "rw")).unwrap();
        assert_eq!(
            (tun.guest_path.as_str(), tun.permissions.as_str()),
            ("/dev/net/tun", "rw")
        );
        assert_eq!(tun.container_path, "/dev/mine");
        for path in [
            "/dev/sda",
            "/dev/vda",
            "/dev/kvm",
            "/dev/mapper/control",
            "/srv",
            "",
        ] {
            let error = device(given(path, "/dev/x", "rw")).unwrap_err();
            assert!(matches!(&error, ParseError::NotYet { value, .. } if value == path));
        }
        assert!(device(given("/dev/null", "/dev/x", "rx")).is_err());
        assert!(device(given("/dev/null", "/dev/../..", "r")).is_err());
    }
}
