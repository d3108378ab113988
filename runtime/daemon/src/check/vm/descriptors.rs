// SPDX-License-Identifier: Apache-2.0
//! What the open descriptors of a VMM and of a file server are, and whether they may be there. The links in `/proc/PID/fd`
//! tell.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::process::Descriptor;
use crate::pod::volumes::disk;

/// What a VM may hold, apart from what the kernel makes without a name.
#[derive(Debug, Default)]
pub struct Allowed {
    /// Directories of the VM's own files: logs, reports, its scratch disk.
    pub directories: Vec<PathBuf>,
    /// What all VMs read: the modules of the guest's kernel.
    pub modules: PathBuf,
    /// Numbers of block devices that its pod's containers were given.
    pub devices: BTreeSet<u64>,
    /// Numbers of unix sockets of the daemon's and the VM's own network namespace.
    pub unix_sockets: BTreeSet<u64>,
}

/// Counts the descriptors of a VMM by their kinds, or names those that it must not have.
pub fn of_vmm(all: &[Descriptor], allowed: &Allowed) -> Result<String, String> {
    sum_up(all, |one| vmm_kind(one, allowed))
}

/// The same of a file server. Files of its shares are whatever its guest has opened; devices and sockets are not.
pub fn of_file_server(all: &[Descriptor], allowed: &Allowed) -> Result<String, String> {
    sum_up(all, |one| server_kind(one, allowed))
}

/// The same of a process that only waits.
pub fn of_waiting(all: &[Descriptor], allowed: &Allowed) -> Result<String, String> {
    sum_up(all, |one| common_kind(one, allowed))
}

fn sum_up(
    all: &[Descriptor],
    kind: impl Fn(&Descriptor) -> Option<String>,
) -> Result<String, String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for one in all {
        match kind(one) {
            Some(kind) => *counts.entry(kind).or_default() += 1,
            None => wrong.push(format!("{} is {}", one.number, describe(one))),
        }
    }
    if !wrong.is_empty() {
        return Err(format!("must not be there: {}", wrong.join(", ")));
    }
    let shown: Vec<String> = counts
        .iter()
        .map(|(kind, count)| format!("{kind} {count}"))
        .collect();
    Ok(shown.join(", "))
}

fn describe(one: &Descriptor) -> String {
    let access = if one.writable {
        "writable"
    } else {
        "read-only"
    };
    format!("{} ({access})", one.target)
}

fn vmm_kind(one: &Descriptor, allowed: &Allowed) -> Option<String> {
    let target = one.target.as_str();
    let named = match target {
        "/dev/kvm" => "kvm",
        "/dev/net/tun" => "tap",
        "anon_inode:kvm-vm" => "vm",
        "anon_inode:[timerfd]" => "timer",
        "anon_inode:[signalfd]" => "signals",
        // In the first fork of a template. No call that it could be used with is allowed.
        "anon_inode:[userfaultfd]" => "pages that are shown",
        _ if target.starts_with("anon_inode:kvm-vcpu:") => "vcpu",
        _ if target.starts_with("anon_inode:kvm-vcpu-stats") => "statistics of KVM",
        _ if target.starts_with("/memfd:") => "guest memory",
        _ => return file_kind(one, allowed).or_else(|| common_kind(one, allowed)),
    };
    Some(named.to_owned())
}

