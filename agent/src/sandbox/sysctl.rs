// SPDX-License-Identifier: Apache-2.0
//! Kernel parameters of the pod.

use std::fs;
use std::path::{Path, PathBuf};

use super::SandboxError;

const ROOT: &str = "/proc/sys";

/// What containerd gives every pod: `ping` and low ports without privilege. In a namespace of the pod's own, which the
/// guest is, they take nothing from anybody. And what kubelet sets on a node: a program may reserve more memory than the
/// guest has just now, which may get more.
const DEFAULTS: [(&str, &str); 3] = [
    ("net.ipv4.ping_group_range", "0 2147483647"),
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("vm.overcommit_memory", "1"),
];

/// To be called before the pod's own are set, which win.
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

/// `net.ipv4.ip_forward` or `net/ipv4/conf/eth0.1/forwarding`: whichever separator comes first
/// separates, the other is a character of a name and stands for the one that cannot be.
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
