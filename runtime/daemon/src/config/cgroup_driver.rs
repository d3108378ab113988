// SPDX-License-Identifier: Apache-2.0
//! Who makes the cgroups of pods: systemd, or kubelet and this daemon directly.

use serde::Deserialize;

/// The cgroup driver. kubelet asks for it and uses the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    Systemd,
    Cgroupfs,
}

impl CgroupDriver {
    /// The driver for a host whose process 1 has this name. In a container, process 1 is usually not systemd.
    fn of_init(name: &str) -> Self {
        if name.trim() == "systemd" {
            Self::Systemd
        } else {
            Self::Cgroupfs
        }
    }

    pub fn of_host() -> Self {
        Self::of_init(&std::fs::read_to_string("/proc/1/comm").unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_driver_is_told_by_the_name_of_process_1() {
        assert_eq!(CgroupDriver::of_init("systemd\n"), CgroupDriver::Systemd);
        assert_eq!(CgroupDriver::of_init("tini\n"), CgroupDriver::Cgroupfs);
        assert_eq!(CgroupDriver::of_init(""), CgroupDriver::Cgroupfs);
    }
}
