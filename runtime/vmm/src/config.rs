// SPDX-License-Identifier: Apache-2.0
//! The configuration of one VM, which the parent process writes to standard input, and its checks.
//!
//! [`VmConfig`] is the JSON as written; unknown keys are errors. [`VmConfig::check`] does all checks
//! that need no system call. Files and sockets come as descriptors beside it: [`crate::inherited`].

use std::fmt;
use std::io::Read;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::foreseen::{Foreseen, ForeseenError, PAGE_BYTES};
/// The guest-physical address ranges that are memory.
pub use crate::memory::ranges as memory_ranges;

/// Configuration beyond this many bytes is not read.
const CONFIG_BYTES: u64 = 1 << 20;
/// APIC ids have eight bits in the MP table, and the space for that table is limited.
pub const MAX_VCPUS: u8 = 64;
pub const MIN_MEMORY_MIB: u32 = 32;
/// 1 TiB.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;
/// The kernel's COMMAND_LINE_SIZE is 2048; the VMM's own part takes less than half of it.
const EXTRA_CMDLINE_BYTES: usize = 1024;

/// An error in the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read configuration")]
    Read(#[source] std::io::Error),
    #[error("parse configuration")]
    Parse(#[source] serde_json::Error),
    #[error("vcpus is {0}, must be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    #[error("boot_vcpus is {boot}, must be 0 to {vcpus}, the number of vcpus")]
    BootVcpus { boot: u8, vcpus: u8 },
    #[error("memory_mib is {0}, must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}")]
    Memory(u32),
    #[error("memory_max_mib is {0}, must be at most {MAX_MEMORY_MIB}")]
    MemoryMax(u32),
    #[error("guest_cid is {0}, must be 3 to 4294967294")]
    GuestCid(u32),
    #[error("extra_cmdline is longer than {EXTRA_CMDLINE_BYTES} bytes or not printable ASCII")]
    Cmdline,
    #[error("mtu is {0}, must be 68 to 65521")]
    Mtu(u16),
    #[error("mac address {0} is not a unicast address")]
    Mac(MacAddress),
    #[error("the pages that the fork will use")]
    Foreseen(#[from] ForeseenError),
    #[error("the user is {uid} and the group is {gid}, but a VM must not run as root")]
    Root { uid: u32, gid: u32 },
}

/// One microVM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Appended to the command line that the VMM builds.
    #[serde(default)]
    pub extra_cmdline: String,
    /// How many vCPUs the guest can have at most.
    pub vcpus: u8,
    /// How many of them run from the start; 0 means all. The guest brings the others online itself.
    #[serde(default)]
    pub boot_vcpus: u8,
    /// Memory that the guest has at boot.
    pub memory_mib: u32,
    /// Memory that the guest can have at most. The guest may hot-add what lies above `memory_mib`; the host
    /// allocates a page when it is first touched. A value below `memory_mib` counts as `memory_mib`.
    #[serde(default)]
    pub memory_max_mib: u32,
    pub vsock: VsockConfig,
    /// Without it there is a network device whose link is down.
    #[serde(default)]
    pub net: Option<NetConfig>,
    /// Whether the scratch disk has a file. Without one its size is zero.
    #[serde(default)]
    pub scratch_disk: bool,
    /// Whether the image disk begins with the kernel's modules.
    #[serde(default)]
    pub modules: bool,
    /// The user and group that this VM has for itself.
    pub user: User,
    #[serde(default)]
    pub start: Start,
}

/// The SHA-256 of the guest kernel's file. Who starts the VM knows it.
pub type KernelSum = [u8; 32];

/// How a VM begins. All but a VM that boots have the sum of the guest's kernel, see [`crate::state::origin`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Start {
    /// It boots.
    #[default]
    Boot,
    /// It boots in memory of the parent's, for others to be forked from it ([`crate::control::Request::Save`]).
    Template { kernel_sum: KernelSum },
    /// It goes on where a template was saved, with at most as many vCPUs. `memory_mib` is the template's.
    Fork {
        kernel_sum: KernelSum,
        /// Which pages it will use. Without it the fork is one from which the parent learns that.
        #[serde(default)]
        foreseen: Option<Foreseen>,
    },
    /// It goes on where a checkpoint was made ([`crate::control::Request::Checkpoint`]), with at most as many vCPUs and just
    /// as much memory. It is paused until the parent has attached what was on the image disk, and resumes it.
    Restore {
        kernel_sum: KernelSum,
        /// Whether it maps the memory of the checkpoint, which it shares with others then, instead of copying it. The
        /// file stays as it is as long as such a VM runs: nobody writes to it, or makes it shorter. It may be unlinked.
        #[serde(default)]
        maps_memory: bool,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// 3 or more.
    pub guest_cid: u32,
    /// The port of the host to which the guest connects when it is ready. No other one exists.
    pub ready_port: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    pub mac: MacAddress,
    pub mtu: u16,
}

/// A user and a group, neither of them root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// An Ethernet address, written `02:00:00:aa:bb:cc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a MAC address like 02:00:00:aa:bb:cc")]
pub struct ParseMacError(String);

impl VmConfig {
    /// Reads, parses and checks a configuration.
    pub fn read(input: impl Read) -> Result<Self, ConfigError> {
        let config: Self =
            serde_json::from_reader(input.take(CONFIG_BYTES)).map_err(ConfigError::Parse)?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the text alone shows, without system calls.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        if self.boot_vcpus > self.vcpus {
            return Err(ConfigError::BootVcpus {
                boot: self.boot_vcpus,
                vcpus: self.vcpus,
            });
        }
        if self.memory_max_mib > MAX_MEMORY_MIB {
            return Err(ConfigError::MemoryMax(self.memory_max_mib));
        }
        // u32::MAX is VMADDR_CID_ANY.
        if self.vsock.guest_cid < 3 || self.vsock.guest_cid == u32::MAX {
            return Err(ConfigError::GuestCid(self.vsock.guest_cid));
        }
        let printable = |c: char| c == ' ' || c.is_ascii_graphic();
        if self.extra_cmdline.len() > EXTRA_CMDLINE_BYTES
            || !self.extra_cmdline.chars().all(printable)
        {
            return Err(ConfigError::Cmdline);
        }
        if self.user.uid == 0 || self.user.gid == 0 {
            let User { uid, gid } = self.user;
            return Err(ConfigError::Root { uid, gid });
        }
        if let Start::Fork {
            foreseen: Some(foreseen),
            ..
        } = &self.start
        {
            foreseen.check(self.memory_bytes() / PAGE_BYTES)?;
        }
        if let Some(net) = &self.net {
            if !(68..=65521).contains(&net.mtu) {
                return Err(ConfigError::Mtu(net.mtu));
            }
            if net.mac.0[0] & 1 != 0 || net.mac.0 == [0; 6] {
                return Err(ConfigError::Mac(net.mac));
            }
        }
        Ok(())
    }

    /// Memory at boot, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Memory that the guest can have at most, in bytes.
    #[must_use]
    pub fn memory_max_bytes(&self) -> u64 {
        u64::from(self.memory_max_mib.max(self.memory_mib)) << 20
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let wrong = || ParseMacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(wrong()),
        }
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreseen::runs;

    fn sample() -> serde_json::Value {
        serde_json::json!({
            "vcpus": 2, "memory_mib": 256,
            "vsock": { "guest_cid": 3, "ready_port": 1024 },
            "net": { "mac": "02:00:00:aa:bb:cc", "mtu": 1500 },
            "user": { "uid": 1000, "gid": 1000 },
        })
    }

    fn read(value: &serde_json::Value) -> Result<VmConfig, ConfigError> {
        VmConfig::read(value.to_string().as_bytes())
    }

    #[test]
    fn reads_a_sample_and_writes_the_same() {
        let config = read(&sample()).unwrap();
        assert_eq!(config.net.as_ref().unwrap().mac.0[5], 0xcc);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(
            VmConfig::read(text.as_bytes()).unwrap().memory_bytes(),
            256 << 20
        );
    }

    #[test]
    fn for_all_beginnings_what_is_written_is_read() {
        let mut config = read(&sample()).unwrap();
        assert_eq!(config.start, Start::Boot);
        let kernel_sum = [7; 32];
        let fork = |foreseen| Start::Fork {
            kernel_sum,
            foreseen,
        };
        let restore = |maps_memory| Start::Restore {
            kernel_sum,
            maps_memory,
        };
        for start in [
            Start::Boot,
            Start::Template { kernel_sum },
            fork(None),
            fork(Some(Foreseen {
                written: runs([0, 1, 65535]),
                read: runs([2]),
            })),
            restore(false),
            restore(true),
        ] {
            config.start = start.clone();
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(VmConfig::read(text.as_bytes()).unwrap().start, start);
        }
    }

    #[test]
    fn a_fork_uses_only_pages_of_its_template() {
        let mut config = sample();
        let kernel_sum = [7; 32];
        for (page, is_there) in [(65535, true), (65536, false)] {
            config["start"] = serde_json::json!({
                "fork": { "kernel_sum": kernel_sum, "foreseen": { "written": [[page, 1]] } }
            });
            let refused = read(&config).err();
            let as_expected = match refused {
                None => is_there,
                Some(ConfigError::Foreseen(_)) => !is_there,
                Some(_) => false,
            };
            assert!(as_expected, "{page}");
        }
        // As a daemon writes it that foresees nothing.
        config["start"] = serde_json::json!({ "fork": { "kernel_sum": kernel_sum } });
        let start = read(&config).unwrap().start;
        assert!(matches!(start, Start::Fork { foreseen: None, .. }));
    }

    #[test]
    fn refuses_what_is_wrong() {
        type Wrong = fn(&ConfigError) -> bool;
        let parse: Wrong = |e| matches!(e, ConfigError::Parse(_));
        let cases: [(&str, serde_json::Value, Wrong); 14] = [
            ("/unknown", 1.into(), parse),
            ("/vcpus", 0.into(), |e| matches!(e, ConfigError::Vcpus(0))),
            ("/vcpus", 65.into(), |e| matches!(e, ConfigError::Vcpus(65))),
            ("/vcpus", 256.into(), parse),
            ("/memory_mib", 1.into(), |e| {
                matches!(e, ConfigError::Memory(1))
            }),
            ("/boot_vcpus", 3.into(), |e| {
                matches!(e, ConfigError::BootVcpus { boot: 3, vcpus: 2 })
            }),
            ("/memory_max_mib", u32::MAX.into(), |e| {
                matches!(e, ConfigError::MemoryMax(_))
            }),
            ("/vsock/guest_cid", 2.into(), |e| {
                matches!(e, ConfigError::GuestCid(2))
            }),
            ("/extra_cmdline", "a\nb".into(), |e| {
                matches!(e, ConfigError::Cmdline)
            }),
            ("/net/mac", "02:00".into(), parse),
            ("/net/mac", "03:00:00:00:00:00".into(), |e| {
                matches!(e, ConfigError::Mac(_))
            }),
            ("/net/mtu", 10.into(), |e| matches!(e, ConfigError::Mtu(10))),
            ("/user/uid", 0.into(), |e| {
                matches!(e, ConfigError::Root { uid: 0, .. })
            }),
            ("/user/gid", 0.into(), |e| {
                matches!(e, ConfigError::Root { gid: 0, .. })
            }),
        ];
        for (pointer, value, wrong) in cases {
            let mut config = sample();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[key] = value;
            let err = read(&config).unwrap_err();
            assert!(wrong(&err), "{pointer}: {err:?}");
        }
    }
}
