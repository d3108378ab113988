// SPDX-License-Identifier: Apache-2.0
//! Kernel parameters (sysctls) of the pod.

use std::fs;
use std::path::{Path, PathBuf};

use super::SandboxError;

const ROOT: &str = "/proc/sys";

/// The first two are containerd's defaults for every pod: `ping` and low ports without privileges. They are safe,
/// because the guest has no other pod. The last one is kubelet's for a node: a program may reserve more memory than
/// the guest has now, because the guest may get more later.
const DEFAULTS: [(&str, &str); 3] = [
    ("net.ipv4.ping_group_range", "0 2147483647"),
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("vm.overcommit_memory", "1"),
];

/// Sets the defaults. Call it before the pod's own values are set, because these have precedence.
pub fn set_defaults() -> Result<(), SandboxError> {
    DEFAULTS
        .iter()
        .try_for_each(|(name, value)| set(name, value))
}

pub fn set(name: &str, value: &str) -> Result<(), SandboxError> {
    let path = path(name).ok_or_else(|| SandboxError::BadSysctl(name.to_owned()))?;
    fs::write(path, value).map_err(|source| SandboxError::Sysctl {
        name: name.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// The file of a sysctl, for `net.ipv4.ip_forward` as well as for `net/ipv4/conf/eth0.1/forwarding`. Whichever of `.`
/// and `/` comes first is the separator. The other one is then part of a name; if it is `/`, it stands for a `.`.
fn path(name: &str) -> Option<PathBuf> {
    let first = name.find(['.', '/'])?;
    let dots_separate = name[first..].starts_with('.');
    let relative: String = name
        .chars()
        .map(|c| match c {
            '.' if dots_separate => '/',
            '/' if dots_separate => '.',
            c => c,
        })
        .collect();
    let proper =
        |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    relative
        .split('/')
        .all(proper)
        .then(|| Path::new(ROOT).join(relative))
}

#[cfg(test)]
mod tests {
    use super::path;

    #[test]
    fn names_become_paths_below_proc_sys() {
        let table = [
            ("net.ipv4.ip_forward", Some("/proc/sys/net/ipv4/ip_forward")),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ),
            ("plain", None),
            ("a..b", None),
            ("net/../../x", None),
            ("/etc/passwd", None),
            (".a", None),
            ("", None),
        ];
        for (name, expected) in table {
            assert_eq!(
                path(name).as_deref(),
                expected.map(std::path::Path::new),
                "{name:?}"
            );
        }
    }
}
