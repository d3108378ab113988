// SPDX-License-Identifier: Apache-2.0
//! What an attacker could know of the host at best: it is looked up before the jail, and told by the test.

use std::ffi::CString;
use std::fs;

/// Words of the kernel's command line by which the test tells the rest.
const DIRECTORY: &str = "taken-over.directory=";
const PORT: &str = "taken-over.port=";
const KEY: &str = "taken-over.key=";

/// Numbers are those that the host counts by.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub daemon: i32,
    /// The VMM of another VM.
    pub neighbour: i32,
    /// The daemon's directory.
    pub directory: String,
    /// A TCP port of the host's loopback on which a service listens.
    pub port: u16,
    /// A key of the host's root.
    pub key: i32,
    pub memory_max_bytes: u64,
}

impl Facts {
    /// Looks around on the host. Only what is outside of a jail can do this.
    pub fn look() -> Self {
        let daemon = std::os::unix::process::parent_id().cast_signed();
        let own = std::process::id().cast_signed();
        Self {
            daemon,
            neighbour: other_vmm(own).unwrap_or_default(),
            ..Self::default()
        }
    }

    /// Adds what a command line tells.
    pub fn add(&mut self, line: &str) {
        for word in line.split_ascii_whitespace() {
            if let Some(directory) = word.strip_prefix(DIRECTORY) {
                directory.clone_into(&mut self.directory);
            }
            if let Some(port) = word.strip_prefix(PORT) {
                self.port = port.parse().unwrap_or_default();
            }
            if let Some(key) = word.strip_prefix(KEY) {
                self.key = key.parse().unwrap_or_default();
            }
        }
    }

    /// A path in the daemon's directory.
    pub fn path(&self, name: &str) -> CString {
        CString::new(format!("{}/{name}", self.directory)).unwrap_or_default()
    }
}

/// The process of another VM.
fn other_vmm(own: i32) -> Option<i32> {
    let entries = fs::read_dir("/proc").ok()?;
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|&pid| pid != own).find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|&byte| byte == 0);
        words
            .next()
            .is_some_and(|name| name.ends_with(b"bulkhead-vmm"))
            && words.next() == Some(b"run")
    })
}
