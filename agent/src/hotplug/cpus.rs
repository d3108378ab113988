// SPDX-License-Identifier: Apache-2.0
//! CPUs that the VM has but the kernel did not start at boot.

use std::fs;
use std::path::{Path, PathBuf};

use super::HotplugError;

const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Brings CPUs online until `wanted` are, or all that there are. Returns how many are online.
pub fn bring_up(wanted: u32) -> Result<u32, HotplugError> {
    bring_up_in(Path::new(DIRECTORY), wanted)
}

fn bring_up_in(directory: &Path, wanted: u32) -> Result<u32, HotplugError> {
    // The first CPU is always online and has no switch.
    let mut up = 1;
    let mut number = 1;
    while let Some((path, is_up)) = switch(directory, number) {
        if is_up {
            up += 1;
        } else if up < wanted {
            fs::write(&path, "1").map_err(|source| HotplugError::Online { path, source })?;
            up += 1;
        }
        number += 1;
    }
    Ok(up)
}

/// The file to switch a CPU, and whether the CPU is online. `None` if there is no such CPU.
fn switch(directory: &Path, number: u32) -> Option<(PathBuf, bool)> {
    let path = directory.join(format!("cpu{number}/online"));
    let state = fs::read_to_string(&path).ok()?;
    Some((path, state.trim() == "1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_wanted_are_brought_up_and_none_is_taken_down() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("cpu0")).unwrap();
        for number in 1..4 {
            let cpu = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).unwrap();
            fs::write(cpu.join("online"), "0\n").unwrap();
        }
        for (wanted, up) in [(0, 1), (1, 1), (3, 3), (2, 3), (9, 4)] {
            assert_eq!(
                bring_up_in(directory.path(), wanted).unwrap(),
                up,
                "{wanted}"
            );
        }
    }
}
