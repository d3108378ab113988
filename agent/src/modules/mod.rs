// SPDX-License-Identifier: Apache-2.0
//! Loads modules of the guest's kernel. The kernel starts the agent's program once more for it (`CONFIG_MODPROBE_PATH`), when
//! a program in the pod first uses what a module implements: a kind of socket, a file system, a match of iptables. That
//! process runs in the root of PID 1, loads the module and those that it needs, and ends.
//!
//! The modules are a file system at the beginning of the image disk. It is mounted for the first of them, so that a pod
//! that needs none pays for none. What the kernel asks for may be any text of a container's program, so it is only compared
//! with what the index has ([`index`]).

mod index;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use bulkhead_proto::agent::{self as proto, disk};
use bulkhead_text::chain;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::system::finit_module;

use crate::disk::extent::Extent;
use crate::disk::layers::mount_layer;
use index::Index;

/// The first argument that the kernel gives to its `modprobe`; `--` and what it asks for follow.
pub const ROLE: &str = "-q";
const LOCK: &str = "/run/modules.lock";
const MODULES: &str = "/run/modules";
const DEPENDENCIES: &str = "modules.dep";

/// Loads what the kernel asks for. The exit code tells the kernel whether something was loaded.
pub fn run() -> ExitCode {
    let wanted: Option<OsString> = std::env::args_os().nth(3);
    let wanted = wanted.unwrap_or_default();
    match load(&String::from_utf8_lossy(wanted.as_bytes())) {
        Ok(true) => ExitCode::SUCCESS,
        // The kernel asks for much that exists nowhere, so this is no error.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let line = format!("<3>bulkhead-agent: load {wanted:?}: {error}\n");
            let _ = fs::write("/dev/kmsg", line);
            ExitCode::FAILURE
        }
    }
}

/// Returns whether there is such a module.
fn load(wanted: &str) -> io::Result<bool> {
    let Some(modules) = mounted()? else {
        return Ok(false);
    };
    let dependencies = fs::read_to_string(modules.join(DEPENDENCIES))?;
    let aliases = fs::read_to_string(modules.join("modules.alias"))?;
    let found = Index::new(&dependencies, &aliases).files(wanted);
    for file in &found {
        match finit_module(File::open(modules.join(file))?, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(io::Error::other(format!("{file}: {e}"))),
        }
    }
    Ok(!found.is_empty())
}

/// Mounts the modules, if no other process did. `None` if this guest has no modules.
fn mounted() -> io::Result<Option<&'static Path>> {
    let modules = Path::new(MODULES);
    let lock = File::create(LOCK)?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if modules.join(DEPENDENCIES).exists() {
        return Ok(Some(modules));
    }
    let Some(sectors) = sectors(&fs::read_to_string("/proc/cmdline")?) else {
        return Ok(None);
    };
    let extent = proto::Extent {
        first_sector: 0,
        sectors,
    };
    let extent = Extent::try_from(extent).map_err(io::Error::other)?;
    mount_layer(extent, modules, MountFlags::NODEV | MountFlags::NOSUID)
        .map_err(|error| io::Error::other(chain(&error)))?;
    Ok(Some(modules))
}

/// How many sectors of the image disk are modules, by the kernel's command line.
fn sectors(command_line: &str) -> Option<u64> {
    let mut words = command_line.split_ascii_whitespace();
    words.find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == disk::MODULES_PARAMETER)
            .then(|| value.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_how_long_the_modules_are() {
        let line = "quiet bulkhead.modules_sectors=4096 virtio_mmio.device=4K@0xd0000000:5\n";
        assert_eq!(sectors(line), Some(4096));
        assert_eq!(sectors("quiet bulkhead.modules_sectors"), None);
        assert_eq!(sectors("bulkhead.modules_sectors=x"), None);
    }
}
