// SPDX-License-Identifier: Apache-2.0
//! Which capabilities a container has: the default set, plus what is added, minus what is dropped.

/// The default set, the same as in other container runtimes.
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
    "CAP_SETFCAP",
];

/// All capabilities of the guest's kernel (linux/capability.h), in the order of their numbers.
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// A name that is not a capability.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a capability")]
pub struct UnknownCapability(String);

/// Returns the resulting set as `CAP_*` names. `ALL` stands for all capabilities. A single name takes precedence over
/// `ALL`, and a drop over an add.
pub fn resolve<S: AsRef<str>>(
    privileged: bool,
    add: &[S],
    drop: &[S],
) -> Result<Vec<String>, UnknownCapability> {
    if privileged {
        return Ok(ALL.iter().map(ToString::to_string).collect());
    }
    let (add_all, add) = names(add)?;
    let (drop_all, drop) = names(drop)?;
    let keep = |name: &&str| {
        let by_default = (add_all || DEFAULT.contains(name)) && !drop_all;
        (by_default || add.contains(name)) && !drop.contains(name)
    };
    Ok(ALL
        .iter()
        .copied()
        .filter(keep)
        .map(str::to_owned)
        .collect())
}

/// Returns the given names as `CAP_*` names, for the ambient set. Here, too, `ALL` stands for all capabilities.
pub fn normalize<S: AsRef<str>>(given: &[S]) -> Result<Vec<String>, UnknownCapability> {
    let (all, some) = names(given)?;
    let wanted = |name: &&str| all || some.contains(name);
    Ok(ALL
        .iter()
        .copied()
        .filter(wanted)
        .map(str::to_owned)
        .collect())
}

/// Accepts `NET_ADMIN`, `CAP_NET_ADMIN` and `net_admin`.
fn names<S: AsRef<str>>(given: &[S]) -> Result<(bool, Vec<&'static str>), UnknownCapability> {
    let mut all = false;
    let mut known = Vec::new();
    for name in given {
        let upper = name.as_ref().to_ascii_uppercase();
        if upper == "ALL" {
            all = true;
            continue;
        }
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let found = ALL
            .iter()
            .find(|one| one.strip_prefix("CAP_") == Some(bare));
        known.push(*found.ok_or_else(|| UnknownCapability(name.as_ref().to_owned()))?);
    }
    Ok((all, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_drops_and_all_combine_as_in_kubernetes() {
        let count =
            |privileged, add: &[&str], drop: &[&str]| resolve(privileged, add, drop).unwrap().len();
        for (case, privileged, add, drop, expected) in [
            ("default", false, &[][..], &[][..], 14),
            ("privileged", true, &[], &["ALL"], 41),
            ("one more", false, &["NET_ADMIN"], &[], 15),
            ("a default one again", false, &["cap_chown"], &[], 14),
            ("one less", false, &[], &["CAP_MKNOD"], 13),
            ("none", false, &[], &["ALL"], 0),
            ("all", false, &["ALL"], &[], 41),
            ("all but one", false, &["all"], &["SYS_ADMIN"], 40),
            ("only one", false, &["NET_BIND_SERVICE"], &["ALL"], 1),
            ("added and dropped", false, &["SYS_TIME"], &["SYS_TIME"], 14),
        ] {
            assert_eq!(count(privileged, add, drop), expected, "{case}");
        }
        assert!(resolve(false, &["FLY"], &[]).is_err());
    }

    #[test]
    fn the_default_set_has_the_well_known_mask() {
        let mask = resolve::<&str>(false, &[], &[])
            .unwrap()
            .iter()
            .fold(0u64, |mask, name| {
                mask | 1 << ALL.iter().position(|one| one == name).unwrap()
            });
        assert_eq!(mask, 0xa804_25fb);
    }
}