/// What a VMM holds of file systems.
fn file_kind(one: &Descriptor, allowed: &Allowed) -> Option<String> {
    let path = Path::new(&one.target);
    if let Some(device) = one.block_device {
        return allowed
            .devices
            .contains(&device)
            .then(|| "block volume".to_owned());
    }
    if !path.is_absolute() || one.is_directory || one.is_character_device {
        return None;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if allowed.directories.iter().any(|own| path.starts_with(own)) {
        return Some(name.into_owned());
    }
    if name == disk::IMAGE {
        return Some("emptyDir".to_owned());
    }
    // A VM that runs keeps the modules of its kernel when newer ones are installed.
    let kept = one.target.strip_suffix(" (deleted)");
    let kept = Path::new(kept.unwrap_or(&one.target));
    if !one.writable && kept == allowed.modules {
        return Some("kernel modules".to_owned());
    }
    let below = path.parent().and_then(Path::file_name);
    let is_layer = below.is_some_and(|directory| directory == "layers");
    (is_layer && !one.writable).then(|| "layer".to_owned())
}

fn server_kind(one: &Descriptor, allowed: &Allowed) -> Option<String> {
    if one.target == "anon_inode:inotify" {
        return Some("watch".to_owned());
    }
    if let Some(kind) = common_kind(one, allowed) {
        return Some(kind);
    }
    let is_device = one.is_character_device || one.block_device.is_some();
    (one.target.starts_with('/') && !is_device).then(|| "shared file".to_owned())
}

/// What each of the processes may hold.
fn common_kind(one: &Descriptor, allowed: &Allowed) -> Option<String> {
    let target = one.target.as_str();
    let inside = |kind: &str| target.strip_prefix(kind)?.strip_suffix(']')?.parse().ok();
    let named = match target {
        "anon_inode:[eventfd]" => "event",
        "anon_inode:[eventpoll]" => "epoll",
        "/dev/null" => "null",
        _ if target.starts_with("pipe:[") => "pipe",
        _ if inside("socket:[")
            .is_some_and(|socket: u64| allowed.unix_sockets.contains(&socket)) =>
        {
            "unix socket"
        }
        _ => {
            let path = Path::new(target);
            let is_own = allowed.directories.iter().any(|own| path.starts_with(own));
            let name = path.file_name()?.to_string_lossy();
            return (is_own && !one.is_directory).then(|| name.into_owned());
        }
    };
    Some(named.to_owned())
}

/// The numbers of sockets in a file `/proc/PID/net/unix`.
pub fn unix_sockets(table: &str) -> impl Iterator<Item = u64> + '_ {
    let lines = table.lines().skip(1);
    lines.filter_map(|line| line.split_whitespace().nth(6)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(target: &str) -> Descriptor {
        Descriptor {
            number: 9,
            target: target.to_owned(),
            writable: false,
            block_device: None,
            is_character_device: false,
            is_directory: false,
        }
    }

    fn allowed() -> Allowed {
        Allowed {
            directories: vec![
                "/run/bulkhead/pods/1".into(),
                "/var/lib/bulkhead/pods/1".into(),
            ],
            modules: "/usr/lib/bulkhead/modules.erofs".into(),
            devices: BTreeSet::from([0x810]),
            unix_sockets: BTreeSet::from([77]),
        }
    }

    #[test]
    fn what_a_vmm_needs_is_named_by_its_kind() {
        let table = [
            ("/dev/kvm", "kvm"),
            ("/dev/net/tun", "tap"),
            ("anon_inode:kvm-vcpu:3", "vcpu"),
            ("anon_inode:kvm-vcpu-stats:3", "statistics of KVM"),
            ("/memfd:guest memory (deleted)", "guest memory"),
            ("socket:[77]", "unix socket"),
            ("/run/bulkhead/pods/1/console.log", "console.log"),
            ("/var/lib/bulkhead/pods/1/scratch.ext4", "scratch.ext4"),
            ("/var/lib/bulkhead/images/layers/0a", "layer"),
            (
                "/usr/lib/bulkhead/modules.erofs (deleted)",
                "kernel modules",
            ),
        ];
        for (target, kind) in table {
            assert_eq!(
                vmm_kind(&open(target), &allowed()).as_deref(),
                Some(kind),
                "{target}"
            );
        }
        let all = [open("/dev/kvm"), open("pipe:[3]"), open("pipe:[4]")];
        assert_eq!(of_vmm(&all, &allowed()).unwrap(), "kvm 1, pipe 2");
    }

    #[test]
    fn anything_else_is_named_with_its_number() {
        let layer = Descriptor {
            writable: true,
            ..open("/var/lib/bulkhead/images/layers/0a")
        };
        let disk = Descriptor {
            block_device: Some(0x820),
            ..open("/dev/sdc")
        };
        let directory = Descriptor {
            is_directory: true,
            ..open("/run/bulkhead/pods/1")
        };
        for one in [
            layer,
            disk,
            directory,
            open("socket:[78]"),
            open("/run/bulkhead/pods/12/console.log"),
            open("/etc/shadow"),
            open("/dev/mem"),
            open("anon_inode:[io_uring]"),
            open("anon_inode:[pidfd]"),
        ] {
            let error = of_vmm(std::slice::from_ref(&one), &allowed()).unwrap_err();
            let named = format!("9 is {}", one.target);
            assert!(error.contains(&named), "{error}");
        }
    }

    #[test]
    fn a_file_server_holds_files_and_directories_but_no_devices() {
        let directory = Descriptor {
            is_directory: true,
            ..open("/shares/p1")
        };
        let device = Descriptor {
            is_character_device: true,
            ..open("/shares/p1/tty")
        };
        let all = [directory, open("/shares/p1/file"), open("socket:[77]")];
        let found = of_file_server(&all, &allowed()).unwrap();
        assert_eq!(found, "shared file 2, unix socket 1");
        assert!(of_file_server(&[device], &allowed()).is_err());
        assert!(of_file_server(&[open("socket:[1]")], &allowed()).is_err());
        assert!(of_waiting(&[open("/shares/p1/file")], &allowed()).is_err());
    }

    #[test]
    fn unix_sockets_are_found_in_their_table() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/x\n\
                     0000000000000000: 00000003 00000000 00000000 0001 03 77\n";
        assert_eq!(unix_sockets(table).collect::<Vec<_>>(), [12345, 77]);
    }
}
