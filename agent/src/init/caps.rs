// SPDX-License-Identifier: Apache-2.0
//! Names of capabilities, and sets of them.

use super::config::Failure;

/// Indexed by number, from `linux/capability.h`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// One bit for each capability that this kernel may know.
pub const ALL_BITS: u64 = (1 << NAMES.len()) - 1;

/// The set of capabilities with these names (CAP_*, or ALL).
pub fn parse(names: &[String]) -> Result<u64, Failure> {
    names.iter().try_fold(0, |set, name| Ok(set | bits(name)?))
}

fn bits(name: &str) -> Result<u64, Failure> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if short == "ALL" {
        return Ok(ALL_BITS);
    }
    NAMES
        .iter()
        .position(|known| *known == short)
        .map(|number| 1 << number)
        .ok_or_else(|| Failure::other(format!("unknown capability {name:?}")))
}

/// The capabilities in a set, as one bit each.
pub fn each(set: u64) -> impl Iterator<Item = u64> {
    (0..NAMES.len())
        .map(|number| 1 << number)
        .filter(move |bit| set & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::{ALL_BITS, each, parse};

    fn set(names: &[&str]) -> Option<u64> {
        parse(&names.iter().map(ToString::to_string).collect::<Vec<_>>()).ok()
    }

    #[test]
    fn names_become_the_kernels_numbers() {
        assert_eq!(set(&["CAP_CHOWN"]), Some(1));
        assert_eq!(set(&["CAP_SYS_ADMIN"]), Some(1 << 21));
        assert_eq!(
            set(&["CAP_CHECKPOINT_RESTORE", "cap_bpf"]),
            Some(1 << 40 | 1 << 39)
        );
        assert_eq!(set(&["ALL"]), Some(ALL_BITS));
        assert_eq!(set(&["CAP_NONSENSE"]), None);
        assert_eq!(each(0b1001).collect::<Vec<_>>(), [1, 8]);
    }
}
